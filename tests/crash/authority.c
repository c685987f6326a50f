#include "authority.h"

/* What the stepped process was and is: its lane and incarnation, as the segment had them before the instruction. */
struct self {
    const struct stepper *t;
    struct facts before;
    uint32_t lane;               /* LANES: it has none */
    bool locked, door;           /* it held the arena lock, the door */
    bool stealing;               /* the lock was a dead holder's */
};

static uint64_t word_at(const uint8_t *base, uint64_t at)
{
    uint64_t word;
    memcpy(&word, base + at, sizeof word);
    return word;
}

static uint32_t half_at(const uint8_t *base, uint64_t at)
{
    uint32_t half;
    memcpy(&half, base + at, sizeof half);
    return half;
}

static const uint8_t *lane_of(const struct stepper *t, uint32_t lane)
{
    return t->copy + t->w->g.lane_table + lane * sizeof(struct sc_lane);
}

static bool others_lane(const struct stepper *t, uint32_t lane)
{
    for (int i = 0; i < SEATS; i++)
        if (i != S && t->w->who[i].alive && t->w->who[i].lane == lane)
            return true;
    return false;
}

/* A joiner's lane is the one whose byte it has locked. */
static uint32_t own_lane(const struct stepper *t)
{
    if (t->scene->start->who[S].alive)
        return t->scene->start->who[S].lane;
    for (uint32_t lane = 0; lane < LANES; lane++)
        if (t->locks >> lane & 1 && !others_lane(t, lane))
            return lane;
    return LANES;
}

static uint32_t holder(uint64_t word) { return (uint32_t)(word & 0xffff) - 1; }

static bool holder_lives(const struct self *me, uint64_t word)
{
    uint32_t lane = holder(word);
    if (lane >= LANES || half_at(lane_of(me->t, lane), 0) != word >> 32)
        return false;
    return lane == me->lane || others_lane(me->t, lane);
}

static struct self self_of(const struct stepper *t)
{
    struct self me = {.t = t, .lane = own_lane(t), .door = t->locks >> 63};
    facts_read_at(t->w, t->copy, &me.before);
    uint64_t lock = word_at(t->copy, offsetof(struct sc_header, lock));
    me.locked = lock && holder(lock) == me.lane && holder_lives(&me, lock);
    me.stealing = lock && !holder_lives(&me, lock);
    return me;
}

static void deny(const struct self *me, const char *what, uint64_t at, struct report *r)
{
    found(r, "authority: %s: byte %llu: %llx -> %llx, %s the lock, %s the door, lane %u", what, (unsigned long long)at,
          (unsigned long long)word_at(me->t->copy, at & ~UINT64_C(7)),
          (unsigned long long)word_at(me->t->w->map, at & ~UINT64_C(7)), me->locked ? "holding" : "without",
          me->door ? "in" : "outside", me->lane);
}

static bool lock_change(const struct self *me, uint64_t was, uint64_t is)
{
    uint64_t waiters = UINT64_C(1) << 16, own = holder(is) == me->lane;
    if (me->locked)
        return is == 0;
    if (was == 0 || me->stealing)
        return own && half_at(lane_of(me->t, me->lane), 0) == is >> 32;
    return is == (was | waiters); /* a living holder's: to be woken */
}

static void check_header(const struct self *me, uint64_t at, struct report *r)
{
    uint64_t was = word_at(me->t->copy, at), is = word_at(me->t->w->map, at);
    if (at < offsetof(struct sc_header, lock))
        deny(me, "the constant part", at, r);
    else if (at < offsetof(struct sc_header, index_seq)) {
        if (at != offsetof(struct sc_header, lock) || !lock_change(me, was, is))
            deny(me, "the lock word", at, r);
    } else if (at >= offsetof(struct sc_header, lane_limit) && at < offsetof(struct sc_header, layouts)) {
        if (!me->door)
            deny(me, "lane_limit, retired, door_pid", at, r);
    } else if (!me->locked)
        deny(me, "what is under the arena lock", at, r);
}

static void check_lane(const struct self *me, uint64_t at, struct report *r)
{
    uint64_t in = (at - me->t->w->g.lane_table) % sizeof(struct sc_lane);
    uint32_t lane = (uint32_t)((at - me->t->w->g.lane_table) / sizeof(struct sc_lane));
    if (in >= offsetof(struct sc_lane, counters)) {
        if (lane != me->lane)
            deny(me, "another lane's statistics", at, r);
        return;
    }
    bool reaped = half_at(me->t->copy, at & ~UINT64_C(7)) == half_at(me->t->w->map, at & ~UINT64_C(7));
    if (in < 8 && reaped && me->locked && !others_lane(me->t, lane))
        return;
    if (others_lane(me->t, lane) && !me->locked)
        deny(me, "a living lane's identity", at, r);
    else if (lane != me->lane && !me->door && !me->locked)
        deny(me, "a lane's identity", at, r);
}

