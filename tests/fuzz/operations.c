/* operations.c - every call of the core's contract, with what it may answer. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <unistd.h>

#define STATUS(s) (1u << (s))
#define ERROR(e) (1u << (16 - (e)))
enum {
    ANY = ERROR(SC_E_FENCED) | ERROR(SC_E_DAMAGED),
    LOCKS = ANY | ERROR(SC_E_BUSY),
    WRITE = LOCKS | ERROR(SC_E_MEMORY) | ERROR(SC_E_UNLIKE) | STATUS(SC_EXISTS) | STATUS(SC_IN_FLIGHT) | STATUS(SC_NO_SPACE),
    FINISH = LOCKS | STATUS(SC_NOT_FOUND) | STATUS(SC_NOT_OWNER) | STATUS(SC_EXISTS) | STATUS(SC_PART),
    LOOK = ANY | STATUS(SC_NOT_FOUND) | STATUS(SC_IN_FLIGHT),
    JOIN = LOCKS | ERROR(SC_E_LANE_IN_USE) | ERROR(SC_E_NO_LANE) | ERROR(SC_E_WORLD_SIZE) | ERROR(SC_E_RETIRED) |
           ERROR(SC_E_VERSION),
};

/* The result of a call and the statuses that go with it: those that are allowed, and as many SC_OK as it says. */
static bool check(const char *what, int64_t rc, uint32_t allowed, const int8_t *status, uint32_t n)
{
    uint32_t ok = 0;
    tell("%s: %lld", what, (long long)rc);
    if (rc < 0 && (rc < SC_E_REGIONS || !(allowed & ERROR(rc))))
        fail("%s gives the error %lld", what, (long long)rc);
    for (uint32_t i = 0; status && rc >= 0 && i < n; i++) {
        if (status[i] != SC_OK && (status[i] < 0 || status[i] > SC_UNLIKE || !(allowed & STATUS(status[i]))))
            fail("%s gives the status %d", what, status[i]);
        ok += status[i] == SC_OK || status[i] == SC_PART;
    }
    if (status && rc >= 0 && rc != ok)
        fail("%s gives %lld, with %u statuses OK", what, (long long)rc, ok);
    return rc >= 0;
}

/* Where there may be regions an object may be lost; who wrote it gives it back under the lock. */
static uint32_t lost(const struct world *w) { return w->g.regions ? STATUS(SC_LOST) : 0; }
static uint32_t written_lost(const struct world *w) { return w->g.regions ? STATUS(SC_LOST) | STATUS(SC_LOCKED) : 0; }

static void statuses_of(const struct batch *b, int8_t *status)
{
    for (uint32_t i = 0; i < b->n; i++)
        status[i] = (int8_t)b->refs[i].status;
}

struct packed { char data[BATCH * SC_MAX_KEY]; uint32_t ends[BATCH], width; };

static void choose_keys(struct input *in, struct batch *b, struct packed *p)
{
    uint32_t most = choose(in, 2) ? SAME_WIDTH : KEYS;
    b->n = choose(in, BATCH) + 1;
    for (uint32_t i = 0; i < b->n; i++)
        b->keys[i] = choose(in, most);
    p->width = keys_pack(b->keys, b->n, p->data, p->ends);
}

static struct batch *free_batch(struct batch *batches)
{
    for (int i = 0; i < BATCHES; i++)
        if (batches[i].handle < 0)
            return &batches[i];
    return NULL;
}

static struct batch *batch_of(struct batch *batches, struct input *in, int h)
{
    uint32_t i = choose(in, BATCHES);
    for (int tries = 0; tries < BATCHES; tries++, i = (i + 1) % BATCHES)
        if (batches[i].handle == h)
            return &batches[i];
    return NULL;
}

static uint32_t some_bytes(struct input *in) { return 8 + choose(in, 3) * BLOCK + choose(in, BLOCK - 8); }

static uint32_t some_layout(const struct world *w, struct input *in)
{
    uint32_t number = choose(in, 64);
    return number && w->layouts >> number & 1 ? number : 0;
}

