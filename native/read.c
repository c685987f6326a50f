/* read.c - everything about shares that takes no lock: lookup, read and release, grant and give back. */
#include "arena.h"
#include "guard.h"

void sc_keys_load(const struct sc_segment *s, const struct sc_keys *keys, uint32_t from, uint32_t n,
                  enum sc_fetch fetch, struct sc_key *out)
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t at, bytes;
        if (keys->width) {
            at = (uint64_t)(from + i) * keys->width;
            bytes = keys->width;
        } else {
            at = from + i ? keys->ends[from + i - 1] : 0;
            bytes = keys->ends[from + i] - at;
        }
        sc_key_load(&out[i], keys->data + at, (uint32_t)bytes, s->seed);
        sc_index_prefetch(s, &out[i]);
    }
    for (uint32_t i = 0; i < n; i++)
        sc_index_prefetch_slot(s, &out[i], fetch);
}

void sc_ref_fill(const struct sc_segment *s, const struct sc_object *o, bool temporary, struct sc_ref *ref)
{
    struct sc_extent e = sc_extent_of(s, o->region);
    *ref = (struct sc_ref){(o->block - e.first) * e.block_size, o->nbytes, o->slot, o->generation, (uint16_t)o->layout,
                           (uint16_t)o->region, temporary, SC_OK};
}

enum { TRIES = 64 }; /* an object that changes hands so often while one looks is a miss */

/* The status of a key without a share, whose object was seen to lie in device memory. */
static enum sc_status __attribute__((noinline)) look_far(const struct sc_segment *s, const struct sc_key *k, uint32_t *slot,
                                                         uint64_t *state)
{
    for (int i = 0; i < TRIES && *slot != SC_NO_SLOT; i++) {
        if (sc_state_of(*state) == SC_WRITING)
            return SC_IN_FLIGHT;
        if (!sc_lost(s, *slot))
            return SC_OK;
        sc_fence_acquire(); /* what was read of the slot is of this object, or it has gone meanwhile */
        if (sc_generation(sc_load(&sc_slot(s, *slot)->state)) == sc_generation(*state))
            return SC_LOST;
        *slot = sc_index_find(s, k, state);
    }
    return SC_NOT_FOUND;
}

/* The same of any key, and its slot. */
static enum sc_status look(const struct sc_segment *s, const struct sc_key *k, uint32_t *slot, uint64_t *state)
{
    *slot = sc_index_find(s, k, state);
    if (*slot == SC_NO_SLOT)
        return SC_NOT_FOUND;
    if (sc_state_of(*state) == SC_WRITING)
        return SC_IN_FLIGHT;
    return sc_peek32(&sc_slot(s, *slot)->block) < s->g.blocks ? SC_OK : look_far(s, k, slot, state);
}

/* Gives back a share that was reserved for this lane before its object was lost. */
static void give_up(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    sc_tally(s, SC_reserved_returned, sc_share_ungrant(s, s->lane, slot, generation));
    sc_drop(s, slot, generation);
}

int64_t sc_lookup(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct sc_key k[SC_CHUNK];
    uint32_t found = 0, slot;
    uint64_t state;
    for (uint32_t from = 0; from < n; from += SC_CHUNK) {
        uint32_t m = sc_chunk_of(from, n), i = 0;
        sc_keys_load(s, &keys, from, m, SC_FETCH_SLOT, k);
        while (i < m && look(s, &k[i], &slot, &state) == SC_OK)
            i++;
        found += i;
        if (i < m)
            break;
    }
    sc_tally(s, SC_lookup_hits, found);
    sc_tally(s, SC_lookup_misses, found < n);
    return sc_leave(s, found);
}

/* Runs f on every key; f gives the status. Slots that f reports are touched where touch is set. Inlined, so that each
 * caller has a loop of its own around its f. */
typedef enum sc_status (*sc_visit)(struct sc_segment *s, const struct sc_key *k, void *arg, uint32_t *slot);

static inline __attribute__((always_inline)) int64_t each_key(struct sc_segment *s, const struct sc_keys *keys,
                                                              int8_t *status, sc_visit f, void *arg, bool touch,
                                                              enum sc_fetch fetch)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_key k[SC_CHUNK];
    uint32_t slots[SC_CHUNK];
    uint64_t now = touch ? sc_now_us() : 0;
    int64_t ok = 0;
    for (uint32_t from = 0; from < keys->n; from += SC_CHUNK) {
        uint32_t m = sc_chunk_of(from, keys->n);
        sc_keys_load(s, keys, from, m, fetch, k);
        for (uint32_t i = 0; i < m; i++) {
            slots[i] = SC_NO_SLOT;
            status[from + i] = (int8_t)f(s, &k[i], arg, &slots[i]);
            ok += status[from + i] == SC_OK;
            if (status[from + i] != SC_OK)
                slots[i] = SC_NO_SLOT;
        }
        if (touch)
            sc_touch(s, slots, m, from, UINT32_MAX, &now);
    }
    return sc_leave(s, ok);
}

