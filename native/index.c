#include "index.h"

#define EMPTY UINT64_C(0)
#define TOMB UINT64_C(1)
#define TAG_MASK (~UINT64_C(0xffffff))

static uint64_t size_of(const struct sc_segment *s) { return UINT64_C(1) << s->g.index_bits; }
static uint64_t mask_of(const struct sc_segment *s) { return size_of(s) - 1; }
/* The tag takes the high bits, so the position takes the low ones. */
static uint64_t entry_for(uint64_t hash, uint32_t slot) { return (hash & TAG_MASK) | (slot + 2); }

uint32_t sc_index_slot(uint64_t entry) { return (uint32_t)(entry & 0xffffff) - 2; }
uint64_t sc_index_entry(const struct sc_segment *s, uint64_t at)
{
    uint64_t e = sc_peek(sc_index(s) + at);
    return e == TOMB ? EMPTY : e;
}

void sc_index_prefetch(const struct sc_segment *s, const struct sc_key *k)
{
    sc_prefetch(sc_index(s) + (k->hash & mask_of(s)));
}

void sc_index_prefetch_slot(const struct sc_segment *s, struct sc_key *k, enum sc_fetch fetch)
{
    enum { NEAR = 4 }; /* probes are short; what lies further is fetched when it is found */
    uint64_t at = k->hash & mask_of(s);
    for (int i = 0; i < NEAR; i++, at = (at + 1) & mask_of(s)) {
        uint64_t e = sc_peek(sc_index(s) + at);
        if (e == EMPTY)
            return;
        if (((e ^ k->hash) & TAG_MASK) || sc_index_slot(e) >= s->g.slots)
            continue;
        k->hint = sc_index_slot(e);
        sc_prefetch(sc_slot(s, k->hint));
        if (fetch >= SC_FETCH_SHARE)
            sc_prefetch(sc_share(s, s->lane, k->hint));
        if (fetch >= SC_FETCH_SCORE)
            sc_prefetch(sc_score(s, k->hint));
        if (fetch >= SC_FETCH_LEASE)
            sc_prefetch(&sc_slot(s, k->hint)->lease_until_us);
        return;
    }
}

enum match { NO, YES, CHANGED };

static enum match matches(const struct sc_segment *s, uint32_t slot, const struct sc_key *k, uint64_t *state)
{
    const struct sc_slot *r = sc_slot(s, slot);
    uint64_t before = sc_load_acquire(&r->state);
    if (sc_state_of(before) == SC_FREE || (before & SC_DETACHED))
        return NO;
    bool same = sc_key_is(r, k);
    /* Pairs with the release fence of whoever refills the slot: had a new key been read, so would be a new
     * generation. */
    sc_fence_acquire();
    uint64_t after = sc_peek(&r->state);
    if (sc_generation(after) != sc_generation(before))
        return CHANGED;
    *state = before;
    return same ? YES : NO;
}

/* Walks the probe of a key once. CHANGED: a slot changed hands on the way. */
static enum match probe(const struct sc_segment *s, const struct sc_key *k, uint32_t *slot, uint64_t *state)
{
    uint64_t at = k->hash & mask_of(s);
    for (uint64_t i = 0; i < size_of(s); i++, at = (at + 1) & mask_of(s)) {
        uint64_t e = sc_load_acquire(sc_index(s) + at);
        if (e == EMPTY)
            return NO;
        if (e == TOMB || ((e ^ k->hash) & TAG_MASK) || sc_index_slot(e) >= s->g.slots)
            continue;
        *slot = sc_index_slot(e);
        enum match m = matches(s, *slot, k, state);
        if (m != NO)
            return m;
    }
    /* At least half of a sound index is empty. */
    sc_poke32((sc_half *)&s->suspect, 1);
    return NO;
}

static uint32_t ask_the_truth(const struct sc_segment *s, const struct sc_key *k, uint64_t *state)
{
    for (uint32_t slot = 0; slot < s->g.slots; slot++)
        if (matches(s, slot, k, state) == YES)
            return slot;
    return SC_NO_SLOT;
}

