/* arena.c - an arena as a whole: made, joined, closed, retired; its layout table; reaping on demand. */
#define _GNU_SOURCE
#include "arena.h"
#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int plan(const struct sc_config *c, struct sc_geometry *g)
{
    return sc_plan(c->capacity, c->block_size, c->slots, c->lanes, c->regions, g);
}

int sc_segment_bytes(const struct sc_config *c, uint64_t *segment_bytes, uint64_t *metadata_bytes)
{
    struct sc_geometry g;
    int rc = plan(c, &g);
    *segment_bytes = g.segment_bytes;
    *metadata_bytes = g.metadata;
    return rc;
}

static void fill_header(const struct sc_config *c, const struct sc_geometry *g, struct sc_header *h)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    h->magic = SC_MAGIC;
    h->format = SC_FORMAT;
    h->capacity = g->capacity;
    h->block_size = g->block_size;
    h->slots = g->slots;
    h->lanes = g->lanes;
    h->regions = g->regions;
    h->read_lease_us = c->read_lease_us;
    h->write_lease_us = c->write_lease_us;
    h->lock_timeout_us = c->lock_timeout_us;
    h->eviction_window_us = c->eviction_window_us;
    h->created_ns = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
    h->epoch_us = sc_now_us();
    if (getrandom(&h->seed, sizeof h->seed, GRND_NONBLOCK) != (ssize_t)sizeof h->seed)
        h->seed = h->created_ns;
    memcpy(h->boot_id, c->boot_id, sizeof h->boot_id);
    h->fingerprint_bytes = c->fingerprint_bytes;
    memcpy(h->fingerprint, c->fingerprint, c->fingerprint_bytes);
    h->checksum = sc_checksum(h);
    sc_poke32(&h->free_blocks, g->blocks);
    sc_poke32(&h->free_slots, g->slots);
}

int sc_format(int fd, const struct sc_config *c)
{
    struct sc_geometry g;
    struct sc_header h;
    if (plan(c, &g) < 0 || c->fingerprint_bytes > SC_MAX_FINGERPRINT)
        return SC_E_DAMAGED;
    memset(&h, 0, sizeof h);
    fill_header(c, &g, &h);
    if (ftruncate(fd, (off_t)g.segment_bytes) < 0)
        return SC_E_SYSTEM;
    while (fallocate(fd, 0, 0, (off_t)g.metadata) < 0)
        if (errno != EINTR)
            return SC_E_MEMORY;
    return pwrite(fd, &h, sizeof h, 0) == (ssize_t)sizeof h ? 0 : SC_E_SYSTEM;
}

void sc_formats(int fd, uint64_t *found, uint64_t *own)
{
    *own = SC_FORMAT;
    if (pread(fd, found, sizeof *found, offsetof(struct sc_header, format)) != (ssize_t)sizeof *found)
        *found = 0;
}

int sc_populate(struct sc_segment *s, char *payload, uint64_t block, uint64_t n)
{
    /* Unlike fallocate, this runs in parallel on one file; it fails where a store would raise SIGBUS. */
    char *at = payload + block * s->g.block_size;
    while (madvise(at, n * s->g.block_size, MADV_POPULATE_WRITE) < 0) {
        if (errno == EINVAL)
            return sc_back(s, block, n); /* Linux before 5.14 */
        if (errno != EINTR && errno != EAGAIN) {
            errno = ENOSPC;
            return SC_E_MEMORY;
        }
    }
    for (uint64_t b = block; b < block + n; b++)
        sc_or(sc_backed(s) + b / 64, UINT64_C(1) << (b % 64));
    return 0;
}