static enum sc_status visit_status(struct sc_segment *s, const struct sc_key *k, void *arg, uint32_t *slot)
{
    (void)arg;
    uint64_t state;
    return look(s, k, slot, &state);
}

int64_t sc_get_status(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    return each_key(s, &keys, status, visit_status, NULL, false, SC_FETCH_SLOT);
}

int64_t sc_touch_keys(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    return each_key(s, &keys, status, visit_status, NULL, true, SC_FETCH_SCORE);
}

/* Takes a share of the key's object and describes it. */
static enum sc_status take(struct sc_segment *s, const struct sc_key *k, int flags, uint64_t now_us, struct sc_ref *ref,
                           uint32_t *slot, uint32_t *claims)
{
    for (int i = 0; i < TRIES; i++) {
        uint64_t state;
        struct sc_object o;
        enum sc_status st = look(s, k, slot, &state);
        if (st == SC_LOST && !(flags & (SC_READ_FRESH | SC_READ_STORE)))
            give_up(s, *slot, sc_generation(state));
        if (st != SC_OK)
            return st;
        /* Before a share is taken: to give the last one back would free a temporary object. */
        if (flags & SC_READ_STORE && (state & SC_TEMPORARY || sc_peek32(&sc_slot(s, *slot)->block) >= s->g.blocks))
            return SC_NOT_FOUND;
        enum sc_take t = sc_share_take(s, *slot, state, flags & (SC_READ_FRESH | SC_READ_STORE), now_us);
        if (t == SC_SATURATED)
            return SC_NO_SHARE;
        if (t == SC_GONE)
            continue;
        *claims += t == SC_CLAIMED;
        if (sc_slot_describe(s, *slot, state, k->hash, &o)) {
            sc_ref_fill(s, &o, state & SC_TEMPORARY, ref);
            return SC_OK;
        }
        sc_share_release(s, *slot, sc_generation(state));
        sc_poke32(&s->suspect, 1);
        return SC_NOT_FOUND; /* the slot is damaged */
    }
    return SC_NOT_FOUND;
}

int64_t sc_read(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n, int flags,
                struct sc_ref *refs)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    if (!sc_whole(s))
        return sc_leave(s, SC_E_DAMAGED);
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct sc_key k[SC_CHUNK];
    uint32_t slots[SC_CHUNK], hits = 0, misses = 0, claims = 0;
    uint64_t start = sc_now_us(), now = start;
    bool go = true;
    for (uint32_t from = 0; from < n; from += SC_CHUNK) {
        uint32_t m = sc_chunk_of(from, n), requests = 0;
        if (go)
            sc_keys_load(s, &keys, from, m, SC_FETCH_SCORE, k);
        for (uint32_t i = 0; i < m; i++) {
            struct sc_ref *ref = &refs[from + i];
            slots[i] = SC_NO_SLOT;
            if (flags & SC_AGAIN && ref->status != SC_IN_FLIGHT)
                continue;
            ref->status = SC_IN_FLIGHT; /* what a prefix read leaves unread behind a gap */
            if (!go)
                continue;
            uint32_t before = claims;
            ref->status = (uint16_t)take(s, &k[i], flags, start, ref, &slots[i], &claims);
            hits += ref->status == SC_OK;
            /* Of a claim, and of who reads for those that were granted, it was counted with the grant. */
            requests |= (uint32_t)(claims == before && !(flags & SC_READ_FRESH)) << i;
            misses += ref->status != SC_OK && !(flags & SC_AGAIN);
            if (ref->status != SC_OK) {
                slots[i] = SC_NO_SLOT;
                go = !(flags & SC_PREFIX);
            }
        }
        if (!(flags & SC_READ_STORE))
            sc_touch(s, slots, m, from, requests, &now);
    }
    if (!(flags & SC_READ_STORE)) {
        sc_tally(s, SC_read_hits, hits);
        sc_tally(s, SC_read_misses, misses);
        sc_tally(s, SC_claims, claims);
    }
    return sc_leave(s, hits);
}

void sc_drop(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    enum { BRIEFLY_US = 20000 }; /* a release must not wait for a holder that is stopped */
    struct sc_reaped r = {0};
    uint64_t wait_us = s->lock_timeout_us < BRIEFLY_US ? s->lock_timeout_us : BRIEFLY_US;
    if (!sc_share_none(s, slot, generation) || sc_begin(s, wait_us, &r) < 0)
        return;
    uint32_t region = sc_region_of(s, sc_peek32(&sc_slot(s, slot)->block));
    if (sc_generation(sc_load(&sc_slot(s, slot)->state)) == generation && sc_remove(s, slot, false) &&
        !sc_region_stays(s, region))
        sc_region_settle(s, region);
    sc_end(s);
}

