/* census.c - which objects lie where and who keeps them, for somebody who only looks: no lock, no lane, no store.
 *
 * What a list tells of one object belongs together (its state word is looked at before and after); what is told of two
 * may never have been at one time.
 */
#include "arena.h"
#include "guard.h"
#include "writers.h"

/* dead: somebody was there and is not reaped. A vacant lane is no dead one: its shares wait for a rank to come. */
struct look { struct sc_segment *s; uint64_t now_us; uint32_t lanes; bool dead[SC_MAX_LANES]; };

/* Shares and writers of one object; of each kind those of the living at 0, of the dead at 1. */
struct keepers { uint64_t reserved, held; bool reserves[2], holds[2], writes[2]; };

static struct look look_around(struct sc_segment *s)
{
    struct look l = {.s = s, .now_us = sc_now_us(), .lanes = sc_lane_limit(s)};
    for (uint32_t lane = 0; lane < l.lanes; lane++)
        l.dead[lane] = sc_lane_state(s, lane) == SC_LANE_DEAD;
    return l;
}

/* The object in a slot, if there is one that can be described. */
static bool see(const struct look *l, uint32_t slot, uint64_t *state, struct sc_object *o)
{
    *state = sc_load(&sc_slot(l->s, slot)->state);
    return sc_state_of(*state) != SC_FREE && sc_slot_describe(l->s, slot, *state, sc_peek(&sc_slot(l->s, slot)->hash), o);
}

/* It is still the one that was seen. */
static bool stays(const struct look *l, uint32_t slot, uint64_t state)
{
    sc_fence_acquire(); /* what was read of the slot before is of this generation, or the state is another: see slot.h */
    return sc_generation(sc_load(&sc_slot(l->s, slot)->state)) == sc_generation(state);
}

static uint64_t share_of(const struct look *l, uint32_t lane, const struct sc_object *o)
{
    uint64_t word = sc_peek(sc_share(l->s, lane, o->slot));
    return sc_generation(word) == o->generation ? word : 0;
}

static void count_lane(const struct look *l, uint32_t lane, const struct sc_object *o, uint64_t word, bool writes,
                       struct sc_lane_census *c)
{
    c->reserved += sc_reserved(word);
    c->writing += writes;
    if (sc_held(word) == 0)
        return;
    uint64_t held_us = sc_share_held_us(l->s, lane, o->slot, l->now_us);
    c->held += sc_held(word);
    c->held_bytes += o->blocks * sc_extent_of(l->s, o->region).block_size;
    c->oldest_held_us = held_us > c->oldest_held_us ? held_us : c->oldest_held_us;
}

/* lanes: what each lane has is added to; NULL: nothing is. */
static struct keepers keepers_of(const struct look *l, const struct sc_object *o, uint64_t state, struct sc_lane_census *lanes)
{
    struct keepers k = {0};
    bool writing = sc_state_of(state) == SC_WRITING;
    for (uint32_t lane = 0; lane < l->lanes; lane++) {
        uint64_t word = share_of(l, lane, o);
        if (word == 0 && !writing)
            continue;
        bool writes = writing && sc_fills(l->s, o->slot, state, lane), dead = l->dead[lane];
        k.reserved += sc_reserved(word);
        k.held += sc_held(word);
        k.reserves[dead] |= sc_reserved(word) > 0;
        k.holds[dead] |= sc_held(word) > 0;
        k.writes[dead] |= writes;
        if (lanes)
            count_lane(l, lane, o, word, writes, &lanes[lane]);
    }
    if (sc_load(&sc_slot(l->s, o->slot)->lease_until_us) < l->now_us) /* sc_lease_over, at the time of the look */
        k.reserves[0] = k.reserves[1] = false;
    return k;
}

