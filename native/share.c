#include "share.h"

/* The word is of a later object than this generation's. */
static bool later(uint64_t word, uint32_t generation)
{
    return (uint32_t)word && (int32_t)(sc_generation(word) - generation) > 0;
}

bool sc_share_confirm(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w); /* after the share word was changed, both sequentially consistent */
    while (sc_generation(state) == generation) {
        if (sc_state_of(state) == SC_READY)
            return true;
        if (sc_state_of(state) != SC_EVICTING)
            return false;
        /* The evictor may have read our word too early: call its eviction off, whether it lives, is stopped or
         * is dead. If this fails it has gone one way or the other: look again. */
        if (sc_cas(w, &state, sc_with_state(state, SC_READY)))
            return true;
    }
    return false;
}

static uint32_t since_now(const struct sc_segment *s, uint64_t now_us) { return (uint32_t)((now_us - s->epoch_us) >> 14); }

uint64_t sc_share_held_us(const struct sc_segment *s, uint32_t lane, uint32_t slot, uint64_t now_us)
{
    int32_t passed = (int32_t)(since_now(s, now_us) - sc_peek32(sc_since(s, lane, slot)));
    return passed > 0 ? (uint64_t)passed << 14 : 0; /* below: taken after the clock was read */
}

enum sc_take sc_share_take(struct sc_segment *s, uint32_t slot, uint64_t state, bool fresh, uint64_t now_us)
{
    uint32_t generation = sc_generation(state);
    sc_word *w = sc_share(s, s->lane, slot);
    uint64_t old = sc_peek(w), new;
    bool claimed, same;
    do {
        if (later(old, generation))
            return SC_GONE;
        same = sc_generation(old) == generation;
        claimed = !fresh && same && sc_reserved(old) > 0;
        if (same && sc_held(old) == SC_HELD_MAX)
            return SC_SATURATED;
        new = claimed ? old - (UINT64_C(1) << 16) + 1 : same ? old + 1 : sc_share_word(generation, 0, 1);
    } while (!sc_cas(w, &old, new));
    if (!same || sc_held(old) == 0)
        sc_poke32(sc_since(s, s->lane, slot), since_now(s, now_us));
    if (sc_share_confirm(s, slot, generation))
        return claimed ? SC_CLAIMED : SC_FRESH;
    sc_share_release(s, slot, generation);
    return SC_GONE;
}

bool sc_share_release(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    sc_word *w = sc_share(s, s->lane, slot);
    uint64_t old = sc_peek(w);
    do {
        if (sc_generation(old) != generation || sc_held(old) == 0)
            return false;
    } while (!sc_cas(w, &old, old - 1));
    return true;
}

bool sc_share_grant(struct sc_segment *s, uint32_t lane, uint32_t slot, uint32_t generation)
{
    sc_word *w = sc_share(s, lane, slot);
    uint64_t old = sc_peek(w), new;
    do {
        if (later(old, generation))
            return false;
        bool same = sc_generation(old) == generation;
        if (same && sc_reserved(old) == SC_RESERVED_MAX)
            return false;
        new = same ? old + (UINT64_C(1) << 16) : sc_share_word(generation, 1, 0);
    } while (!sc_cas(w, &old, new));
    return true;
}

bool sc_share_ungrant(struct sc_segment *s, uint32_t lane, uint32_t slot, uint32_t generation)
{
    sc_word *w = sc_share(s, lane, slot);
    uint64_t old = sc_peek(w);
    do {
        if (sc_generation(old) != generation || sc_reserved(old) == 0)
            return false;
    } while (!sc_cas(w, &old, old - (UINT64_C(1) << 16)));
    return true;
}

bool sc_lease_over(const struct sc_segment *s, uint32_t slot)
{
    return sc_load(&sc_slot(s, slot)->lease_until_us) < sc_now_us();
}

/* The share word is read first and the lease second: a granter stores the lease and then its share. */
static bool stops(const struct sc_segment *s, uint32_t slot, uint64_t word, uint32_t generation, bool force)
{
    return sc_generation(word) == generation &&
           (sc_held(word) || (sc_reserved(word) && !force && !sc_lease_over(s, slot)));
}

bool sc_share_any(const struct sc_segment *s, uint32_t slot, uint32_t generation, bool force, uint64_t *expired)
{
    /* The limit is read after the mark: a lane that raised it later looks at the state word later still. */
    uint32_t limit = sc_lane_limit(s);
    for (uint32_t lane = 0; lane < limit; lane++) {
        uint64_t word = sc_load(sc_share(s, lane, slot));
        if (stops(s, slot, word, generation, force))
            return true;
        *expired += sc_generation(word) == generation ? sc_reserved(word) : 0;
    }
    return false;
}

bool sc_share_none(const struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    uint32_t limit = sc_lane_limit(s);
    for (uint32_t lane = 0; lane < limit; lane++) {
        uint64_t word = sc_load(sc_share(s, lane, slot));
        if (sc_generation(word) == generation && sc_has_shares(word))
            return false;
    }
    return true;
}