static void reserve_write(struct world *w, struct input *in, int h)
{
    struct batch *b = free_batch(w->writes);
    struct packed p;
    int8_t status[BATCH];
    uint64_t nbytes[BATCH];
    uint32_t layouts[BATCH], each = choose(in, 2), writers = w->handles[h]->world_size > 1 && choose(in, 2) ? RANKS : 1;
    if (!b || w->version_count + BATCH > VERSIONS)
        return;
    memset(b, 0, sizeof *b);
    b->handle = -1;
    choose_keys(in, b, &p);
    for (uint32_t i = 0; i < b->n; i++) {
        nbytes[i] = i && !each ? nbytes[0] : some_bytes(in);
        layouts[i] = i && !each ? layouts[0] : some_layout(w, in);
        if (writers > 1 && each) { /* so that others reserve the same */
            nbytes[i] = 16 + b->keys[i] * 1000;
            layouts[i] = 0;
        }
    }
    bool temporary = !choose(in, 8);
    uint32_t region = w->g.regions ? choose(in, w->g.regions + 2) : 0;
    int64_t rc = sc_reserve_write(w->handles[h], p.data, p.width, p.ends, b->n, nbytes, layouts, each, region, temporary,
                                  writers, b->refs);
    statuses_of(b, status);
    if (!check("reserve_write", rc, WRITE | lost(w), status, b->n))
        return;
    b->handle = h;
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->refs[i].status != SC_OK)
            continue;
        check_ref(w, w->handles[h], &b->refs[i]);
        if (b->refs[i].nbytes != nbytes[i] || b->refs[i].offset % w->g.block_size || b->refs[i].region != region)
            fail("reserve_write gives %llu bytes", (unsigned long long)b->refs[i].nbytes);
        version_reserve(w, h, b, i, writers);
        if (choose(in, 4))
            version_fill(w, b, i);
    }
}

static uint32_t some_ranks(const struct world *w, struct input *in, int h)
{
    return choose(in, w->handles[h]->world_size + 1);
}

static bool fill_batch(struct world *w, const struct batch *b)
{
    bool whole = true;
    for (uint32_t i = 0; i < b->n; i++)
        if (b->refs[i].status == SC_OK)
            whole = version_fill(w, b, i) && whole;
    return whole;
}

static void abort_batch(struct world *w, struct batch *b)
{
    int8_t status[BATCH];
    int64_t rc = sc_abort_refs(w->handles[b->handle], b->refs, b->n, status);
    uint32_t own = 0;
    for (uint32_t i = 0; i < b->n; i++)
        own |= STATUS(b->refs[i].status);
    if (!check("abort_refs", rc, FINISH | own, status, b->n))
        return;
    for (uint32_t i = 0; i < b->n; i++)
        if (b->refs[i].status == SC_OK)
            version_finish(w, b->versions[i], b->parts[i], SC_LOST);
    b->handle = -1;
}

static void publish(struct world *w, struct input *in, int h)
{
    struct batch *b = batch_of(w->writes, in, h);
    int8_t status[BATCH];
    if (!b)
        return;
    if (!fill_batch(w, b)) {
        abort_batch(w, b);
        return;
    }
    int64_t rc = sc_publish(w->handles[h], b->refs, b->n, some_ranks(w, in, h), status);
    uint32_t own = 0; /* what was never reserved keeps its status */
    for (uint32_t i = 0; i < b->n; i++)
        own |= STATUS(b->refs[i].status);
    if (!check("publish", rc, FINISH | own | written_lost(w), status, b->n))
        return;
    for (uint32_t i = 0; i < b->n; i++)
        if (b->refs[i].status == SC_OK)
            version_finish(w, b->versions[i], b->parts[i], status[i]);
    b->handle = -1;
}

static void finish_parts(struct world *w, int h, uint32_t key, int8_t status)
{
    for (uint32_t v = 0; v < w->version_count; v++)
        for (uint32_t p = 0; p < w->versions[v].joined; p++)
            if (w->versions[v].key == key && w->versions[v].parts[p].handle == h && w->versions[v].parts[p].pending)
                version_finish(w, v, p, status);
}

/* By key: whatever this handle has pending under it. */
static void finish_keys(struct world *w, struct input *in, int h, bool keep)
{
    struct batch b = {0};
    struct packed p;
    int8_t status[BATCH];
    choose_keys(in, &b, &p);
    for (int i = 0; i < BATCHES; i++)
        if (w->writes[i].handle == h)
            keep = keep && fill_batch(w, &w->writes[i]);
    int64_t rc = keep ? sc_finish_write(w->handles[h], p.data, p.width, p.ends, b.n, some_ranks(w, in, h), status)
                      : sc_abort_write(w->handles[h], p.data, p.width, p.ends, b.n, status);
    if (!check(keep ? "finish_write" : "abort_write", rc, FINISH | (keep ? written_lost(w) : STATUS(SC_LOCKED)), status, b.n))
        return;
    for (uint32_t i = 0; i < b.n; i++)
        if (status[i] == SC_OK || status[i] == SC_PART)
            finish_parts(w, h, b.keys[i], keep ? status[i] : SC_LOST);
}

