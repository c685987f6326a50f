/* regions.c - lanes that add regions, open those of others and give them up, as shmcache/regions.py does: whoever has one
 * open finds its memory there, whoever owns it frees the memory when nobody has it open, nor will.
 *
 * A lane's device memory is plain memory of this program. Where it is freed its serial number becomes 0.
 */
#include "lanes.h"

enum { REGION_BLOCKS = 4, DEVICES = 2, OWNERS = 8 };

struct device {
    uint64_t serial, words[REGION_BLOCKS * BLOCK / 8];
    uint32_t region, generation; /* what it was recorded as; 0: it is free */
};

/* Of each lane's process and those before it in that lane; it alone uses region and generation. */
static struct device devices[OWNERS][DEVICES];
static uint64_t serials[OWNERS];

static bool owns(const struct lane *l) { return l->number >= RANKS && l->number < OWNERS; }

/* A handle tells the memory, in each of its words another way: half of another handle is none. */
static void handle_of(const struct device *d, uint64_t serial, uint64_t handle[8])
{
    for (uint64_t i = 0; i < 8; i++)
        handle[i] = (serial << 8 | (uint64_t)(d - devices[0])) * (2 * i + 1);
}

static struct device *device_of(const struct sc_region_info *info, uint64_t *serial)
{
    uint64_t handle[8], expected[8];
    memcpy(handle, info->handle, sizeof handle);
    CHECK((handle[0] & 0xff) < OWNERS * DEVICES);
    struct device *d = &devices[0][handle[0] & 0xff];
    *serial = handle[0] >> 8;
    handle_of(d, *serial, expected);
    CHECK(memcmp(handle, expected, sizeof handle) == 0);
    CHECK(info->blocks == REGION_BLOCKS && info->block_size == BLOCK && info->nbytes == REGION_BLOCKS * BLOCK);
    return d;
}

static struct sc_region_info info_of(const struct lane *l, uint32_t region)
{
    struct sc_region_info info;
    CHECK(sc_get_region(l->s, region, &info) == 0);
    return info;
}

static bool in_use(const struct lane *l, uint32_t region)
{
    bool any = false;
    for (uint32_t i = 0; i < WRITES; i++)
        any = any || (l->writes[i].nbytes && l->writes[i].region == region);
    for (uint32_t i = 0; i < READS; i++)
        any = any || (l->reads[i].nbytes && l->reads[i].region == region);
    return any;
}

/* The owner is gone, or has given it up: whether nobody has its memory open, nor ever will again. */
static bool is_over(const struct lane *l, const struct device *d)
{
    struct sc_region_info info = info_of(l, d->region);
    if (info.generation != d->generation)
        return true; /* nobody's number by now, or another's: so nobody had it open */
    CHECK(info.state == SC_REGION_LOST);
    return !(info.opened[0] | info.opened[1] | info.opened[2] | info.opened[3]);
}

static void free_some(struct lane *l)
{
    for (uint32_t i = 0; i < DEVICES; i++) {
        struct device *d = &devices[l->number][i];
        if (!d->region || (l->own_region && l->owned.device == d) || !is_over(l, d))
            continue;
        payload_store(&d->serial, 0);
        d->region = 0;
        l->done[DONE_FREED]++;
    }
}

static void add(struct lane *l)
{
    struct sc_region_spec spec = {.nbytes = REGION_BLOCKS * BLOCK};
    struct device *d = NULL;
    uint64_t handle[8], serial = ++serials[l->number];
    free_some(l);
    for (uint32_t i = 0; i < DEVICES && !l->own_region; i++)
        d = devices[l->number][i].region ? d : &devices[l->number][i];
    if (!d)
        return;
    payload_store(&d->serial, serial);
    handle_of(d, serial, handle);
    memcpy(spec.handle, handle, sizeof handle);
    int64_t rc = sc_region_add(l->s, &spec);
    CHECK(rc == SC_E_REGIONS || (rc > 0 && rc <= REGIONS));
    if (rc < 0)
        return;
    CHECK(!l->open[rc].generation); /* what somebody has open keeps its number */
    struct sc_region_info info = info_of(l, (uint32_t)rc);
    CHECK(info.state == SC_REGION_LIVE && info.owner == l->s->lane);
    d->region = (uint32_t)rc;
    d->generation = info.generation;
    l->owned = (struct mapping){info.generation, d, serial};
    l->own_region = (uint32_t)rc;
    l->done[DONE_ADDED]++;
}

