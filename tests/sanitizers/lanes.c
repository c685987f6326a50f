#define _GNU_SOURCE
#include "lanes.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "one_mapping.h"
#include "writers.h"

enum { BLOCKS = 8, SLOTS = 5, LANES = 6, EDGE_WORDS = 4, TOGETHER = 2, LAYOUTS = 800 };

void lanes_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    fflush(NULL);
    _exit(3);
}

uint32_t below(struct lane *l, uint32_t n)
{
    l->random ^= l->random << 13;
    l->random ^= l->random >> 7;
    l->random ^= l->random << 17;
    return (uint32_t)(l->random >> 33) % n;
}

int lanes_create(void)
{
    struct sc_config c = {.capacity = BLOCKS * BLOCK, .block_size = BLOCK, .slots = SLOTS, .lanes = LANES, .regions = REGIONS};
    c.eviction_window_us = 300;
    c.read_lease_us = 300;
    c.write_lease_us = 2000;
    c.lock_timeout_us = 20000000;
    int fd = memfd_create("lanes", MFD_CLOEXEC);
    struct sc_geometry g;
    CHECK(fd >= 0 && sc_format(fd, &c) == 0 && sc_plan(c.capacity, c.block_size, c.slots, c.lanes, c.regions, &g) == 0);
    one_mapping_begin(fd, g.segment_bytes);
    return fd;
}

static void key_of(uint32_t number, char *key) { snprintf(key, KEY_BYTES, "key-%07u", number); }

/* The first and last words of an object carry its tag: its key, and which write of its slot it was. */
static uint64_t tag_of(const struct sc_ref *r, uint32_t key)
{
    return ((uint64_t)r->generation * SLOTS + r->slot) << 8 | (key + 1);
}

static bool together(const struct lane *l, uint32_t key) { return key < TOGETHER && l->number < RANKS; }

/* NULL: in a region that was lost before it could be opened. */
static uint64_t *words_of(const struct lane *l, const struct sc_ref *r)
{
    if (r->region) {
        uint64_t *words = region_mapped(l, r->region);
        return words ? words + r->offset / 8 : NULL;
    }
    return (uint64_t *)((uint8_t *)one_mapping() + l->s->g.payload + r->offset);
}

/* Half of what this lane has to write: all of the words, or of several writers one end. */
static void fill(const struct lane *l, const struct sc_ref *r, uint32_t key, bool second_half)
{
    uint64_t *words = words_of(l, r), n = r->nbytes / 8;
    uint32_t per_end = together(l, key) ? EDGE_WORDS / 2 : EDGE_WORDS, from = together(l, key) && second_half ? per_end : 0;
    bool at_end = together(l, key) ? l->number == 1 : second_half;
    if (!words)
        return;
    for (uint64_t i = from; i < from + per_end; i++)
        payload_store(at_end ? &words[n - 1 - i] : &words[i], tag_of(r, key));
}

static void check_bytes(const struct lane *l, const struct sc_ref *r, uint32_t key)
{
    const uint64_t *words = words_of(l, r), n = r->nbytes / 8;
    if (!words)
        return;
    for (uint64_t i = 0; i < EDGE_WORDS; i++)
        CHECK(payload_load(&words[i]) == tag_of(r, key) && payload_load(&words[n - 1 - i]) == tag_of(r, key));
}

bool lane_join(struct lane *l, int fd)
{
    static const char group[] = "engine";
    uint32_t pid;
    bool member = l->number <= RANKS;
    l->s = &l->own;
    memset(l->s, 0, sizeof *l->s);
    memory_cleared(l->s, sizeof *l->s);
    CHECK(sc_segment_open(fd, true, l->s) == 0);
    int rc = sc_join(l->s, group, member ? sizeof group - 1 : 0, l->number < RANKS ? (int32_t)l->number : -1,
                     member ? RANKS : 1, &pid);
    if (rc == 0)
        return true;
    CHECK(rc == SC_E_LANE_IN_USE || rc == SC_E_NO_LANE);
    sc_segment_shut(l->s);
    l->s = NULL;
    return false;
}

static void forget(struct lane *l)
{
    memset(l->writes, 0, sizeof l->writes);
    memset(l->reads, 0, sizeof l->reads);
    memset(l->open, 0, sizeof l->open);
    l->own_region = 0;
    l->s = NULL;
}

