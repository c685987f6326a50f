#include "evict.h"

#include <stdlib.h>

enum { RECENCY_US = 4000, FUTURE_US = 1000000, FEW = 16, SLOTS_A_VICTIM = 128 };
#define PINNED UINT64_MAX

/* What may go from one region. rank: its place in the order, of its score. */
struct sc_victim { uint64_t rank; uint32_t slot, generation; };
struct sc_victims { uint32_t count, next; uint64_t listed_us; struct sc_victim list[]; };

static uint32_t most_victims(const struct sc_segment *s)
{
    return s->g.slots > FEW * SLOTS_A_VICTIM ? s->g.slots / SLOTS_A_VICTIM : FEW;
}

/* Free slots have as a rule no score, and come last: a scan that has found enough does not look at their state. So does an
 * object whose score was wiped. */
static uint64_t rank_of(const struct sc_segment *s, uint32_t slot) { return sc_peek(sc_score(s, slot)) - 1; }

/* EVICTING -> READY, unless a reader was first. */
static void unmark(struct sc_segment *s, uint32_t slot)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w);
    if (sc_state_of(state) == SC_EVICTING)
        sc_cas(w, &state, sc_with_state(state, SC_READY));
}

/* READY -> EVICTING if nobody has a share; back to READY if somebody has. */
static bool mark(struct sc_segment *s, uint32_t slot, bool force)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w), expired = 0;
    if (sc_state_of(state) != SC_READY || !sc_cas(w, &state, sc_with_state(state, SC_EVICTING)))
        return false;
    if (!sc_share_any(s, slot, sc_generation(state), force, &expired)) {
        sc_tally(s, SC_leases_revoked, force ? 0 : expired);
        return true;
    }
    unmark(s, slot);
    return false;
}

/* What the slot of an object says of itself. False: it contradicts itself, and the next hold of the lock rebuilds. */
static bool describe(struct sc_segment *s, uint32_t slot, uint64_t state, struct sc_object *o)
{
    bool sound = sc_slot_describe(s, slot, state, sc_peek(&sc_slot(s, slot)->hash), o);
    if (!sound)
        sc_poke32(&s->suspect, 1);
    return sound;
}

/* What is derived from a slot that has just become FREE. A death in here is repaired by the next lock holder. */
static void forget(struct sc_segment *s, const struct sc_object *o, bool indexed)
{
    sc_poke(&sc_slot(s, o->slot)->seal, 0);
    sc_poke(sc_score(s, o->slot), 0);
    if (indexed)
        sc_index_remove(s, o->hash, o->slot);
    sc_block_free(s, (uint32_t)o->block, o->blocks);
    sc_slot_free(s, o->slot);
}

static void note_eviction(struct sc_segment *s, const struct sc_object *o)
{
    if (s->eviction_window_us)
        sc_ghost_remember(s, o->hash, sc_score_count(sc_peek(sc_score(s, o->slot))));
    sc_tally(s, SC_evictions, 1);
    sc_tally(s, SC_evicted_bytes, o->nbytes);
}

/* EVICTING -> FREE, the cache's choice or a caller's. False: a reader called it off. */
static bool finish(struct sc_segment *s, uint32_t slot, bool evicted, struct sc_object *o)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w);
    if (sc_state_of(state) != SC_EVICTING || !describe(s, slot, state, o) || !sc_cas(w, &state, sc_freed(state)))
        return false;
    if (evicted)
        note_eviction(s, o);
    forget(s, o, true);
    return true;
}

static bool evict(struct sc_segment *s, uint32_t slot, struct sc_object *o)
{
    return mark(s, slot, false) && finish(s, slot, true, o);
}

bool sc_remove(struct sc_segment *s, uint32_t slot, bool force)
{
    struct sc_object o;
    return mark(s, slot, force) && finish(s, slot, false, &o);
}

bool sc_abort(struct sc_segment *s, uint32_t slot)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w);
    struct sc_object o;
    do {
        if (sc_state_of(state) != SC_WRITING || !describe(s, slot, state, &o))
            return false;
    } while (!sc_cas(w, &state, sc_freed(state)));
    sc_half *detached = &sc_header(s)->detached;
    if (state & SC_DETACHED)
        sc_poke32(detached, sc_peek32(detached) - (sc_peek32(detached) > 0));
    forget(s, &o, !(state & SC_DETACHED));
    return true;
}