/* Under the arena lock: each rank of the group gets its lane, whether it has come or not. */
static int set_ranks_aside(struct sc_segment *s, const struct sc_member *m, struct sc_reaped *r)
{
    if (m->group_bytes == 0) {
        s->rank_lanes[0] = (uint16_t)s->lane;
        return 0;
    }
    for (uint32_t rank = 0; rank < m->world_size; rank++) {
        uint32_t lane = sc_lane_of_rank(s, m, rank);
        if (lane == SC_NO_SLOT) {
            lane = sc_lane_find(s, m);
            if (lane == SC_NO_SLOT)
                return SC_E_NO_LANE;
            /* In the door, so nobody takes it: its row is empty before anybody can grant to the rank. */
            if (!sc_lane_empty(s, lane))
                sc_reap_lane(s, lane, sc_load32(&sc_lane(s, lane)->incarnation), r);
            sc_lane_assign(s, lane, m, rank);
        }
        s->rank_lanes[rank] = (uint16_t)lane;
    }
    return 0;
}

/* Under the arena lock. A close is a death that leaves nothing: the lane reaps itself. */
static void vacate(struct sc_segment *s, struct sc_reaped *r)
{
    struct sc_lane *l = sc_lane(s, s->lane);
    sc_reap_lane(s, s->lane, s->incarnation, r);
    sc_poke32(&l->pid, 0);
    if (sc_load32(&l->role) != SC_ROLE_RANK)
        sc_store32(&l->role, SC_ROLE_NONE);
    sc_store32(&l->reaped, s->incarnation);
}

static int join_in_door(struct sc_segment *s, const struct sc_member *m, uint32_t *pid)
{
    struct sc_reaped r = {0};
    if (sc_load32(&sc_header(s)->retired))
        return SC_E_RETIRED;
    sc_lanes_remember(s);
    int rc = sc_group_check(s, m);
    int expected = rc < 0 ? rc : sc_lane_take(s, m, pid);
    if (expected < 0)
        return expected;
    rc = sc_begin(s, s->lock_timeout_us, &r);
    if (rc < 0)
        return rc; /* the caller closes the segment: the lane is dead, and reaped by whoever comes next */
    if (!expected)
        sc_reap_lane(s, s->lane, s->incarnation, &r);
    rc = set_ranks_aside(s, m, &r);
    if (rc < 0)
        vacate(s, &r);
    sc_end(s);
    return rc;
}

int sc_join(struct sc_segment *s, const char *group, uint32_t group_bytes, int32_t rank, uint32_t world_size,
            uint32_t *pid)
{
    struct sc_member m = {group, group_bytes, rank, world_size};
    if (group_bytes > SC_MAX_GROUP || world_size == 0 || world_size > SC_MAX_LANES)
        return SC_E_NO_LANE;
    s->group = sc_group_hash(group, group_bytes);
    sc_guard(s);
    int rc = sc_door_open(s, s->lock_timeout_us);
    if (rc < 0) {
        *pid = sc_peek32(&sc_header(s)->door_pid);
    } else {
        rc = join_in_door(s, &m, pid);
        sc_door_shut(s);
    }
    return (int)sc_unguard(s, rc);
}

static void leave_lane(struct sc_segment *s)
{
    struct sc_reaped r = {0};
    if (sc_peek32(&sc_lane(s, s->lane)->incarnation) != s->incarnation || sc_begin(s, s->lock_timeout_us, &r) < 0)
        return; /* others reap it */
    vacate(s, &r);
    sc_end(s);
}

int sc_close(struct sc_segment *s)
{
    struct timespec nap = {.tv_nsec = 100000};
    if (sc_load32(&s->closed))
        return 0;
    sc_store32(&s->closed, 1); /* before the look at users; sc_enter counts itself first and looks second */
    uint64_t deadline = sc_now_us() + 2 * s->lock_timeout_us;
    while (sc_load32(&s->users) > 0) {
        if (sc_now_us() > deadline) {
            sc_store32(&s->closed, 0);
            return SC_E_BUSY;
        }
        nanosleep(&nap, NULL);
    }
    sc_guard(s);
    if (s->lane != SC_NO_SLOT)
        leave_lane(s);
    sc_unguard(s, 0);
    sc_segment_shut(s);
    return 0;
}