void lane_die(struct lane *l, bool in_lock)
{
    struct sc_reaped r = {0};
    if (in_lock)
        CHECK(sc_begin(l->s, l->s->lock_timeout_us, &r) == 0);
    l->done[DONE_STOLEN] += r.lock;
    l->done[DONE_DIED]++;
    sc_segment_shut(l->s); /* closes lock_fd, which is what the others see */
    if (in_lock)
        pthread_mutex_unlock(&l->s->mutex); /* private, and held from sc_begin on */
    forget(l);
}

/* A free place in a list of refs, or a taken one. */
static int place(struct lane *l, const struct sc_ref *refs, uint32_t n, bool taken)
{
    uint32_t from = below(l, n);
    for (uint32_t i = 0; i < n; i++)
        if ((refs[(from + i) % n].nbytes != 0) == taken)
            return (int)((from + i) % n);
    return -1;
}

static void reserve(struct lane *l)
{
    int at = place(l, l->writes, WRITES, false);
    uint32_t key = below(l, KEYS), region = key < HOST_KEYS ? 0 : below(l, REGIONS + 1), layout = 0;
    uint64_t nbytes = region ? BLOCK * (1 + below(l, 2)) : (1 + (together(l, key) ? key : below(l, 6))) * BLOCK / 2;
    char name[KEY_BYTES];
    if (at < 0)
        return;
    for (uint32_t i = 0; i < WRITES; i++)
        if (l->writes[i].nbytes && l->write_keys[i] == key)
            return; /* by key it is one write a lane */
    struct sc_ref *ref = &l->writes[at];
    key_of(key, name);
    int64_t rc = sc_reserve_write(l->s, name, KEY_BYTES - 1, NULL, 1, &nbytes, &layout, false, region,
                                  !together(l, key) && below(l, 8) == 0, together(l, key) ? RANKS : 1, ref);
    CHECK(rc >= 0);
    if (rc == 0) {
        memset(ref, 0, sizeof *ref);
        return;
    }
    l->done[DONE_RESERVED]++;
    l->write_keys[at] = key;
    CHECK(ref->region == region);
    if (region)
        region_map(l, region);
    fill(l, ref, key, false);
}

/* Together: another may have aborted or died first, and then the key may even be gone, or a later write's. */
static void count(struct lane *l, uint32_t key, bool keep, int8_t status)
{
    bool lost = status == SC_NOT_OWNER || (together(l, key) && (status == SC_NOT_FOUND || status == SC_EXISTS)) ||
                (keep && key >= HOST_KEYS && status == SC_LOST);
    CHECK(lost || status == SC_OK || (keep && together(l, key) && status == SC_PART));
    l->done[lost ? DONE_LOST : !keep ? DONE_ABORTED : status == SC_PART ? DONE_PARTS : DONE_PUBLISHED]++;
}

static void finish(struct lane *l, bool keep)
{
    int at = place(l, l->writes, WRITES, true);
    int8_t status = SC_OK;
    if (at < 0)
        return;
    struct sc_ref *ref = &l->writes[at];
    uint32_t ranks = l->number <= RANKS ? below(l, RANKS + 1) : below(l, 2), key = l->write_keys[at];
    char name[KEY_BYTES];
    key_of(key, name);
    bool by_key = below(l, 2) == 0;
    if (keep)
        fill(l, ref, key, true);
    if (keep && by_key)
        CHECK(sc_finish_write(l->s, name, KEY_BYTES - 1, NULL, 1, ranks, &status) >= 0);
    else if (keep)
        CHECK(sc_publish(l->s, ref, 1, ranks, &status) >= 0);
    else if (by_key)
        CHECK(sc_abort_write(l->s, name, KEY_BYTES - 1, NULL, 1, &status) >= 0);
    else
        CHECK(sc_abort_refs(l->s, ref, 1, &status) >= 0);
    count(l, key, keep, status);
    if (ref->region && keep) {
        CHECK(status != SC_OK || words_of(l, ref)); /* what could not be opened was lost for good */
        l->done[DONE_PUBLISHED_IN_REGION] += status == SC_OK;
        l->done[DONE_PUBLISHED_LOST] += status == SC_LOST;
    }
    memset(ref, 0, sizeof *ref);
}