/* A share that would stop an eviction now. */
static bool pinned(const struct sc_segment *s, uint32_t slot, uint64_t state)
{
    uint64_t expired = 0;
    return sc_share_any(s, slot, sc_generation(state), false, &expired);
}

/* Nobody has a share that keeps it, and it is sound. */
static bool may_go(struct sc_segment *s, uint32_t slot, uint64_t state)
{
    struct sc_object o;
    return !pinned(s, slot, state) && describe(s, slot, state, &o);
}

/* The smallest scores, in a heap with the largest on top, then sorted: one scan for many evictions. */
static void sift_down(struct sc_victim *v, uint32_t n, uint32_t i)
{
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && v[child + 1].rank > v[child].rank)
            child++;
        if (v[i].rank >= v[child].rank)
            return;
        struct sc_victim t = v[i];
        v[i] = v[child];
        v[child] = t;
    }
}

static void sift_up(struct sc_victim *v, uint32_t i)
{
    for (uint32_t up; i && v[up = (i - 1) / 2].rank < v[i].rank; i = up) {
        struct sc_victim t = v[i];
        v[i] = v[up];
        v[up] = t;
    }
}

/* careful: only of what may go now, which takes a look at the shares of each. */
static void find_victims(struct sc_segment *s, uint32_t region, bool careful, struct sc_victims *victims)
{
    struct sc_victim *v = victims->list;
    uint32_t n = 0, most = most_victims(s);
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t rank = rank_of(s, slot);
        if (n == most && rank >= v[0].rank)
            continue;
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (sc_state_of(state) != SC_READY || sc_region_of(s, sc_peek32(&sc_slot(s, slot)->block)) != region ||
            (careful && !may_go(s, slot, state)))
            continue;
        struct sc_victim it = {rank, slot, sc_generation(state)};
        if (n < most) {
            v[n] = it;
            sift_up(v, n++);
        } else {
            v[0] = it;
            sift_down(v, n, 0);
        }
    }
    for (uint32_t end = n; end > 1;) {
        struct sc_victim t = v[0];
        v[0] = v[--end];
        v[end] = t;
        sift_down(v, end, 0);
    }
    victims->count = n;
    victims->next = 0;
}

static bool still_a_victim(struct sc_segment *s, const struct sc_victim *v)
{
    uint64_t state = sc_load(&sc_slot(s, v->slot)->state);
    return sc_state_of(state) == SC_READY && sc_generation(state) == v->generation &&
           rank_of(s, v->slot) == v->rank && may_go(s, v->slot, state);
}

/* NULL: this process has no memory for a list. */
static struct sc_victims *victims_of(struct sc_segment *s, uint32_t region)
{
    if (!s->victims[region])
        s->victims[region] = calloc(1, sizeof(struct sc_victims) + most_victims(s) * sizeof(struct sc_victim));
    return s->victims[region];
}

/* The evictable object of a region with the smallest score; it stays first in line until it is gone. */
static uint32_t first_victim(struct sc_segment *s, uint32_t region)
{
    struct sc_victims *victims = victims_of(s, region);
    for (int scans = 0; victims && scans < 3; scans++) {
        while (victims->next < victims->count) {
            const struct sc_victim *v = &victims->list[victims->next];
            if (still_a_victim(s, v))
                return v->slot;
            victims->next++;
        }
        if (scans < 2) /* careful where all that were found have shares */
            find_victims(s, region, scans == 1, victims);
    }
    return SC_NO_SLOT;
}

static void forget_victims(struct sc_victims *victims, uint64_t now_us)
{
    victims->count = victims->next = 0;
    victims->listed_us = now_us;
}

void sc_refresh_victims(struct sc_segment *s)
{
    uint64_t now = sc_now_us();
    for (uint32_t region = 0; region <= s->g.regions; region++)
        if (s->victims[region] && now - s->victims[region]->listed_us >= s->g.slots) /* a scan takes some ns a slot */
            forget_victims(s->victims[region], now);
}

void sc_victims_clear(struct sc_segment *s)
{
    for (uint32_t region = 0; region <= s->g.regions; region++)
        if (s->victims[region])
            forget_victims(s->victims[region], 0);
}