uint32_t sc_index_find(const struct sc_segment *s, const struct sc_key *k, uint64_t *state)
{
    enum { TRIES = 16 };
    uint32_t slot;
    /* A hint is verified like any other candidate, and costs no second probe. */
    if (k->hint < s->g.slots && matches(s, k->hint, k, state) == YES)
        return k->hint;
    for (int i = 0; i < TRIES; i++) {
        uint64_t seq = sc_load_acquire(&sc_header(s)->index_seq);
        enum match m = probe(s, k, &slot, state);
        if (m == YES)
            return slot;
        if (m == CHANGED)
            continue;
        /* Pairs with the release fences in sc_index_rebuild: had an emptied entry been read, so would be an
         * odd or later sequence number. */
        sc_fence_acquire();
        if (!(seq & 1) && sc_peek(&sc_header(s)->index_seq) == seq)
            return SC_NO_SLOT;
    }
    return ask_the_truth(s, k, state);
}

void sc_index_insert(struct sc_segment *s, uint64_t hash, uint32_t slot)
{
    struct sc_header *h = sc_header(s);
    uint64_t at = hash & mask_of(s);
    for (uint64_t i = 0; i < size_of(s); i++, at = (at + 1) & mask_of(s)) {
        sc_word *w = sc_index(s) + at;
        uint64_t e = sc_peek(w);
        if (e != EMPTY && e != TOMB)
            continue;
        if (e == TOMB && sc_peek32(&h->index_tombs) > 0)
            sc_poke32(&h->index_tombs, sc_peek32(&h->index_tombs) - 1);
        sc_store_release(w, entry_for(hash, slot)); /* pairs with the acquire in probe */
        return;
    }
}

void sc_index_remove(struct sc_segment *s, uint64_t hash, uint32_t slot)
{
    struct sc_header *h = sc_header(s);
    uint64_t at = hash & mask_of(s);
    for (uint64_t i = 0; i < size_of(s); i++, at = (at + 1) & mask_of(s)) {
        uint64_t e = sc_peek(sc_index(s) + at);
        if (e == EMPTY)
            return;
        if (e != entry_for(hash, slot))
            continue;
        if (sc_peek(sc_index(s) + ((at + 1) & mask_of(s))) != EMPTY) {
            sc_store_release(sc_index(s) + at, TOMB);
            sc_poke32(&h->index_tombs, sc_peek32(&h->index_tombs) + 1);
            return;
        }
        /* No probe passes this entry: it and the tombstones before it become empty. */
        sc_store_release(sc_index(s) + at, EMPTY);
        at = (at - 1) & mask_of(s);
        for (uint64_t j = 0; j < size_of(s) && sc_peek(sc_index(s) + at) == TOMB; j++, at = (at - 1) & mask_of(s)) {
            sc_store_release(sc_index(s) + at, EMPTY);
            if (sc_peek32(&h->index_tombs) > 0)
                sc_poke32(&h->index_tombs, sc_peek32(&h->index_tombs) - 1);
        }
        return;
    }
}

bool sc_index_crowded(const struct sc_segment *s)
{
    return sc_peek32(&sc_header(s)->index_tombs) > size_of(s) / 4;
}

void sc_index_rebuild(struct sc_segment *s)
{
    struct sc_header *h = sc_header(s);
    uint64_t seq = sc_peek(&h->index_seq) | 1; /* odd already where a rebuilder died */
    sc_poke(&h->index_seq, seq);
    sc_fence_release(); /* odd before the first entry is emptied */
    for (uint64_t at = 0; at < size_of(s); at++)
        sc_poke(sc_index(s) + at, EMPTY);
    sc_poke32(&h->index_tombs, 0);
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t state = sc_load_acquire(&sc_slot(s, slot)->state);
        if (sc_state_of(state) != SC_FREE && !(state & SC_DETACHED))
            sc_index_insert(s, sc_peek(&sc_slot(s, slot)->hash), slot);
    }
    sc_fence_release(); /* whole before even */
    sc_store_release(&h->index_seq, seq + 1);
}