static void put(struct world *w, struct input *in, int h)
{
    char data[4 * BLOCK], key[SC_MAX_KEY];
    uint32_t end, id = choose(in, KEYS), nbytes = some_bytes(in);
    int8_t status = SC_LOST;
    if (w->version_count == VERSIONS || w->truncated)
        return; /* a payload that is gone is for test_truncated.py */
    uint32_t width = keys_pack(&id, 1, key, &end), version = version_new(w, id, nbytes, 0);
    version_bytes(version, data, nbytes);
    char *payload = (char *)w->map + w->g.payload;
    int64_t rc = sc_put(w->handles[h], key, width, payload, data, nbytes, &status);
    if (check("put", rc, WRITE | FINISH | written_lost(w), &status, 1))
        w->versions[version].published = status == SC_OK;
}

static void read_keys(struct world *w, struct input *in, int h)
{
    struct batch *b = free_batch(w->reads);
    struct packed p;
    int8_t status[BATCH];
    int flags = (int)choose(in, 16) & ~SC_AGAIN;
    if (!b)
        return;
    memset(b, 0, sizeof *b);
    b->handle = -1;
    choose_keys(in, b, &p);
    int64_t rc = sc_read(w->handles[h], p.data, p.width, p.ends, b->n, flags, b->refs);
    if (rc >= 0 && !choose(in, 4)) {
        int64_t more = sc_read(w->handles[h], p.data, p.width, p.ends, b->n, flags | SC_AGAIN, b->refs);
        rc = more < 0 ? more : rc + more;
    }
    statuses_of(b, status);
    if (!check("read", rc, LOOK | STATUS(SC_NO_SHARE) | lost(w), status, b->n))
        return;
    b->handle = h;
    for (uint32_t i = 0; i < b->n; i++)
        if (b->refs[i].status == SC_OK) {
            check_ref(w, w->handles[h], &b->refs[i]);
            check_read(w, b->keys[i], &b->refs[i]);
        }
}

static void release(struct world *w, struct input *in, int h)
{
    struct batch *b = batch_of(w->reads, in, h);
    if (!b)
        return;
    /* What a share protects stays as it was, whatever else is damaged. */
    for (uint32_t i = 0; i < b->n && !w->shares_lie && !w->concurrent; i++)
        if (b->refs[i].status == SC_OK)
            check_read(w, b->keys[i], &b->refs[i]);
    int64_t rc = sc_release(w->handles[h], b->refs, b->n);
    check("release", rc, ANY, NULL, 0);
    if (rc > b->n)
        fail("release gives back %lld of %u", (long long)rc, b->n);
    b->handle = -1;
}

/* Calls of keys that give statuses and no memory. */
static void by_keys(struct world *w, struct input *in, int h)
{
    struct batch b = {0};
    struct packed p;
    int8_t status[BATCH];
    struct sc_segment *s = w->handles[h];
    choose_keys(in, &b, &p);
    uint32_t ranks = some_ranks(w, in, h);
    int64_t rc;
    switch (choose(in, 7)) {
    case 0:
        rc = sc_lookup(s, p.data, p.width, p.ends, b.n);
        if (rc > b.n)
            fail("lookup finds %lld of %u", (long long)rc, b.n);
        check("lookup", rc, ANY, NULL, 0);
        break;
    case 1: check("status", sc_get_status(s, p.data, p.width, p.ends, b.n, status), LOOK | lost(w), status, b.n); break;
    case 2: check("touch", sc_touch_keys(s, p.data, p.width, p.ends, b.n, status), LOOK | lost(w), status, b.n); break;
    case 3:
        rc = sc_reserve_read(s, p.data, p.width, p.ends, b.n, ranks, status);
        check("reserve_read", rc, LOOK | STATUS(SC_NO_SHARE) | lost(w), status, b.n);
        break;
    case 4:
        rc = sc_finish_read(s, p.data, p.width, p.ends, b.n, status);
        check("finish_read", rc, ANY | STATUS(SC_NOT_FOUND) | STATUS(SC_NO_SHARE), status, b.n);
        break;
    case 5:
        rc = sc_cancel_read(s, p.data, p.width, p.ends, b.n, ranks, status);
        check("cancel_read", rc, ANY | STATUS(SC_NOT_FOUND) | STATUS(SC_NO_SHARE), status, b.n);
        break;
    default:
        rc = sc_delete(s, p.data, p.width, p.ends, b.n, choose(in, 2), status);
        check("delete", rc, LOCKS | STATUS(SC_NOT_FOUND) | STATUS(SC_LOCKED), status, b.n);
    }
}