static int retire(struct sc_segment *s, bool force, uint32_t *pid)
{
    int rc = sc_door_open(s, s->lock_timeout_us);
    if (rc < 0) {
        *pid = sc_peek32(&sc_header(s)->door_pid);
        return rc;
    }
    for (uint32_t lane = 0; lane < s->g.lanes && !force && !sc_load32(&sc_header(s)->retired); lane++) {
        if (lane == s->lane || !sc_lane_held(s, lane))
            continue;
        *pid = sc_peek32(&sc_lane(s, lane)->pid);
        sc_door_shut(s);
        return SC_E_BUSY;
    }
    sc_store32(&sc_header(s)->retired, 1);
    return 0;
}

int sc_retire(struct sc_segment *s, bool force, uint32_t *pid)
{
    sc_guard(s);
    return (int)sc_unguard(s, retire(s, force, pid));
}

void sc_door_close(struct sc_segment *s)
{
    sc_guard(s);
    sc_door_shut(s);
    sc_unguard(s, 0);
}

static bool something_to_reap(const struct sc_segment *s)
{
    uint32_t incarnation;
    bool alive = true;
    if (sc_lock_holder(s, &incarnation, &alive) != SC_NO_SLOT && !alive)
        return true;
    for (uint32_t lane = 0; lane < sc_lane_limit(s); lane++)
        if (sc_lane_state(s, lane) == SC_LANE_DEAD)
            return true;
    return sc_any_lost(s);
}

int sc_reap(struct sc_segment *s, bool wait, struct sc_reaped *r)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    *r = (struct sc_reaped){0};
    if ((something_to_reap(s) || (wait && sc_any_overdue(s))) && (rc = sc_begin(s, wait ? s->lock_timeout_us : 0, r)) == 0) {
        sc_reap_dead(s, r);
        sc_end(s);
    }
    return sc_leave(s, rc);
}

static uint32_t layouts_of(const struct sc_segment *s)
{
    uint32_t n = sc_load_acquire32(&sc_header(s)->layouts); /* pairs with the release in sc_layout_number */
    return n < SC_MAX_LAYOUTS ? n : SC_MAX_LAYOUTS;
}

static uint32_t find_layout(const struct sc_segment *s, const char *spec, uint32_t spec_bytes)
{
    uint32_t n = layouts_of(s);
    for (uint32_t i = 0; i < n; i++)
        if (sc_layout(s, i)->spec_bytes == spec_bytes && memcmp(sc_layout(s, i)->spec, spec, spec_bytes) == 0)
            return i + 1;
    return 0;
}

static int64_t add_layout(struct sc_segment *s, const char *spec, uint32_t spec_bytes, uint64_t nbytes)
{
    struct sc_reaped r = {0};
    int rc = sc_begin(s, s->lock_timeout_us, &r);
    if (rc < 0)
        return rc;
    int64_t number = find_layout(s, spec, spec_bytes);
    uint32_t n = layouts_of(s);
    if (number == 0 && n == SC_MAX_LAYOUTS)
        number = SC_E_LAYOUTS;
    if (number == 0) {
        sc_layout(s, n)->spec_bytes = spec_bytes;
        sc_layout(s, n)->nbytes = nbytes;
        memcpy(sc_layout(s, n)->spec, spec, spec_bytes);
        sc_store_release32(&sc_header(s)->layouts, n + 1);
        number = n + 1;
    }
    sc_end(s);
    return number;
}

int64_t sc_layout_number(struct sc_segment *s, const char *spec, uint32_t spec_bytes, uint64_t nbytes)
{
    if (spec_bytes == 0 || spec_bytes > SC_MAX_SPEC)
        return SC_E_LAYOUTS;
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    int64_t number = find_layout(s, spec, spec_bytes);
    if (number == 0)
        number = add_layout(s, spec, spec_bytes, nbytes);
    return sc_leave(s, number);
}

int sc_layout_spec(struct sc_segment *s, uint32_t number, char *spec, uint32_t *spec_bytes)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    uint32_t bytes = 0;
    if (number > 0 && number <= layouts_of(s))
        bytes = sc_layout(s, number - 1)->spec_bytes;
    if (bytes > 0 && bytes <= SC_MAX_SPEC)
        memcpy(spec, sc_layout(s, number - 1)->spec, bytes);
    else
        rc = SC_E_DAMAGED;
    *spec_bytes = bytes;
    return sc_leave(s, rc);
}