int64_t sc_release(struct sc_segment *s, const struct sc_ref *refs, uint32_t n)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    int64_t released = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (refs[i].status != SC_OK || refs[i].nbytes == 0 || refs[i].slot >= s->g.slots)
            continue;
        released += sc_share_release(s, refs[i].slot, refs[i].generation);
        if (refs[i].temporary || !sc_region_stays(s, refs[i].region))
            sc_drop(s, refs[i].slot, refs[i].generation);
    }
    sc_tally(s, SC_releases, (uint64_t)released);
    return sc_leave(s, released);
}

void sc_ungrant(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t ranks)
{
    for (uint32_t i = 0; i < ranks; i++)
        sc_share_ungrant(s, s->rank_lanes[i], slot, generation);
}

uint64_t sc_lease_end(const struct sc_segment *s)
{
    uint64_t end = sc_now_us() + s->read_lease_us, step = s->read_lease_us / 1024 + 1;
    return end + step - end % step;
}

bool sc_grant(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t ranks, uint64_t lease_until_us)
{
    /* Before the shares, whose compare-and-swaps release it: an evictor that sees one sees its lease. Never shorter: who
     * was stopped since it read the clock must not end the shares of others. */
    sc_raise(&sc_slot(s, slot)->lease_until_us, lease_until_us);
    for (uint32_t i = 0; i < ranks; i++)
        if (!sc_share_grant(s, s->rank_lanes[i], slot, generation)) {
            sc_ungrant(s, slot, generation, i);
            return false;
        }
    return true;
}

struct grants { uint32_t ranks; uint64_t lease_until_us; };

static enum sc_status visit_grant(struct sc_segment *s, const struct sc_key *k, void *arg, uint32_t *slot)
{
    const struct grants *g = arg;
    for (int i = 0; i < TRIES; i++) {
        uint64_t state;
        enum sc_status st = look(s, k, slot, &state);
        if (st != SC_OK)
            return st;
        uint32_t generation = sc_generation(state);
        bool granted = sc_grant(s, *slot, generation, g->ranks, g->lease_until_us);
        bool there = sc_share_confirm(s, *slot, generation);
        if (granted && there)
            return SC_OK;
        if (granted)
            sc_ungrant(s, *slot, generation, g->ranks);
        else if (there)
            return SC_NO_SHARE; /* a rank has 65,535 already */
    }
    return SC_NOT_FOUND;
}

int64_t sc_reserve_read(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n,
                        uint32_t ranks, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct grants g = {ranks, sc_lease_end(s)};
    int64_t ok = each_key(s, &keys, status, visit_grant, &g, true, SC_FETCH_LEASE);
    if (ok > 0)
        sc_tally(s, SC_grants, (uint64_t)ok * ranks);
    return ok;
}

/* Takes one unclaimed share back from each of some lanes; NO_SHARE if none had any. */
struct lanes { const uint16_t *lanes; uint32_t n; uint64_t taken; };

static enum sc_status visit_ungrant(struct sc_segment *s, const struct sc_key *k, void *arg, uint32_t *slot)
{
    struct lanes *from = arg;
    uint64_t state, taken = 0;
    enum sc_status st = look(s, k, slot, &state);
    if (st != SC_OK && st != SC_LOST) /* shares granted before their object is published come with it, and not before */
        return st == SC_NOT_FOUND ? st : SC_NO_SHARE;
    for (uint32_t i = 0; i < from->n; i++)
        taken += sc_share_ungrant(s, from->lanes[i], *slot, sc_generation(state));
    if (taken && (state & SC_TEMPORARY || st == SC_LOST))
        sc_drop(s, *slot, sc_generation(state));
    from->taken += taken;
    return taken ? SC_OK : SC_NO_SHARE;
}

static int64_t give_back(struct sc_segment *s, const struct sc_keys *keys, struct lanes *from, int8_t *status)
{
    int64_t ok = each_key(s, keys, status, visit_ungrant, from, false, SC_FETCH_SHARE);
    if (ok > 0)
        sc_tally(s, SC_reserved_returned, from->taken);
    return ok;
}

int64_t sc_finish_read(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    uint16_t own = (uint16_t)s->lane;
    struct lanes from = {&own, 1, 0};
    return give_back(s, &keys, &from, status);
}

int64_t sc_cancel_read(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n,
                       uint32_t ranks, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct lanes from = {s->rank_lanes, ranks, 0};
    return give_back(s, &keys, &from, status);
}
