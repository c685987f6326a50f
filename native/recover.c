#include "recover.h"

/* Of several writers of a slot, one whose part is done leaves it done. */
static bool stays(uint64_t word, uint64_t state)
{
    return sc_generation(word) == sc_generation(state) && sc_state_of(state) == SC_WRITING && sc_stage(word) != SC_STAGE_NONE;
}

static void take_shares(struct sc_segment *s, uint32_t lane, struct sc_reaped *r)
{
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        sc_word *w = sc_share(s, lane, slot);
        uint64_t word = sc_peek(w);
        if (word == 0 || stays(word, sc_load(&sc_slot(s, slot)->state)))
            continue;
        uint64_t old = sc_swap(w, 0), state = sc_load(&sc_slot(s, slot)->state);
        if (sc_generation(old) != sc_generation(state) || !sc_has_shares(old))
            continue;
        r->shares += sc_held(old) + sc_reserved(old);
        if (state & SC_TEMPORARY && sc_state_of(state) == SC_READY)
            sc_remove(s, slot, false);
    }
}

static void take_writes(struct sc_segment *s, uint32_t lane, struct sc_reaped *r)
{
    uint64_t now = sc_now_us();
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        if (!sc_slot_used(s, slot))
            continue; /* without a look at it: most slots are free in an arena of few large objects */
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (sc_state_of(state) == SC_WRITING)
            r->writes += sc_abandon(s, slot, lane) || (sc_overdue(s, slot, state, lane, now) && sc_detach(s, slot));
    }
}

void sc_sweep_lost(struct sc_segment *s)
{
    if (!sc_any_lost(s))
        return;
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint32_t region = sc_region_of(s, sc_peek32(&sc_slot(s, slot)->block));
        if (sc_state_of(sc_load(&sc_slot(s, slot)->state)) == SC_READY && !sc_region_stays(s, region))
            sc_remove(s, slot, false);
    }
    for (uint32_t region = 1; region <= s->g.regions; region++)
        sc_region_settle(s, region);
}