uint64_t sc_evict_one(struct sc_segment *s, uint32_t region)
{
    for (uint32_t slot; (slot = first_victim(s, region)) != SC_NO_SLOT;) {
        struct sc_object o;
        s->victims[region]->next++;
        if (!evict(s, slot, &o))
            continue;
        return o.blocks * sc_extent_of(s, region).block_size;
    }
    return 0;
}

/* The general search, in one region. Each block costs what its object is worth; a run costs the most that one of its
 * objects is worth, and the cheapest run goes. costs[i] is of block first + i. */
static bool price(struct sc_segment *s, const struct sc_extent *e)
{
    if (!s->costs)
        s->costs = malloc((sizeof(uint64_t) + sizeof(uint32_t)) * (size_t)s->g.blocks);
    if (!s->costs)
        return false;
    memset(s->costs, 0, sizeof(uint64_t) * (size_t)e->blocks);
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        struct sc_object o;
        if (sc_state_of(state) == SC_FREE || !describe(s, slot, state, &o) || sc_first_block(s, o.region) != e->first)
            continue;
        bool stays = sc_state_of(state) != SC_READY || pinned(s, slot, state);
        uint64_t cost = stays ? PINNED : rank_of(s, slot) / 2 + 1; /* neither 0 nor PINNED */
        for (uint64_t b = o.block; b < o.block + o.blocks; b++)
            s->costs[b - e->first] = cost;
    }
    return true;
}

/* The run of n whose dearest block is cheapest: a sliding maximum over a queue of falling costs. */
static uint32_t cheapest_run(struct sc_segment *s, const struct sc_extent *e, uint32_t n)
{
    uint32_t *queue = (uint32_t *)(s->costs + s->g.blocks), head = 0, tail = 0, best = SC_NO_SLOT;
    uint64_t best_cost = PINNED;
    for (uint32_t b = 0; b < e->blocks; b++) {
        while (tail > head && s->costs[queue[tail - 1]] <= s->costs[b])
            tail--;
        queue[tail++] = b;
        if (queue[head] + n <= b)
            head++;
        if (b + 1 >= n && s->costs[queue[head]] < best_cost) {
            best_cost = s->costs[queue[head]];
            best = (uint32_t)e->first + b + 1 - n;
        }
    }
    return best;
}

/* Calls f for each object in a run; stops at the first false and gives the block where that was. */
static uint32_t each_object(struct sc_segment *s, uint32_t from, uint32_t end, bool (*f)(struct sc_segment *, uint32_t))
{
    uint32_t last = SC_NO_SLOT;
    for (uint32_t b = from; b < end; b++) {
        uint32_t slot = sc_block_owner(s, b);
        if (slot != last && slot < s->g.slots && !f(s, slot))
            return b;
        last = slot;
    }
    return end;
}

static bool mark_one(struct sc_segment *s, uint32_t slot) { return mark(s, slot, false); }
static bool unmark_one(struct sc_segment *s, uint32_t slot)
{
    unmark(s, slot);
    return true;
}
static bool finish_one(struct sc_segment *s, uint32_t slot)
{
    struct sc_object o;
    finish(s, slot, true, &o);
    return true;
}

static void pin_object(struct sc_segment *s, const struct sc_extent *e, uint32_t block)
{
    uint32_t slot = sc_block_owner(s, block);
    for (uint64_t b = block; b < e->first + e->blocks && sc_block_owner(s, (uint32_t)b) == slot; b++)
        s->costs[b - e->first] = PINNED;
    for (uint64_t b = block; b-- > e->first && sc_block_owner(s, (uint32_t)b) == slot;)
        s->costs[b - e->first] = PINNED;
}

/* All objects of the run go, or none: first all are marked, then all freed. */
static bool clear_run(struct sc_segment *s, const struct sc_extent *e, uint32_t at, uint32_t n)
{
    uint32_t upto = each_object(s, at, at + n, mark_one);
    if (upto < at + n) {
        each_object(s, at, upto, unmark_one);
        pin_object(s, e, upto); /* somebody took a share since it was priced */
        return false;
    }
    each_object(s, at, at + n, finish_one);
    return true;
}