/* A living process other than this one fills the slot. */
static bool others_fill(const struct self *me, uint32_t slot)
{
    for (uint32_t lane = 0; lane < LANES; lane++)
        if (lane != me->lane && others_lane(me->t, lane) && fills(&me->before, slot, lane))
            return true;
    return false;
}

/* One of several writers leaves what it asks for, or seals. */
static bool part(const struct self *me, uint32_t slot, uint64_t was, uint64_t is)
{
    if (!together(&me->before, slot) || was & SC_DETACHED || sc_stage(me->before.words[me->lane][slot]) == SC_STAGE_NONE)
        return false;
    if (is & SC_SEALED)
        return sc_owner_of(is) == me->lane && parts_done(&me->before, slot) >= me->before.slots[slot].writers;
    return (was & ~SC_ASKED) == (is & ~SC_ASKED) && sc_asked(is) > sc_asked(was);
}

/* The table of slot.h. */
static bool transition(const struct self *me, uint32_t slot, uint64_t was, uint64_t is)
{
    enum sc_state from = sc_state_of(was), to = sc_state_of(is);
    bool same = sc_generation(was) == sc_generation(is), next = sc_generation(is) == sc_generation(was) + 1;
    bool own = sc_owner_of(was) == me->lane, same_owner = sc_owner_of(was) == sc_owner_of(is);
    if (from == SC_FREE && to == SC_FREE) /* who freed it died before the seal was gone */
        return me->locked && is == sc_freed_far(was);
    if (from == SC_FREE)
        return to == SC_WRITING && same && me->locked && sc_owner_of(is) == me->lane;
    if (from == SC_WRITING && to == SC_WRITING)
        return same && ((me->locked && is == (was | SC_DETACHED)) || part(me, slot, was, is));
    if (from == SC_WRITING && to == SC_READY)
        return same && own && same_owner && !(was & SC_DETACHED) && !together(&me->before, slot);
    if (from == SC_WRITING && to == SC_FREE)
        return next && me->locked && !others_fill(me, slot);
    if (from == SC_READY)
        return same && to == SC_EVICTING && me->locked && same_owner;
    if (to == SC_READY)
        return same && same_owner;
    return to == SC_FREE && next && me->locked;
}

static bool any_share(const struct self *me, uint32_t slot, uint32_t generation)
{
    const struct sc_geometry *g = &me->t->w->g;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint64_t word = word_at(me->t->copy, g->shares + lane * g->share_stride + slot * 8);
        bool alive = lane == me->lane || others_lane(me->t, lane);
        if (sc_generation(word) == generation && sc_held(word) && alive)
            return true;
    }
    return false;
}

static void check_slot(const struct self *me, uint64_t at, struct report *r)
{
    uint64_t first = me->t->w->g.slot_table, in = (at - first) % sizeof(struct sc_slot);
    uint64_t slot = (at - first) / sizeof(struct sc_slot), state = word_at(me->t->copy, first + slot * sizeof(struct sc_slot));
    if (in >= 8) {
        bool lease = in == offsetof(struct sc_slot, lease_until_us);
        bool seal = in == offsetof(struct sc_slot, seal) && sc_state_of(state) == SC_WRITING && sc_owner_of(state) == me->lane;
        if (!lease && !seal && (!me->locked || sc_state_of(state) != SC_FREE))
            deny(me, "a slot's fields while it is used", at, r);
        return;
    }
    uint64_t is = word_at(me->t->w->map, at);
    if (!transition(me, (uint32_t)slot, state, is))
        deny(me, "a state word", at, r);
    if (sc_state_of(state) == SC_EVICTING && sc_state_of(is) == SC_FREE && any_share(me, (uint32_t)slot, sc_generation(state)))
        deny(me, "an object that has held shares is freed", at, r);
}

static bool others_word(const struct self *me, uint32_t lane, uint64_t was, uint64_t is)
{
    bool same = sc_generation(was) == sc_generation(is), held = sc_held(was) == sc_held(is);
    if (is == 0 && me->locked && !others_lane(me->t, lane))
        return true; /* reaped */
    if (same && held && (sc_reserved(is) == sc_reserved(was) + 1 || sc_reserved(is) + 1 == sc_reserved(was)))
        return true; /* granted, cancelled */
    if (!same) /* granted: of a later object */
        return sc_held(is) == 0 && sc_reserved(is) == 1 && (int32_t)(sc_generation(is) - sc_generation(was)) != 0;
    /* The dead one's part in a write by several. */
    return me->locked && !others_lane(me->t, lane) && (was & ~UINT64_C(0xc000)) == (is & ~UINT64_C(0xc000)) &&
           sc_stage(is) == SC_STAGE_NONE;
}

static void check_share(const struct self *me, uint64_t at, struct report *r)
{
    const struct sc_geometry *g = &me->t->w->g;
    uint32_t lane = (uint32_t)((at - g->shares) / g->share_stride);
    uint64_t was = word_at(me->t->copy, at), is = word_at(me->t->w->map, at);
    if (lane != me->lane && !others_word(me, lane, was, is))
        deny(me, "a share word", at, r);
}