static void layouts(struct world *w, struct input *in, int h)
{
    char spec[SC_MAX_SPEC] = "uint8[";
    uint32_t bytes = 0, number = choose(in, 8);
    if (choose(in, 2)) {
        int64_t rc = sc_layout_number(w->handles[h], spec, 7 + number, 8 + number);
        if (check("layout_number", rc, LOCKS | ERROR(SC_E_LAYOUTS), NULL, 0) && (rc == 0 || rc > SC_MAX_LAYOUTS))
            fail("layout_number gives %lld", (long long)rc);
        w->layouts |= rc > 0 && rc < 64 ? UINT64_C(1) << rc : 0;
    } else if (check("layout_spec", sc_layout_spec(w->handles[h], number, spec, &bytes), ANY, NULL, 0) && bytes > SC_MAX_SPEC) {
        fail("layout_spec gives %u bytes", bytes);
    }
}

/* As inspect does, by who is no member. */
static void look_at_objects(struct sc_segment *s)
{
    static struct sc_census c;
    static struct sc_object_info objects[SLOTS];
    static struct sc_share_info shares[SLOTS];
    sc_census(s, &c);
    if (c.objects + c.writing > s->g.slots)
        fail("census: %llu objects", (unsigned long long)(c.objects + c.writing));
    uint32_t most = s->g.slots < SLOTS ? s->g.slots : SLOTS, n = sc_list_objects(s, objects, most);
    for (uint32_t i = 0; i < n; i++)
        if (objects[i].key_bytes > SC_MAX_KEY || objects[i].block + objects[i].blocks > s->g.blocks ||
            objects[i].standing > SC_KEPT_DEAD || objects[i].region > s->g.regions ||
            (!objects[i].region && objects[i].nbytes > objects[i].blocks * s->g.block_size))
            fail("list_objects: slot %u, block %llu", objects[i].slot, (unsigned long long)objects[i].block);
    for (uint32_t lane = 0; lane <= s->g.lanes; lane++)
        n = sc_list_shares(s, lane, shares, most);
}

static void look(struct world *w)
{
    struct sc_segment *s = calloc(1, sizeof *s);
    struct sc_info *info = calloc(1, sizeof *info);
    struct sc_lane_info *lane = calloc(1, sizeof *lane);
    uint64_t found, own;
    sc_formats(w->fd, &found, &own);
    int rc = sc_segment_open(w->fd, false, s);
    check("segment_open", rc, ANY | ERROR(SC_E_VERSION), NULL, 0);
    if (rc == 0) {
        sc_get_info(s, info);
        look_at_objects(s);
        if (info->fingerprint_bytes > sizeof info->fingerprint)
            fail("get_info: %u bytes of fingerprint", info->fingerprint_bytes);
        for (uint32_t i = 0; i < info->lane_limit; i++) {
            sc_get_lane(s, i, lane);
            if (lane->group_bytes > sizeof lane->group)
                fail("get_lane: a group of %u bytes", lane->group_bytes);
        }
        sc_segment_shut(s);
    }
    free(lane);
    free(info);
    free(s);
}

static void whole(struct world *w, struct input *in, int h)
{
    static char report[1 << 16];
    struct sc_segment *s = w->handles[h];
    struct sc_reaped r;
    struct sc_note note = {choose(in, 4), choose(in, 70), (int64_t)choose_word(in)};
    uint32_t pid = 0;
    switch (choose(in, 8)) {
    case 0: check("evict", sc_evict(s, choose(in, w->g.regions + 2), choose(in, 8) * BLOCK), LOCKS, NULL, 0); break;
    case 1: check("evict", sc_evict(s, 0, UINT64_C(1) << 62), LOCKS, NULL, 0); break;
    case 2: check("clear", sc_clear(s), LOCKS, NULL, 0); break;
    case 3: check("reap", sc_reap(s, choose(in, 2), &r), LOCKS, NULL, 0); break;
    case 4: check("verify", sc_verify(s, report, choose(in, 2) ? sizeof report : 64), LOCKS, NULL, 0); break;
    case 5: sc_note(s, &note, 1); break;
    case 6:
        if (choose(in, 4) == 0 && check("retire", sc_retire(s, choose(in, 2), &pid), LOCKS, NULL, 0))
            sc_door_close(s);
        break;
    default: look(w);
    }
}