void sc_reap_lane(struct sc_segment *s, uint32_t lane, uint32_t incarnation, struct sc_reaped *r)
{
    struct sc_reaped before = *r;
    take_writes(s, lane, r);
    take_shares(s, lane, r);
    sc_regions_lose(s, lane);
    sc_sweep_lost(s);
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

/* The next write at or after from that waits in vain for more writers; SC_NO_SLOT: none. */
static uint32_t next_overdue(const struct sc_segment *s, uint32_t from)
{
    uint64_t now = sc_now_us();
    for (uint32_t slot = from; slot < s->g.slots; slot++) {
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (sc_state_of(state) == SC_WRITING && sc_overdue(s, slot, state, SC_NO_SLOT, now))
            return slot;
    }
    return SC_NO_SLOT;
}

bool sc_any_overdue(const struct sc_segment *s) { return next_overdue(s, 0) != SC_NO_SLOT; }

static bool take_overdue(struct sc_segment *s, struct sc_reaped *r)
{
    bool any = false;
    for (uint32_t slot = 0; (slot = next_overdue(s, slot)) != SC_NO_SLOT; slot++, any = true)
        r->writes += sc_detach(s, slot);
    return any;
}

bool sc_reap_dead(struct sc_segment *s, struct sc_reaped *r)
{
    bool any = take_overdue(s, r);
    for (uint32_t lane = 0; lane < sc_lane_limit(s); lane++)
        any = sc_reap_if_dead(s, lane, r) || any;
    sc_sweep_lost(s);
    return any;
}

/* The slot agrees with itself, and with those before it. */
static bool sound(const struct sc_segment *s, uint32_t slot, uint64_t state, struct sc_object *o)
{
    const struct sc_slot *r = sc_slot(s, slot);
    struct sc_key k;
    uint32_t bytes = sc_key_bytes(sc_peek32(&r->about)), writers = sc_peek32(&r->writers);
    if (bytes == 0 || bytes > SC_MAX_KEY || (writers > 1) != sc_collective(s, slot) || sc_owner_of(state) >= s->g.lanes)
        return false;
    sc_key_load(&k, (const void *)r->key, bytes, s->seed);
    return k.hash == sc_peek(&r->hash) && sc_key_is(r, &k) && sc_slot_describe(s, slot, state, k.hash, o) &&
           sc_block_unowned(s, (uint32_t)o->block, o->blocks);
}

/* Whoever was writing it is gone. Of several writers the dead are found when they are reaped. */
static bool nobodys(const struct sc_segment *s, uint32_t slot, uint64_t state, const bool *dead)
{
    if (sc_collective(s, slot) && !(state & SC_SEALED))
        return sc_forsaken(s, slot, state);
    return sc_owner_of(state) < s->g.lanes && dead[sc_owner_of(state)];
}

/* One slot's part in the maps. True: it is a write that is detached. */
static bool recount(struct sc_segment *s, uint32_t slot, const bool *dead, struct sc_reaped *r)
{
    struct sc_slot *t = sc_slot(s, slot);
    uint64_t state = sc_load(&t->state);
    if (sc_state_of(state) == SC_EVICTING && sc_cas(&t->state, &state, sc_with_state(state, SC_READY)))
        state = sc_with_state(state, SC_READY);
    if (sc_state_of(state) == SC_FREE) {
        if (sc_peek(&t->seal)) /* who freed it died, or a stray store did */
            sc_store(&t->state, sc_freed_far(state));
        sc_poke(&t->seal, 0);
        return false;
    }
    bool abandoned = sc_state_of(state) == SC_WRITING && nobodys(s, slot, state, dead);
    struct sc_object o;
    bool whole = sc_state_of(state) <= SC_EVICTING && sound(s, slot, state, &o);
    if (abandoned || !whole) {
        /* A live writer may publish at this moment; then its object stays, and is looked at once more. */
        if (sc_cas(&t->state, &state, whole ? sc_freed(state) : sc_freed_far(state))) {
            sc_poke(&t->seal, 0);
            r->writes += abandoned;
            return false;
        }
        if (!sound(s, slot, state, &o))
            return false;
    }
    sc_block_use(s, (uint32_t)o.block, o.blocks, slot);
    sc_slot_use(s, slot);
    return sc_state_of(state) == SC_WRITING && state & SC_DETACHED;
}

/* Nobody can open what contradicts itself. */
static void lose_unsound(struct sc_segment *s)
{
    for (uint32_t region = 1; region <= s->g.regions; region++) {
        enum sc_region_kind kind = sc_kind_of(sc_load(&sc_region(s, region)->state));
        if (kind > SC_REGION_LOST || (kind != SC_REGION_NONE && !sc_region_sound(s, region)))
            sc_region_lose(s, region);
    }
}

void sc_recover(struct sc_segment *s, struct sc_reaped *r)
{
    bool dead[SC_MAX_LANES] = {false};
    for (uint32_t lane = 0; lane < s->g.lanes; lane++)
        dead[lane] = !sc_lane_held(s, lane);
    lose_unsound(s);
    sc_maps_clear(s);
    uint64_t writes = r->writes;
    uint32_t detached = 0;
    for (uint32_t slot = 0; slot < s->g.slots; slot++)
        detached += recount(s, slot, dead, r);
    sc_poke32(&sc_header(s)->detached, detached); /* never lower meanwhile than it is: see sc_detach */
    sc_index_rebuild(s);
    sc_victims_clear(s);
    sc_sweep_lost(s);
    sc_poke32(&s->suspect, 0);
    sc_tally(s, SC_reaped_writes, r->writes - writes);
    sc_tally(s, SC_rebuilds, 1);
}

int sc_begin(struct sc_segment *s, uint64_t timeout_us, struct sc_reaped *r)
{
    int rc = sc_lock_take(s, timeout_us);
    if (rc < 0)
        return rc;
    if (sc_load32(&sc_header(s)->lane_limit) < sc_peek32(&s->lane_limit))
        sc_lanes_remember(s); /* it only grows: a lie, and others may have come since */
    /* Who holds the lock is the only one that rebuilds: that somebody else is in the midst of it is a lie, or a death. */
    sc_tally(s, SC_lock_steals, s->stolen);
    if (s->stolen || sc_peek32(&s->suspect) || sc_peek(&sc_header(s)->index_seq) & 1)
        sc_recover(s, r);
    r->lock += s->stolen;
    s->stolen = false;
    return 0;
}

void sc_end(struct sc_segment *s) { sc_lock_give(s); }