static void read_one(struct lane *l)
{
    int at = place(l, l->reads, READS, false);
    static const int flags[] = {0, 0, SC_PREFIX, SC_READ_FRESH, SC_READ_STORE};
    uint32_t key = below(l, KEYS);
    char name[KEY_BYTES];
    if (at < 0)
        return;
    struct sc_ref *ref = &l->reads[at];
    key_of(key, name);
    CHECK(sc_read(l->s, name, KEY_BYTES - 1, NULL, 1, flags[below(l, 5)], ref) >= 0);
    CHECK(key >= HOST_KEYS || ref->status != SC_LOST);
    if (ref->status != SC_OK) {
        l->done[DONE_READ_LOST] += ref->status == SC_LOST;
        memset(ref, 0, sizeof *ref);
        return;
    }
    l->done[DONE_READ]++;
    l->read_keys[at] = key;
    if (ref->region)
        l->done[DONE_READ_IN_REGION] += region_map(l, ref->region) != NULL;
    check_bytes(l, ref, key);
}

static void release_one(struct lane *l)
{
    int at = place(l, l->reads, READS, true);
    if (at < 0)
        return;
    char name[KEY_BYTES];
    key_of(l->read_keys[at], name);
    check_bytes(l, &l->reads[at], l->read_keys[at]);
    int8_t status;
    CHECK(sc_get_status(l->s, name, KEY_BYTES - 1, NULL, 1, &status) >= 0);
    CHECK(status == SC_OK || (l->reads[at].region && status == SC_LOST)); /* what one has a share of is there */
    CHECK(sc_release(l->s, &l->reads[at], 1) == 1); /* held shares end by release only */
    memset(&l->reads[at], 0, sizeof l->reads[at]);
}

static void shares_of_others(struct lane *l)
{
    uint32_t ranks = l->number <= RANKS ? 1 + below(l, RANKS) : 1;
    char name[KEY_BYTES];
    int8_t status;
    key_of(below(l, KEYS), name);
    switch (below(l, 5)) {
    case 0:
    case 1:
        CHECK(sc_reserve_read(l->s, name, KEY_BYTES - 1, NULL, 1, ranks, &status) >= 0);
        l->done[DONE_GRANTED] += status == SC_OK;
        break;
    case 2:
        CHECK(sc_cancel_read(l->s, name, KEY_BYTES - 1, NULL, 1, ranks, &status) >= 0);
        l->done[DONE_CANCELLED] += status == SC_OK;
        break;
    case 3:
        CHECK(sc_finish_read(l->s, name, KEY_BYTES - 1, NULL, 1, &status) >= 0);
        l->done[DONE_CLAIMED] += status == SC_OK;
        break;
    default:
        CHECK(sc_touch_keys(l->s, name, KEY_BYTES - 1, NULL, 1, &status) >= 0);
        CHECK(sc_lookup(l->s, name, KEY_BYTES - 1, NULL, 1) >= 0);
    }
}

static void make_room(struct lane *l)
{
    struct sc_reaped r;
    char name[KEY_BYTES];
    int8_t status;
    key_of(below(l, KEYS), name);
    switch (below(l, 8)) {
    case 0:
        l->done[DONE_EVICTED] += sc_evict(l->s, below(l, REGIONS + 1), BLOCK * (1 + below(l, 3))) > 0;
        break;
    case 1:
        CHECK(sc_clear(l->s) >= 0);
        break;
    case 2:
        CHECK(sc_reap(l->s, true, &r) == 0);
        l->done[DONE_REAPED] += r.lanes;
        l->done[DONE_STOLEN] += r.lock;
        break;
    default:
        CHECK(sc_delete(l->s, name, KEY_BYTES - 1, NULL, 1, below(l, 2), &status) >= 0);
        l->done[DONE_DELETED] += status == SC_OK;
    }
}

static void layout_of_one(struct lane *l)
{
    char spec[KEY_BYTES], found[SC_MAX_SPEC];
    uint32_t bytes;
    snprintf(spec, sizeof spec, "spec-%u", below(l, LAYOUTS));
    int64_t number = sc_layout_number(l->s, spec, (uint32_t)strlen(spec), 64);
    CHECK(number > 0 && sc_layout_spec(l->s, (uint32_t)number, found, &bytes) == 0);
    CHECK(bytes == strlen(spec) && memcmp(found, spec, bytes) == 0);
    l->done[DONE_LAYOUT]++;
}