/* What a region says of itself is what was once written, or nothing. */
static void look_at_region(const struct world *w, struct sc_segment *s, uint32_t region)
{
    struct sc_region_info info;
    int rc = sc_get_region(s, region, &info);
    if (!check("get_region", rc, ANY | ERROR(SC_E_REGIONS), NULL, 0))
        return;
    if (info.state > SC_REGION_LOST || info.blocks > s->g.blocks || (info.state && info.handle[63] != 'h' && !w->concurrent))
        fail("get_region: state %u, %u blocks, handle %02x", info.state, info.blocks, info.handle[63]);
    for (uint32_t lane = s->g.lanes; lane < 64 * 4; lane++)
        if (info.opened[lane / 64] >> lane % 64 & 1)
            fail("get_region: lane %u has it open", lane);
}

static void regions(struct world *w, struct input *in, int h)
{
    struct sc_segment *s = w->handles[h];
    uint32_t region = choose(in, w->g.regions + 2), generation = choose(in, 4);
    struct sc_region_info info = {.generation = generation};
    int64_t rc;
    for (uint32_t own = 1; own <= w->g.regions && generation == 0; own++) /* at times one of its own */
        region = sc_get_region(s, own, &info) == 0 && info.state == SC_REGION_LIVE && info.owner == s->lane ? own : region;
    switch (choose(in, 6)) {
    case 0:
    case 1:
        rc = region_add(w, h, choose(in, 2) ? DEVICE_BYTES : (1 + choose(in, BLOCKS)) * BLOCK);
        if (check("region_add", rc, LOCKS | ERROR(SC_E_REGIONS), NULL, 0) && (rc < 1 || rc > s->g.regions))
            fail("region_add gives %lld", (long long)rc);
        break;
    case 2:
        rc = sc_region_give_up(s, region);
        if (check("region_give_up", rc, LOCKS | ERROR(SC_E_REGIONS), NULL, 0) && rc != SC_OK && rc != SC_NOT_OWNER)
            fail("region_give_up gives %lld", (long long)rc);
        break;
    case 3:
        if (generation > 1)
            sc_get_region(s, region, &info); /* as it is, mostly */
        rc = sc_region_opened(s, region, info.generation, choose(in, 2));
        if (check("region_opened", rc, ANY | ERROR(SC_E_REGIONS), NULL, 0) && rc != SC_OK && rc != SC_LOST)
            fail("region_opened gives %lld", (long long)rc);
        break;
    case 4:
        rc = sc_region_check(s, region);
        if (check("region_check", rc, ANY, NULL, 0) && rc != SC_OK && rc != SC_LOST)
            fail("region_check gives %lld", (long long)rc);
        break;
    default: look_at_region(w, s, region);
    }
}

static void come(struct world *w, struct input *in, int h)
{
    uint32_t who = choose(in, 8);
    int32_t rank = who < 6 ? (int32_t)(who % RANKS) : -1;
    int rc = who < 2 ? world_attach(w, h, "", 0, 1) : world_attach(w, h, "engine", rank, who == 7 ? 1 : RANKS);
    check("join", rc, JOIN, NULL, 0);
    if (rc == 0 && (uint64_t)lseek(w->fd, 0, SEEK_END) != w->handles[h]->g.segment_bytes)
        fail("a file of another length than its header says is joined");
}

void operate(struct world *w, struct input *in)
{
    int h = (int)choose(in, HANDLES);
    uint32_t what = choose(in, w->g.regions ? 40 : 32);
    struct batch *b;
    if (!w->handles[h]) {
        come(w, in, h);
        return;
    }
    switch (what) {
    case 0: world_detach(w, h, choose(in, 2)); break;
    case 1: case 2: case 3: case 4: reserve_write(w, in, h); break;
    case 5: case 6: case 7: publish(w, in, h); break;
    case 8:
        if ((b = batch_of(w->writes, in, h)))
            abort_batch(w, b);
        break;
    case 9: case 10: finish_keys(w, in, h, true); break;
    case 11: finish_keys(w, in, h, false); break;
    case 12: case 13: case 14: put(w, in, h); break;
    case 15: case 16: case 17: case 18: read_keys(w, in, h); break;
    case 19: case 20: release(w, in, h); break;
    case 21: layouts(w, in, h); break;
    case 22: case 23: case 24: case 25: whole(w, in, h); break;
    case 32: case 33: case 34: case 35: case 36: regions(w, in, h); break;
    default: by_keys(w, in, h);
    }
}
