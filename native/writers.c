#include "writers.h"

static enum sc_stage stage_of(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane)
{
    uint64_t word = sc_load(sc_share(s, lane, slot));
    return sc_generation(word) == sc_generation(state) ? sc_stage(word) : SC_STAGE_NONE;
}

/* Lanes whose part is of one of these stages; stages is a set of bits. */
static uint32_t count_parts(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t stages)
{
    uint32_t n = 0, limit = sc_lane_limit(s);
    for (uint32_t lane = 0; lane < limit; lane++)
        n += stages >> stage_of(s, slot, state, lane) & 1;
    return n;
}

enum { WRITING = 1 << SC_STAGE_WRITING, DONE = 1 << SC_STAGE_DONE };

bool sc_has_part(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane)
{
    if (!sc_collective(s, slot) || state & SC_SEALED)
        return sc_owner_of(state) == lane;
    return stage_of(s, slot, state, lane) != SC_STAGE_NONE;
}

bool sc_fills(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane)
{
    if (!sc_collective(s, slot) || state & SC_SEALED)
        return sc_owner_of(state) == lane;
    return stage_of(s, slot, state, lane) == SC_STAGE_WRITING;
}

/* Of several writers nobody fills the slot, and nobody has sealed it. */
static bool unfilled(const struct sc_segment *s, uint32_t slot, uint64_t state)
{
    return sc_collective(s, slot) && !(state & SC_SEALED) && !count_parts(s, slot, state, WRITING);
}

/* Nobody of the group that writes the slot lives, but perhaps the lane that is about to go (SC_NO_SLOT: none is). */
static bool group_gone(const struct sc_segment *s, uint32_t slot, uint32_t lane)
{
    uint32_t group = sc_peek32(&sc_slot(s, slot)->group);
    for (uint32_t i = 0; i < sc_lane_limit(s); i++)
        if (i != lane && sc_lane_group(s, i) == group && sc_lane_held(s, i))
            return false;
    return true;
}

bool sc_forsaken(const struct sc_segment *s, uint32_t slot, uint64_t state)
{
    return unfilled(s, slot, state) && (state & SC_DETACHED || !count_parts(s, slot, state, DONE));
}

static void set_stage(struct sc_segment *s, uint32_t slot, uint32_t lane, uint32_t generation, enum sc_stage stage)
{
    sc_word *w = sc_share(s, lane, slot);
    uint64_t old = sc_peek(w), new;
    do {
        bool same = sc_generation(old) == generation;
        new = sc_with_stage(same ? old : sc_share_word(generation, 0, 0), stage);
    } while (!sc_cas(w, &old, new));
}

void sc_first_part(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    set_stage(s, slot, s->lane, generation, SC_STAGE_WRITING);
}

enum sc_status sc_join_write(struct sc_segment *s, uint32_t slot, uint64_t state, const struct sc_terms *terms)
{
    const struct sc_slot *r = sc_slot(s, slot);
    if (!sc_collective(s, slot) || sc_peek32(&r->group) != s->group)
        return SC_IN_FLIGHT;
    if (sc_peek32(&r->writers) != terms->writers || sc_peek(&r->nbytes) != terms->nbytes ||
        sc_peek32(&r->about) >> 16 != terms->layout || sc_region_of(s, sc_peek32(&r->block)) != terms->region || !(state & SC_TEMPORARY) != !terms->temporary)
        return SC_UNLIKE;
    if (stage_of(s, slot, state, s->lane) != SC_STAGE_NONE || count_parts(s, slot, state, WRITING | DONE) >= terms->writers)
        return SC_IN_FLIGHT;
    sc_first_part(s, slot, sc_generation(state));
    return SC_OK;
}

/* Changes the state word of a write that is neither detached nor over. False: it is. */
static bool change(struct sc_segment *s, uint32_t slot, uint64_t *state, uint64_t (*f)(uint64_t state, uint32_t n), uint32_t n)
{
    uint32_t generation = sc_generation(*state);
    while (sc_generation(*state) == generation && sc_state_of(*state) == SC_WRITING && !(*state & (SC_DETACHED | SC_SEALED))) {
        uint64_t new = f(*state, n);
        if (sc_cas(&sc_slot(s, slot)->state, state, new)) {
            *state = new;
            return true;
        }
    }
    return false;
}