static enum sc_standing standing(const struct keepers *k, uint64_t state)
{
    if (k->holds[0])
        return SC_KEPT_HELD;
    if (k->writes[0])
        return SC_KEPT_WRITING;
    if (k->reserves[0])
        return SC_KEPT_RESERVED;
    bool dead = k->holds[1] || k->reserves[1] || sc_state_of(state) == SC_WRITING;
    return dead ? SC_KEPT_DEAD : SC_IDLE;
}

void sc_census(struct sc_segment *s, struct sc_census *c)
{
    memset(c, 0, sizeof *c);
    if (sc_enter(s) < 0)
        return; /* closed meanwhile */
    struct look l = look_around(s);
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t state;
        struct sc_object o;
        if (!see(&l, slot, &state, &o))
            continue;
        struct keepers k = keepers_of(&l, &o, state, c->lanes);
        c->objects += sc_state_of(state) != SC_WRITING;
        c->writing += sc_state_of(state) == SC_WRITING;
        if (o.region == 0)
            c->bytes[standing(&k, state)] += o.blocks * s->g.block_size;
    }
    sc_leave(s, 0);
}

static void describe(const struct look *l, const struct sc_object *o, uint64_t state, struct sc_object_info *info)
{
    const struct sc_slot *r = sc_slot(l->s, o->slot);
    uint64_t began_us = sc_peek(&r->reserved_us);
    struct keepers k = keepers_of(l, o, state, NULL);
    *info = (struct sc_object_info){
        .nbytes = o->nbytes,
        .block = o->block - sc_first_block(l->s, o->region),
        .blocks = o->blocks,
        .age_us = began_us < l->now_us ? l->now_us - began_us : 0,
        .reserved = k.reserved,
        .held = k.held,
        .key_bytes = sc_key_bytes(sc_peek32(&r->about)),
        .slot = o->slot,
        .generation = o->generation,
        .layout = o->layout,
        .region = o->region,
        .owner = sc_owner_of(state),
        .writing = sc_state_of(state) == SC_WRITING,
        .standing = standing(&k, state),
    };
    sc_peek_text(r->key, SC_MAX_KEY / 8, info->key);
}

uint32_t sc_list_objects(struct sc_segment *s, struct sc_object_info *objects, uint32_t most)
{
    uint32_t n = 0;
    if (sc_enter(s) < 0)
        return 0;
    struct look l = look_around(s);
    for (uint32_t slot = 0; slot < s->g.slots && n < most; slot++) {
        uint64_t state;
        struct sc_object o;
        if (!see(&l, slot, &state, &o))
            continue;
        describe(&l, &o, state, &objects[n]);
        n += objects[n].key_bytes <= SC_MAX_KEY && stays(&l, slot, state);
    }
    sc_leave(s, 0);
    return n;
}

uint32_t sc_list_shares(struct sc_segment *s, uint32_t lane, struct sc_share_info *shares, uint32_t most)
{
    uint32_t n = 0;
    if (lane >= s->g.lanes || sc_enter(s) < 0)
        return 0;
    struct look l = {.s = s, .now_us = sc_now_us()}; /* who lives does not matter here */
    for (uint32_t slot = 0; slot < s->g.slots && n < most; slot++) {
        uint64_t word = sc_peek(sc_share(s, lane, slot)), state;
        struct sc_object o;
        if (!sc_has_shares(word) || !see(&l, slot, &state, &o) || sc_generation(word) != o.generation)
            continue;
        uint64_t leased_us = sc_load(&sc_slot(s, slot)->lease_until_us), until_us = l.now_us + s->read_lease_us;
        shares[n++] = (struct sc_share_info){
            .slot = slot,
            .generation = o.generation,
            .reserved = sc_reserved(word),
            .held = sc_held(word),
            .reserved_us = leased_us < until_us ? until_us - leased_us : 0,
            .held_us = sc_held(word) ? sc_share_held_us(s, lane, slot, l.now_us) : 0,
        };
    }
    sc_leave(s, 0);
    return n;
}