static void look_at_all(struct lane *l)
{
    char report[2000];
    struct sc_info info;
    struct sc_lane_info member;
    struct sc_note note = {SC_HISTOGRAM, 0, 20};
    struct sc_census census;
    struct sc_object_info objects[SLOTS];
    struct sc_share_info shares[SLOTS];
    sc_get_info(l->s, &info);
    sc_census(l->s, &census);
    uint32_t n = sc_list_objects(l->s, objects, SLOTS);
    for (uint32_t i = 0; i < n; i++)
        CHECK(objects[i].key_bytes == KEY_BYTES - 1 && objects[i].standing <= SC_KEPT_DEAD);
    CHECK(sc_list_shares(l->s, l->s->lane, shares, SLOTS) <= SLOTS);
    sc_note(l->s, &note, 1);
    for (uint32_t lane = 0; lane < LANES; lane++)
        sc_get_lane(l->s, lane, &member);
    if (sc_verify(l->s, report, sizeof report) != 0) {
        fputs(report, stderr);
        CHECK(!"verify has findings");
    }
}

void lane_step(struct lane *l, int fd)
{
    uint32_t what = below(l, 1000);
    if (!l->s && !lane_join(l, fd))
        return;
    if (what < 240)
        reserve(l);
    else if (what < 420)
        finish(l, true);
    else if (what < 460)
        finish(l, false);
    else if (what < 660)
        read_one(l);
    else if (what < 790)
        release_one(l);
    else if (what < 880)
        shares_of_others(l);
    else if (what < 910)
        make_room(l);
    else if (what < 950)
        regions_step(l);
    else if (what < 960)
        layout_of_one(l);
    else if (what < 980)
        look_at_all(l);
    else if (what < 985)
        lane_close(l);
    else
        lane_die(l, what < 992);
}

void lane_close(struct lane *l)
{
    if (!l->s)
        return;
    while (place(l, l->writes, WRITES, true) >= 0)
        finish(l, below(l, 2));
    while (place(l, l->reads, READS, true) >= 0)
        release_one(l);
    regions_leave(l);
    CHECK(sc_close(l->s) == 0);
    forget(l);
}

void lanes_report(const struct lane *lanes, uint32_t n)
{
    for (uint32_t kind = 0; kind < OPERATIONS; kind++) {
        static const char *const names[] = {LANE_OPERATIONS(LANE_NAME)};
        uint64_t sum = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += lanes[i].done[kind];
        printf("%s=%llu\n", names[kind], (unsigned long long)sum);
    }
    struct sc_geometry g;
    CHECK(sc_plan(BLOCKS * BLOCK, BLOCK, SLOTS, LANES, REGIONS, &g) == 0);
    for (uint32_t c = 0; c < SC_COUNTER_COUNT; c++) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < LANES; i++)
            sum += sc_peek(&((struct sc_lane *)((uint8_t *)one_mapping() + g.lane_table) + i)->counters[c]);
        if (sum)
            printf("%s=%llu\n", sc_statistic_name(SC_COUNTER, c), (unsigned long long)sum);
    }
}

static void join_alone(struct lane *l, int fd)
{
    struct sc_reaped r;
    *l = (struct lane){.number = RANKS + 1, .random = 1};
    while (!lane_join(l, fd))
        ;
    CHECK(sc_reap(l->s, true, &r) == 0);
}

void lanes_settle(struct lane *lanes, uint32_t n, int fd)
{
    static struct lane last;
    struct sc_ref all = {0};
    uint64_t nbytes = BLOCKS * BLOCK;
    uint32_t layout = 0;
    struct timespec leases = {.tv_nsec = 20000000};
    join_alone(&last, fd);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t state = sc_load(&sc_slot(last.s, slot)->state);
        CHECK(sc_state_of(state) <= SC_READY);
        CHECK(sc_state_of(state) != SC_WRITING || !sc_forsaken(last.s, slot, state)); /* somebody will end it */
    }
    for (uint32_t i = 0; i < n; i++)
        lane_close(&lanes[i]);
    nanosleep(&leases, NULL);
    CHECK(sc_reserve_write(last.s, "all", 3, NULL, 1, &nbytes, &layout, false, 0, false, 1, &all) == 1);
    regions_settled(&last);
    lane_close(&last);
}