static uint64_t with_asked(uint64_t state, uint32_t ranks)
{
    return sc_asked(state) >= ranks ? state : (state & ~SC_ASKED) | (uint64_t)ranks << 6;
}

static uint64_t sealed(uint64_t state, uint32_t lane)
{
    return (state & ~(UINT64_C(0xffff) << 16)) | (uint64_t)lane << 16 | SC_SEALED;
}

enum sc_status sc_finish_part(struct sc_segment *s, uint32_t slot, uint64_t *state, uint32_t ranks)
{
    uint32_t generation = sc_generation(*state);
    if (!change(s, slot, state, with_asked, ranks))
        return SC_NOT_OWNER;
    /* Releases this lane's part of the payload; acquired in count_parts by who publishes, whose READY releases all parts.
     * Of two threads of this lane one wins. */
    sc_word *w = sc_share(s, s->lane, slot);
    uint64_t old = sc_load(w);
    do {
        if (sc_generation(old) != generation || sc_stage(old) != SC_STAGE_WRITING)
            return SC_NOT_OWNER;
    } while (!sc_cas(w, &old, sc_with_stage(old, SC_STAGE_DONE)));
    bool last = count_parts(s, slot, *state, DONE) >= sc_peek32(&sc_slot(s, slot)->writers);
    if (last && change(s, slot, state, sealed, s->lane))
        return SC_OK;
    /* Others are to come, or another one that found all DONE publishes; unless the key was lost meanwhile. */
    *state = sc_load(&sc_slot(s, slot)->state);
    return sc_generation(*state) == generation && *state & SC_DETACHED ? SC_NOT_OWNER : SC_PART;
}

bool sc_detach(struct sc_segment *s, uint32_t slot)
{
    sc_word *w = &sc_slot(s, slot)->state;
    sc_half *count = &sc_header(s)->detached;
    uint64_t state = sc_load(w);
    if (sc_state_of(state) == SC_WRITING && !(state & SC_DETACHED)) {
        /* Counted first, which the mark releases: who finds its write gone from the index looks for it if any counts. */
        sc_poke32(count, sc_peek32(count) + 1);
        while (sc_state_of(state) == SC_WRITING && !sc_cas(w, &state, state | SC_DETACHED))
            ;
        if (sc_state_of(state) == SC_WRITING)
            sc_index_remove(s, sc_peek(&sc_slot(s, slot)->hash), slot);
        else
            sc_poke32(count, sc_peek32(count) - 1); /* published at this moment */
    }
    if (sc_state_of(state) != SC_WRITING)
        return false;
    if (unfilled(s, slot, state))
        sc_abort(s, slot);
    return true;
}

/* Not by count: a thread of this lane may finish its part meanwhile. */
static bool others_fill(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane)
{
    for (uint32_t i = 0; i < sc_lane_limit(s); i++)
        if (i != lane && stage_of(s, slot, state, i) == SC_STAGE_WRITING)
            return true;
    return false;
}

bool sc_abandon(struct sc_segment *s, uint32_t slot, uint32_t lane)
{
    uint64_t state = sc_load(&sc_slot(s, slot)->state);
    if (sc_state_of(state) != SC_WRITING)
        return false;
    if (sc_fills(s, slot, state, lane)) {
        bool alone = !sc_collective(s, slot) || state & SC_SEALED;
        /* First the key, then the look at the others: who is done later finds the write detached. The own part last: who
         * dies before is still one that fills. */
        if (alone || (sc_detach(s, slot) && !others_fill(s, slot, state, lane)))
            return sc_abort(s, slot);
        set_stage(s, slot, lane, sc_generation(state), SC_STAGE_NONE);
        return false;
    }
    /* A part that is done stays. But who left it may have been about to find that it was the last, or that the write was
     * detached. */
    bool over = stage_of(s, slot, state, lane) == SC_STAGE_DONE && unfilled(s, slot, state) &&
                (state & SC_DETACHED || count_parts(s, slot, state, DONE) >= sc_peek32(&sc_slot(s, slot)->writers));
    return over && sc_abort(s, slot);
}

bool sc_overdue(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane, uint64_t now_us)
{
    return unfilled(s, slot, state) && (now_us > sc_peek(&sc_slot(s, slot)->reserved_us) + s->write_lease_us ||
                                        group_gone(s, slot, lane));
}