static bool run_is_free(const struct sc_segment *s, uint32_t at, uint32_t n)
{
    for (uint32_t b = at; b < at + n; b++)
        if (sc_block_used(s, b))
            return false;
    return true;
}

static uint32_t search_run(struct sc_segment *s, const struct sc_extent *e, uint32_t n)
{
    enum { TRIES = 64 };
    if (!price(s, e))
        return SC_NO_SLOT;
    for (int i = 0; i < TRIES; i++) {
        uint32_t at = cheapest_run(s, e, n);
        if (at == SC_NO_SLOT)
            return SC_NO_SLOT;
        if (clear_run(s, e, at, n) && run_is_free(s, at, n))
            return at;
    }
    return SC_NO_SLOT;
}

uint32_t sc_make_run(struct sc_segment *s, uint32_t region, uint32_t n)
{
    struct sc_extent e = sc_extent_of(s, region);
    if (n > e.blocks)
        return SC_NO_SLOT;
    uint32_t at = sc_block_find(s, region, n);
    if (at != SC_NO_SLOT)
        return at;
    /* The smallest score of all, if it and the free blocks beside it suffice, is the cheapest run there is. */
    for (uint32_t slot; (slot = first_victim(s, region)) != SC_NO_SLOT;) {
        struct sc_object o;
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (!describe(s, slot, state, &o)) {
            s->victims[region]->next++;
            continue;
        }
        at = sc_block_grow(s, (uint32_t)o.block, o.blocks, n);
        if (at == SC_NO_SLOT)
            return search_run(s, &e, n);
        s->victims[region]->next++;
        if (!evict(s, slot, &o))
            continue;
        return at;
    }
    return SC_NO_SLOT;
}

uint32_t sc_make_slot(struct sc_segment *s, uint32_t region)
{
    uint32_t slot = sc_slot_find(s);
    if (slot != SC_NO_SLOT)
        return slot;
    uint64_t evicted = sc_evict_one(s, region);
    for (uint32_t other = 0; other <= s->g.regions && evicted == 0; other++)
        evicted = other == region ? 0 : sc_evict_one(s, other);
    return evicted ? sc_slot_find(s) : SC_NO_SLOT;
}

/* What a request makes of a count. */
static uint32_t count_on(uint32_t count, uint32_t requests, uint32_t i)
{
    return count + (count < SC_COUNT_MAX && requests >> i & 1);
}

/* The oldest time among some slots, and whether one of them was last touched RECENCY_US ago, or has a request to count. */
static bool is_stale(const struct sc_segment *s, const uint32_t *slots, uint32_t n, uint32_t requests, uint64_t now_us,
                     uint64_t *oldest_us)
{
    bool stale = false;
    for (uint32_t i = 0; i < n; i++) {
        if (slots[i] == SC_NO_SLOT)
            continue;
        uint64_t score = sc_peek(sc_score(s, slots[i])), time = sc_score_time(s, score);
        uint32_t count = sc_score_count(score);
        /* One of a time to come is damaged, or it was lent an older time than others know. */
        stale = stale || time + RECENCY_US < now_us || time > now_us + FUTURE_US || count_on(count, requests, i) != count;
        *oldest_us = time < *oldest_us ? time : *oldest_us;
    }
    return stale;
}

void sc_touch(struct sc_segment *s, const uint32_t *slots, uint32_t n, uint32_t first_depth, uint32_t requests, uint64_t *time_us)
{
    /* Scores are plain words that readers store without a lock. So that a hot object's word stays in every reader's
     * cache, keys that are touched together are written together, and only where one of them needs it. What is not
     * written lends its time to the keys behind it, so that of one chain the later never look the younger. */
    uint64_t oldest = *time_us;
    if (!is_stale(s, slots, n, requests, *time_us, &oldest)) {
        *time_us = oldest;
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (slots[i] == SC_NO_SLOT)
            continue;
        sc_word *w = sc_score(s, slots[i]);
        uint64_t score = sc_peek(w);
        uint32_t known = sc_score_depth(score), depth = first_depth + i, count = count_on(sc_score_count(score), requests, i);
        sc_poke(w, sc_score_make(s, *time_us, depth > known ? depth : known, count));
    }
}
