#include "recover.h"

static void take_shares(struct sc_segment *s, uint32_t lane, struct sc_reaped *r)
{
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        sc_word *w = sc_share(s, lane, slot);
        if (sc_peek(w) == 0)
            continue;
        uint64_t old = sc_swap(w, 0), state = sc_load(&sc_slot(s, slot)->state);
        if (sc_generation(old) != sc_generation(state) || !(old & 0xffffffff))
            continue;
        r->shares += sc_held(old) + sc_reserved(old);
        if (state & SC_TEMPORARY && sc_state_of(state) == SC_READY)
            sc_remove(s, slot, false);
    }
}

static void take_writes(struct sc_segment *s, uint32_t lane, struct sc_reaped *r)
{
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (sc_state_of(state) != SC_WRITING || sc_owner_of(state) != lane)
            continue;
        sc_abort(s, slot, state);
        r->writes++;
    }
}

void sc_reap_lane(struct sc_segment *s, uint32_t lane, uint32_t incarnation, struct sc_reaped *r)
{
    struct sc_reaped before = *r;
    take_shares(s, lane, r);
    take_writes(s, lane, r);
    if (lane == s->lane)
        return; /* alive: what it leaves is yet to come */
    sc_store32(&sc_lane(s, lane)->reaped, incarnation);
    sc_tally(s, SC_reaped_shares, r->shares - before.shares);
    sc_tally(s, SC_reaped_writes, r->writes - before.writes);
}

bool sc_reap_if_dead(struct sc_segment *s, uint32_t lane, struct sc_reaped *r)
{
    /* The incarnation first, the lock second: a successor that comes between the two is not taken for reaped. It uses
     * no share before it has had the arena lock. */
    uint32_t incarnation = sc_load32(&sc_lane(s, lane)->incarnation);
    if (sc_lane_state(s, lane) != SC_LANE_DEAD)
        return false;
    sc_reap_lane(s, lane, incarnation, r);
    r->lanes++;
    return true;
}

bool sc_reap_dead(struct sc_segment *s, struct sc_reaped *r)
{
    bool any = false;
    for (uint32_t lane = 0; lane < sc_lane_limit(s); lane++)
        any = sc_reap_if_dead(s, lane, r) || any;
    return any;
}

static bool sound(const struct sc_segment *s, uint32_t slot, uint64_t state)
{
    const struct sc_slot *r = sc_slot(s, slot);
    struct sc_object o;
    struct sc_key k;
    uint32_t bytes = sc_peek32(&r->key_bytes);
    if (!sc_slot_describe(s, slot, state, &o) || bytes == 0 || bytes > SC_MAX_KEY || sc_owner_of(state) >= s->g.lanes)
        return false;
    sc_key_load(&k, (const void *)r->key, bytes, s->seed);
    if (k.hash != sc_peek(&r->hash))
        return false;
    for (uint64_t b = o.block; b < o.block + o.blocks; b++)
        if (sc_block_used(s, (uint32_t)b))
            return false;
    return true;
}

/* One slot's part in the maps. */
static void recount(struct sc_segment *s, uint32_t slot, const bool *dead, struct sc_reaped *r)
{
    struct sc_slot *t = sc_slot(s, slot);
    uint64_t state = sc_load(&t->state);
    if (sc_state_of(state) == SC_EVICTING && sc_cas(&t->state, &state, sc_with_state(state, SC_READY)))
        state = sc_with_state(state, SC_READY);
    if (sc_state_of(state) == SC_FREE)
        return;
    bool abandoned = sc_state_of(state) == SC_WRITING && sc_owner_of(state) < s->g.lanes && dead[sc_owner_of(state)];
    if (abandoned || sc_state_of(state) > SC_EVICTING || !sound(s, slot, state)) {
        /* A live writer may publish at this moment; then its object stays, and is looked at once more. */
        if (sc_cas(&t->state, &state, sc_freed(state))) {
            r->writes += abandoned;
            return;
        }
        if (!sound(s, slot, state))
            return;
    }
    sc_block_use(s, sc_peek32(&t->block), sc_peek32(&t->blocks), slot);
    sc_slot_use(s, slot);
    if (sc_state_of(state) == SC_WRITING && state & SC_DETACHED) {
        sc_half *detached = &sc_lane(s, sc_owner_of(state))->detached;
        sc_poke32(detached, sc_peek32(detached) + 1);
    }
}

void sc_recover(struct sc_segment *s, struct sc_reaped *r)
{
    bool dead[SC_MAX_LANES] = {false};
    for (uint32_t lane = 0; lane < s->g.lanes; lane++) {
        dead[lane] = !sc_lane_held(s, lane);
        sc_poke32(&sc_lane(s, lane)->detached, 0);
    }
    sc_maps_clear(s);
    uint64_t writes = r->writes;
    for (uint32_t slot = 0; slot < s->g.slots; slot++)
        recount(s, slot, dead, r);
    sc_index_rebuild(s);
    s->victim_count = s->victim_next = 0;
    sc_tally(s, SC_reaped_writes, r->writes - writes);
    sc_tally(s, SC_rebuilds, 1);
}

int sc_begin(struct sc_segment *s, uint64_t timeout_us, struct sc_reaped *r)
{
    int rc = sc_lock_take(s, timeout_us);
    if (rc < 0 || !s->stolen)
        return rc;
    sc_tally(s, SC_lock_steals, 1);
    sc_recover(s, r);
    r->lock = 1;
    s->stolen = false;
    return 0;
}

void sc_end(struct sc_segment *s) { sc_lock_give(s); }