/* The table of region.h. */
static bool region_transition(const struct self *me, uint32_t region, uint64_t was, uint64_t is)
{
    enum sc_region_kind from = sc_kind_of(was), to = sc_kind_of(is);
    uint32_t owner = (uint32_t)(was >> 16 & 0xffff);
    const struct region *r = &me->before.regions[region];
    bool same = was >> 16 == is >> 16, others = others_lane(me->t, owner) && half_at(lane_of(me->t, owner), 0) == r->incarnation;
    bool open = false;
    for (uint32_t lane = 0; lane < LANES; lane++)
        open = open || (r->opened >> lane & 1 && (lane == me->lane || others_lane(me->t, lane)));
    bool used = false;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        used = used || (sc_state_of(me->before.slots[slot].state) != SC_FREE && me->before.slots[slot].region == region);
    if (from == SC_REGION_NONE)
        return to == SC_REGION_LIVE && is >> 32 == (was >> 32) + 1 && (is >> 16 & 0xffff) == me->lane;
    if (from == SC_REGION_LIVE)
        return to == SC_REGION_LOST && same && !others;
    return to == SC_REGION_NONE && was >> 32 == is >> 32 && !used && !open;
}

static bool opened_change(const struct self *me, const struct region *r, uint64_t was, uint64_t is)
{
    bool good = true;
    for (uint32_t lane = 0; lane < 64; lane++) {
        bool dead = me->locked && lane != me->lane && !others_lane(me->t, lane);
        bool none = me->locked && sc_kind_of(r->state) == SC_REGION_NONE;
        if ((was ^ is) >> lane & 1)
            good = good && (lane == me->lane || (was >> lane & 1 && (dead || none)));
    }
    return good;
}

static void check_region(const struct self *me, uint64_t at, struct report *r)
{
    uint64_t first = me->t->w->g.region_table, in = (at - first) % sizeof(struct sc_region);
    uint32_t region = 1 + (uint32_t)((at - first) / sizeof(struct sc_region));
    uint64_t was = word_at(me->t->copy, at), is = word_at(me->t->w->map, at);
    const struct region *before = &me->before.regions[region];
    if (in == offsetof(struct sc_region, opened)) {
        if (!opened_change(me, before, was, is))
            deny(me, "who has a region open", at, r);
    } else if (!me->locked)
        deny(me, "the region table", at, r);
    else if (in == offsetof(struct sc_region, state)) {
        if (!region_transition(me, region, was, is))
            deny(me, "a region's state", at, r);
    } else if (in != offsetof(struct sc_region, free_blocks) && sc_kind_of(before->state) != SC_REGION_NONE)
        deny(me, "what is constant while there is a region", at, r);
}

static void check_payload(const struct self *me, uint64_t at, struct report *r)
{
    const struct sc_geometry *g = &me->t->w->g;
    uint64_t block = (at - g->payload) / g->block_size;
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        const struct sc_slot *o = (const struct sc_slot *)(me->t->copy + g->slot_table) + slot;
        uint64_t state = sc_peek(&o->state);
        if (sc_state_of(state) == SC_WRITING && sc_owner_of(state) == me->lane && block >= sc_peek32(&o->block) &&
            block < sc_peek32(&o->block) + (sc_peek(&o->nbytes) + g->block_size - 1) / g->block_size)
            return;
    }
    deny(me, "payload that it does not write", at, r);
}

static void check_change(const struct self *me, uint64_t at, struct report *r)
{
    const struct sc_geometry *g = &me->t->w->g;
    if (at < g->lane_table)
        check_header(me, at, r);
    else if (at < g->layout_table)
        check_lane(me, at, r);
    else if (at < g->region_table) {
        if (!me->locked)
            deny(me, "the layout table", at, r);
    } else if (at < g->slot_table)
        check_region(me, at, r);
    else if (at < g->scores)
        check_slot(me, at, r);
    else if (at < g->ghosts)
        return; /* scores: anybody's */
    else if (at < g->shares) {
        if (!me->locked)
            deny(me, "ghosts", at, r);
    } else if (at < g->since)
        check_share(me, at, r);
    else if (at < g->index) {
        if ((at - g->since) / g->since_stride != me->lane)
            deny(me, "when another lane began to hold a share", at, r);
    }
    else if (at < g->backed) {
        if (!me->locked)
            deny(me, "index, maps", at, r);
    } else if (at < g->metadata) {
        if (word_at(me->t->copy, at) & ~word_at(me->t->w->map, at))
            deny(me, "a backed bit is cleared", at, r);
    } else
        check_payload(me, at, r);
}

void check_authority(const struct stepper *t, struct report *r)
{
    struct self me = self_of(t);
    for (uint64_t at = 0; (at = step_difference(t, at)) != SIZE_MAX; at = (at & ~UINT64_C(7)) + 8)
        check_change(&me, at & ~UINT64_C(7), r);
}