static void give_up(struct lane *l)
{
    uint32_t other = 1 + below(l, REGIONS + 1);
    if (other != l->own_region)
        CHECK(sc_region_give_up(l->s, other) == (other > REGIONS ? SC_E_REGIONS : SC_NOT_OWNER));
    if (!l->own_region || in_use(l, l->own_region))
        return;
    CHECK(sc_region_give_up(l->s, l->own_region) == SC_OK);
    l->own_region = 0;
    l->done[DONE_GIVEN_UP]++;
    free_some(l);
}

static bool is_there(const struct lane *l, uint32_t region)
{
    struct sc_region_info info = info_of(l, region);
    return info.state == SC_REGION_LIVE && info.generation == l->open[region].generation;
}

static void close_one(struct lane *l, uint32_t region)
{
    struct mapping *m = &l->open[region];
    if (!m->generation || in_use(l, region))
        return;
    CHECK(region_mapped(l, region));
    sc_region_opened(l->s, region, m->generation, false);
    *m = (struct mapping){0};
    l->done[DONE_CLOSED]++;
}

/* What nothing is made from and is lost; at times also what is not. */
static void close_some(struct lane *l)
{
    for (uint32_t region = 1; region <= REGIONS; region++)
        if (l->open[region].generation && (!is_there(l, region) || below(l, 8) == 0))
            close_one(l, region);
}

uint64_t *region_mapped(const struct lane *l, uint32_t region)
{
    const struct mapping *m = region == l->own_region ? &l->owned : &l->open[region];
    if (!m->generation)
        return NULL;
    CHECK(payload_load(&m->device->serial) == m->serial);
    return m->device->words;
}

uint64_t *region_map(struct lane *l, uint32_t region)
{
    struct mapping *m = &l->open[region];
    if (region == l->own_region)
        return region_mapped(l, region);
    if (m->generation && sc_region_opened(l->s, region, m->generation, true) == SC_OK)
        return region_mapped(l, region);
    if (m->generation)
        return NULL;
    struct sc_region_info info = info_of(l, region);
    if (info.state != SC_REGION_LIVE || sc_region_opened(l->s, region, info.generation, true) != SC_OK)
        return NULL;
    m->generation = info.generation;
    m->device = device_of(&info, &m->serial);
    l->done[DONE_OPENED]++;
    return region_mapped(l, region);
}

/* So that it is often about to be opened when it is given up. */
static void open_and_close(struct lane *l)
{
    for (uint32_t i = 0; i < 8; i++) {
        region_map(l, 1 + i % REGIONS);
        close_one(l, 1 + i % REGIONS);
    }
}

void regions_step(struct lane *l)
{
    switch (below(l, 8)) {
    case 0:
    case 1:
        if (owns(l))
            add(l);
        if (below(l, 4) == 0)
            give_up(l);
        break;
    case 2:
    case 3:
        give_up(l);
        break;
    case 4:
    case 5:
        open_and_close(l);
        break;
    default:
        close_some(l);
        CHECK(sc_region_check(l->s, 1 + below(l, REGIONS)) >= 0);
        if (owns(l))
            free_some(l);
    }
}

void regions_leave(struct lane *l)
{
    for (uint32_t region = 1; region <= REGIONS; region++)
        CHECK(!l->open[region].generation || region_mapped(l, region));
    if (below(l, 2))
        close_some(l);
    if (below(l, 2))
        give_up(l);
}

void regions_settled(struct lane *l)
{
    struct sc_region_spec spec = {.nbytes = REGION_BLOCKS * BLOCK};
    struct sc_reaped r;
    CHECK(sc_reap(l->s, true, &r) == 0);
    for (uint32_t region = 1; region <= REGIONS; region++)
        CHECK(info_of(l, region).state == SC_REGION_NONE);
    for (uint32_t region = 1; region <= REGIONS; region++) {
        char name[] = "region 0";
        struct sc_ref ref = {0};
        uint32_t layout = 0;
        name[sizeof name - 2] += (char)region;
        CHECK(sc_region_add(l->s, &spec) == region);
        CHECK(sc_reserve_write(l->s, name, sizeof name - 1, NULL, 1, &spec.nbytes, &layout, false, region, false, 1, &ref) == 1);
    }
    CHECK(sc_region_add(l->s, &spec) == SC_E_REGIONS);
    for (uint32_t region = 1; region <= REGIONS; region++)
        CHECK(sc_region_give_up(l->s, region) == SC_OK);
}
