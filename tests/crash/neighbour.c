#include "neighbour_act.h"

uint64_t random_of(uint64_t *seed)
{
    *seed += UINT64_C(0x9e3779b97f4a7c15);
    return sc_mix(*seed, *seed ^ UINT64_C(0xe7037ed1a0b428db));
}

static void wrong(struct act *a, const char *what)
{
    found(a->r, "neighbour in lane %u, %s key %d: %s (gives %lld)", a->n->s->lane, a->n->did, a->key, what,
          (long long)a->n->rc);
}

static uint64_t own_word(const struct act *a, const struct facts *f, int slot) { return f->words[a->n->s->lane][slot]; }

static bool is_readable(const struct act *a) { return readable(a->before, a->key); }
static bool is_lost(const struct act *a) { return lost(a->before, a->key); }
static bool in_lost_region(const struct act *a, int slot)
{
    uint32_t region = a->before->slots[slot].region;
    return !a->before->regions[region].lives || a->may.given_up == (int)region;
}

void want(struct act *a, bool good, const char *what)
{
    if (!good)
        wrong(a, what);
}

bool refused(struct act *a, bool busy)
{
    want(a, busy == (a->n->rc == SC_E_BUSY), busy ? "not refused, though the lock is held" : "refused, though it is free");
    return busy || a->n->rc == SC_E_BUSY;
}

static void act_status(struct act *a)
{
    int8_t status;
    sc_get_status(a->n->s, keys[a->key], KEY_BYTES, NULL, 1, &status);
    a->n->rc = status;
    want(a, (status == SC_OK) == is_readable(a), "a key's status is not its slot's");
    want(a, (status == SC_LOST) == is_lost(a), "lost or not, against its region");
    want(a, status != SC_IN_FLIGHT || a->slot >= 0, "in flight, and nobody writes it");
    want(a, sc_lookup(a->n->s, keys[a->key], KEY_BYTES, NULL, 1) == (status == SC_OK), "lookup is not its status");
}

static void give_back_may_free(struct act *a, int slot)
{
    if (slot < 0 || !(a->before->slots[slot].state & SC_TEMPORARY || in_lost_region(a, slot)))
        return;
    a->may.removes = true;
    a->may.settles = in_lost_region(a, slot);
    a->may.removed = a->before->slots[slot].key;
}

static void read_one(struct act *a, int flags)
{
    struct sc_ref ref;
    a->may.own = a->slot;
    if (is_lost(a) && !(flags & SC_READ_FRESH))
        give_back_may_free(a, a->slot); /* who asks for a reserved share of what is lost gives it back */
    a->n->rc = do_read(a->n->s, (uint32_t)a->key, flags, &ref);
    want(a, (a->n->rc == SC_OK) == is_readable(a), "a read is not what the slot says");
    want(a, (a->n->rc == SC_LOST) == is_lost(a), "a read is lost or not, against its region");
    facts_read(a->n->w, &a->after);
    uint64_t was = a->slot < 0 ? 0 : own_word(a, a->before, a->slot), is = a->slot < 0 ? 0 : own_word(a, &a->after, a->slot);
    if (a->n->rc == SC_LOST && !(flags & SC_READ_FRESH))
        want(a, sc_reserved(is) == sc_reserved(was) - (sc_reserved(was) > 0), "a reserved share of what is lost is not given back");
    if (a->n->rc != SC_OK)
        return;
    bool claims = !(flags & SC_READ_FRESH) && sc_reserved(was) > 0;
    want(a, sc_held(is) == sc_held(was) + 1 && sc_reserved(is) + claims == sc_reserved(was), "not one share more");
    const struct object *o = &a->before->slots[a->slot];
    want(a, ref.slot == (uint32_t)a->slot && ref.nbytes == o->nbytes && ref.region == o->region &&
            ref.offset == (o->block - o->region * BLOCKS) * BLOCK_BYTES &&
            version_at(a->n->w, (uint32_t)a->key, &ref) == o->version && o->version >= 0,
         "the bytes are not the key's");
}

static void act_read(struct act *a) { read_one(a, 0); }
static void act_read_fresh(struct act *a) { read_one(a, SC_READ_FRESH); }

/* Some slot, from a random one on, of which this lane has what is asked; -1. */
static int slot_with(struct act *a, bool (*has)(const struct act *, int))
{
    uint32_t from = (uint32_t)(random_of(&a->n->seed) % SLOTS);
    for (uint32_t i = 0; i < SLOTS; i++)
        if (has(a, (int)((from + i) % SLOTS)))
            return (int)((from + i) % SLOTS);
    return -1;
}

static bool holds(const struct act *a, int slot) { return sc_held(own_word(a, a->before, slot)) > 0; }
static bool writes(const struct act *a, int slot) { return fills(a->before, (uint32_t)slot, a->n->s->lane); }

static struct sc_ref ref_of(const struct act *a, int slot)
{
    const struct object *o = &a->before->slots[slot];
    return (struct sc_ref){.offset = (o->block - o->region * BLOCKS) * BLOCK_BYTES, .nbytes = o->nbytes,
                           .slot = (uint32_t)slot, .generation = sc_generation(o->state), .region = (uint16_t)o->region,
                           .status = SC_OK,
                           .temporary = (o->state & SC_TEMPORARY) != 0};
}

static void act_release(struct act *a)
{
    int slot = slot_with(a, holds);
    if (slot < 0)
        return;
    struct sc_ref ref = ref_of(a, slot);
    a->key = a->before->slots[slot].key;
    a->may.own = slot;
    give_back_may_free(a, slot);
    a->n->rc = sc_release(a->n->s, &ref, 1);
    facts_read(a->n->w, &a->after);
    want(a, a->n->rc == 1, "a held share cannot be given back");
    if (!a->may.removes)
        want(a, sc_held(own_word(a, &a->after, slot)) + 1 == sc_held(own_word(a, a->before, slot)), "not one share less");
}

static void act_finish_read(struct act *a)
{
    int8_t status;
    /* What is granted before its object is published is nobody's yet. */
    bool has = (is_readable(a) || is_lost(a)) && sc_reserved(own_word(a, a->before, a->slot)) > 0;
    a->may.own = a->slot;
    give_back_may_free(a, a->slot);
    sc_finish_read(a->n->s, keys[a->key], KEY_BYTES, NULL, 1, &status);
    a->n->rc = status;
    want(a, (status == SC_OK) == has, "a reserved share given back or not, against the share word");
}

static void grant(struct act *a, uint64_t lease_us)
{
    a->may.granted = a->slot;
    a->n->s->read_lease_us = lease_us;
    a->n->rc = do_grant(a->n->s, (uint32_t)a->key, RANKS);
    a->n->s->read_lease_us = HOUR_US;
    want(a, (a->n->rc == SC_OK) == is_readable(a), "granted or not, against the slot");
    if (a->n->rc != SC_OK)
        return;
    facts_read(a->n->w, &a->after);
    for (uint32_t rank = 0; rank < RANKS; rank++) {
        uint32_t lane = a->n->s->rank_lanes[rank];
        want(a, sc_reserved(a->after.words[lane][a->slot]) == sc_reserved(a->before->words[lane][a->slot]) + 1,
             "a rank did not get its share");
    }
}

static void act_reserve_read(struct act *a) { grant(a, HOUR_US); }
static void act_reserve_read_brief(struct act *a) { grant(a, 0); }

static void act_cancel_read(struct act *a)
{
    int8_t status;
    a->may.cancelled = a->slot;
    give_back_may_free(a, a->slot);
    sc_cancel_read(a->n->s, keys[a->key], KEY_BYTES, NULL, 1, RANKS, &status);
    a->n->rc = status;
    bool any = false;
    for (uint32_t rank = 0; (is_readable(a) || is_lost(a)) && rank < RANKS; rank++)
        any |= sc_reserved(a->before->words[a->n->s->rank_lanes[rank]][a->slot]) > 0;
    want(a, (status == SC_OK) == any, "cancelled or not, against the share words");
}

static void act_touch(struct act *a)
{
    int8_t status;
    sc_touch_keys(a->n->s, keys[a->key], KEY_BYTES, NULL, 1, &status);
    a->n->rc = status;
    want(a, (status == SC_OK) == is_readable(a), "touched or not, against the slot");
}

static void write_one(struct act *a, bool publish, uint64_t lease_us)
{
    uint64_t nbytes = (1 + random_of(&a->n->seed) % 3) * BLOCK_BYTES - 8 * (random_of(&a->n->seed) % 2);
    a->may.removes = a->may.reaps = true;
    a->may.written = a->key;
    a->n->s->write_lease_us = lease_us;
    a->may.detaches = lease_us == 0;
    if (publish)
        a->n->rc = do_put(a->n->w, a->n->s, (uint32_t)a->key, nbytes, a->n->version++);
    else {
        struct sc_ref ref = {0};
        uint32_t writers = 1 + (uint32_t)(random_of(&a->n->seed) % 2);
        bool temporary = random_of(&a->n->seed) % 4 == 0;
        a->may.own = a->slot; /* it may get a part in the write */
        uint32_t region = random_of(&a->n->seed) % 2 ? 0 : 1 + (uint32_t)(random_of(&a->n->seed) % REGIONS);
        a->n->rc = do_reserve_in(a->n->s, region, keys[a->key], 1, writers > 1 ? BLOCK_BYTES : nbytes, temporary, writers, &ref);
        nbytes = ref.nbytes;
        if (a->n->rc >= 0)
            a->n->rc = ref.status;
        if (a->n->rc == SC_OK && !region)
            content_fill(a->n->w->map + a->n->w->g.payload + ref.offset, (uint32_t)a->key, a->n->version++, nbytes);
    }
    a->n->s->write_lease_us = HOUR_US;
    if (refused(a, a->lock_busy))
        return;
    facts_read(a->n->w, &a->after);
    want(a, (a->n->rc == SC_EXISTS) == is_readable(a), "EXISTS or not, against the slot");
    want(a, a->n->rc != SC_IN_FLIGHT || a->slot >= 0, "in flight, and nobody writes it");
    if (a->n->rc == SC_OK && publish)
        want(a, readable(&a->after, a->key), "not readable after put");
}

static void act_put(struct act *a) { write_one(a, true, HOUR_US); }
static void act_put_impatient(struct act *a) { write_one(a, true, 0); }
static void act_reserve(struct act *a) { write_one(a, false, HOUR_US); }

static void act_publish(struct act *a)
{
    int slot = slot_with(a, writes);
    if (slot < 0)
        return;
    struct sc_ref ref = ref_of(a, slot);
    const struct object *o = &a->before->slots[slot];
    bool lost = o->state & SC_DETACHED, last = o->writers == 1 || parts_done(a->before, (uint32_t)slot) + 1 >= o->writers;
    a->key = a->before->slots[slot].key;
    a->may.finished = a->may.granted = slot;
    a->n->rc = do_publish(a->n->s, &ref, random_of(&a->n->seed) % 2 ? RANKS : 0);
    bool given_up = !lost && in_lost_region(a, slot); /* it is given back, under the lock */
    want(a, a->n->rc == (lost ? SC_NOT_OWNER : given_up ? a->lock_busy ? SC_LOCKED : SC_LOST : last ? SC_OK : SC_PART),
         "its own write is not published");
}

static void act_abort(struct act *a)
{
    int8_t status;
    int slot = slot_with(a, writes);
    if (slot < 0)
        return;
    struct sc_ref ref = ref_of(a, slot);
    a->key = a->before->slots[slot].key;
    a->may.finished = slot;
    a->n->rc = sc_abort_refs(a->n->s, &ref, 1, &status);
    if (refused(a, a->lock_busy))
        return;
    facts_read(a->n->w, &a->after);
    want(a, sc_generation(a->after.slots[slot].state) != sc_generation(a->before->slots[slot].state) ||
            (a->after.slots[slot].state & SC_DETACHED && !fills(&a->after, (uint32_t)slot, a->n->s->lane)),
         "not given back");
}

bool alive(const struct neighbour *n, uint32_t lane) { return sc_lane_held(n->s, lane); }

bool protected(const struct act *a, int slot)
{
    const struct object *o = &a->before->slots[slot];
    bool runs = o->lease_until_us > sc_now_us() && !a->may.force;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint64_t word = a->before->words[lane][slot];
        uint32_t held = sc_held(word), reserved = sc_reserved(word);
        /* What it gives back itself, one share of its own or one reserved share of each rank, protects no more. */
        if (slot == a->may.own && lane == a->n->s->lane && held + reserved == 1)
            continue;
        reserved -= slot == a->may.cancelled && reserved > 0;
        /* A lane that is set aside has what was granted to a rank that has not come. */
        bool counts = alive(a->n, lane) || a->before->incarnations[lane] == a->before->reaped[lane];
        if ((held || (reserved && runs)) && counts)
            return true;
    }
    return false;
}

static void delete_one(struct act *a, bool force)
{
    int8_t status = SC_LOST;
    a->may.removes = a->may.reaps = true;
    a->may.removed = a->key;
    a->may.force = force;
    a->n->rc = sc_delete(a->n->s, keys[a->key], KEY_BYTES, NULL, 1, force, &status);
    if (refused(a, a->lock_busy))
        return;
    a->n->rc = status;
    facts_read(a->n->w, &a->after);
    want(a, status != SC_OK || a->after.slot_of[a->key] < 0, "deleted, and still there");
    want(a, status != SC_LOCKED || (a->slot >= 0 && (!is_readable(a) || protected(a, a->slot))), "locked by nobody");
    /* A temporary object of which only the dead had shares goes when they are reaped. */
    bool there = a->slot >= 0 && is_readable(a) && !(a->before->slots[a->slot].state & SC_TEMPORARY);
    want(a, status != SC_NOT_FOUND || !there, "not found, though it is there");
}

static void act_delete(struct act *a) { delete_one(a, false); }
static void act_delete_force(struct act *a) { delete_one(a, true); }

static void act_evict(struct act *a)
{
    a->may.removes = a->may.reaps = true;
    a->n->rc = sc_evict(a->n->s, (uint32_t)(random_of(&a->n->seed) % (1 + REGIONS)), BLOCK_BYTES * (1 + random_of(&a->n->seed) % 3));
    refused(a, a->lock_busy);
}

static void act_clear(struct act *a)
{
    a->may.removes = a->may.reaps = true;
    a->n->rc = sc_clear(a->n->s);
    refused(a, a->lock_busy);
}

static void act_reap(struct act *a)
{
    struct sc_reaped reaped;
    a->may.reaps = true;
    a->n->rc = sc_reap(a->n->s, false, &reaped);
    want(a, a->n->rc == 0 || (a->lock_busy && a->n->rc == SC_E_BUSY), "reap");
}

static void act_verify(struct act *a)
{
    char text[1000];
    a->n->rc = sc_verify(a->n->s, text, sizeof text);
    if (!refused(a, a->lock_busy))
        want(a, a->n->rc == 0, text);
}

static void act_layout(struct act *a)
{
    char spec[16];
    snprintf(spec, sizeof spec, "layout %u", (unsigned)(random_of(&a->n->seed) % 3));
    a->n->rc = sc_layout_number(a->n->s, spec, 8, 4096);
    want(a, a->n->rc > 0 || (a->lock_busy && a->n->rc == SC_E_BUSY), "no number");
}

static void act_visit(struct act *a)
{
    a->may.reaps = true;
    a->n->rc = seat_join(a->n->w, C, "", 0, 1);
    want(a, a->n->rc == 0 || a->n->rc == SC_E_NO_LANE || a->n->rc == SC_E_RETIRED ||
            ((a->door_busy || a->lock_busy) && a->n->rc == SC_E_BUSY), "a visitor cannot join");
    if (a->n->rc == 0)
        sc_close(&a->n->w->seats[C]);
    seat_empty(a->n->w, C);
}

static const struct { const char *name; void (*act)(struct act *a); } acts[] = {
    {"status", act_status},         {"read", act_read},           {"read fresh", act_read_fresh},
    {"release", act_release},       {"finish_read", act_finish_read}, {"reserve_read", act_reserve_read},
    {"brief reserve_read", act_reserve_read_brief},               {"cancel_read", act_cancel_read},
    {"touch", act_touch},           {"put", act_put},             {"impatient put", act_put_impatient},
    {"reserve_write", act_reserve}, {"publish", act_publish},     {"abort", act_abort},
    {"delete", act_delete},         {"forced delete", act_delete_force}, {"evict", act_evict},
    {"clear", act_clear},           {"reap", act_reap},           {"verify", act_verify},
    {"layout", act_layout},         {"visit", act_visit},         {"add region", act_region_add},
    {"give up region", act_region_give_up}, {"open region", act_region_opened}, {"check region", act_region_check},
};
enum { ACTS = sizeof acts / sizeof acts[0], READ_FRESH = 2, PUBLISH = 12, GIVE_UP_REGION = 23 };

const char *neighbour_operation(uint32_t i) { return i < ACTS ? acts[i].name : NULL; }

static bool filled_by_the_living(const struct act *a, int slot)
{
    for (uint32_t lane = 0; lane < LANES; lane++)
        if (fills(a->before, (uint32_t)slot, lane) && alive(a->n, lane))
            return true;
    return false;
}

static bool may_go(const struct act *a, int slot)
{
    const struct object *o = &a->before->slots[slot];
    enum sc_state state = sc_state_of(o->state);
    if (slot == a->may.finished)
        return true;
    if (state == SC_WRITING)
        return (a->may.reaps || a->may.detaches) && !filled_by_the_living(a, slot);
    bool temporary_of_the_dead = a->may.reaps && o->state & SC_TEMPORARY;
    if ((a->may.reaps || a->may.sweeps) && in_lost_region(a, slot) && !protected(a, slot))
        return true;
    return ((a->may.removes && (a->may.removed < 0 || a->may.removed == o->key)) || temporary_of_the_dead) &&
           !protected(a, slot);
}

static bool state_may_change(const struct act *a, int slot)
{
    uint64_t was = a->before->slots[slot].state, is = a->after.slots[slot].state;
    bool same = sc_generation(was) == sc_generation(is);
    bool new_write = sc_state_of(is) != SC_FREE && a->after.slots[slot].key == a->may.written &&
                     sc_owner_of(is) == a->n->s->lane;
    if (sc_state_of(was) == SC_FREE)
        return new_write && same;
    if (same && sc_state_of(was) == SC_EVICTING)
        return sc_state_of(is) == SC_READY;
    if (same && sc_state_of(was) == SC_WRITING && sc_state_of(is) == SC_WRITING)
        return slot == a->may.finished || ((a->may.detaches || a->may.reaps) && is == (was | SC_DETACHED));
    if (same)
        return sc_state_of(was) == SC_WRITING && sc_state_of(is) == SC_READY && slot == a->may.finished;
    return may_go(a, slot) && (sc_state_of(is) == SC_FREE || new_write);
}

static bool word_may_change(const struct act *a, uint32_t lane, int slot)
{
    uint64_t was = a->before->words[lane][slot], is = a->after.words[lane][slot];
    uint32_t r = sc_reserved(was), reserved = sc_reserved(is);
    bool gone = sc_generation(a->before->slots[slot].state) != sc_generation(a->after.slots[slot].state);
    if (gone || (lane == a->n->s->lane && slot == a->may.own))
        return true; /* the first is checked as a state, the second by the act */
    if (is == 0 && a->may.reaps && !alive(a->n, lane))
        return true;
    if (!alive(a->n, lane) && (was & ~UINT64_C(0xc000)) == (is & ~UINT64_C(0xc000)))
        return a->may.reaps || a->may.detaches; /* its part in a write by several */
    if (lane == a->n->s->lane && (slot == a->may.finished || a->after.slots[slot].key == a->may.written))
        is = sc_with_stage(is, sc_stage(was));
    if (sc_held(was) != sc_held(is) || sc_stage(was) != sc_stage(is))
        return false;
    if (reserved == r)
        return true;
    if (slot == a->may.granted && reserved == r + 1)
        return true;
    return slot == a->may.cancelled && reserved + 1 == r;
}

static void check_frame(struct act *a)
{
    facts_read(a->n->w, &a->after);
    check_regions_frame(a);
    for (int slot = 0; slot < SLOTS; slot++) {
        const struct object *was = &a->before->slots[slot], *is = &a->after.slots[slot];
        if (was->state != is->state && !state_may_change(a, slot))
            found(a->r, "neighbour in lane %u, %s key %d: slot %d (key %d) %llx -> %llx", a->n->s->lane, a->n->did, a->key,
                  slot, was->key, (unsigned long long)was->state, (unsigned long long)is->state);
        if (readable(&a->after, is->key < 0 ? 0 : is->key) && is->key >= 0 && sc_state_of(is->state) == SC_READY &&
            is->version < 0)
            found(a->r, "neighbour in lane %u, %s: slot %d is READY and not whole", a->n->s->lane, a->n->did, slot);
        for (uint32_t lane = 0; lane < LANES; lane++)
            if (a->before->words[lane][slot] != a->after.words[lane][slot] && !word_may_change(a, lane, slot))
                found(a->r, "neighbour in lane %u, %s key %d: share word of lane %u, slot %d: %llx -> %llx",
                      a->n->s->lane, a->n->did, a->key, lane, slot, (unsigned long long)a->before->words[lane][slot],
                      (unsigned long long)a->after.words[lane][slot]);
    }
}

/* Half of them what the stepped one is about, most others such that are there. */
static int pick_key(struct neighbour *n, const struct facts *before)
{
    if (random_of(&n->seed) % 2)
        return (int)((n->about[random_of(&n->seed) % 5] - keys[0]) / KEY_BYTES);
    int key = (int)(random_of(&n->seed) % KEYS);
    for (int i = 0; i < 8 && before->slot_of[key] < 0 && random_of(&n->seed) % 8; i++)
        key = (int)(random_of(&n->seed) % KEYS);
    return key;
}

void neighbour_acts(struct neighbour *n, bool lock_busy, bool door_busy, struct report *r)
{
    static struct facts before;
    uint32_t which = (uint32_t)(random_of(&n->seed) % ACTS);
    facts_read(n->w, &before);
    /* Most of all it reads; and who writes is about to be done. */
    if (random_of(&n->seed) % 4 == 0)
        which = READ_FRESH;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (fills(&before, slot, n->s->lane) && random_of(&n->seed) % 3 == 0)
            which = PUBLISH;
    struct act a = {.n = n, .before = &before, .lock_busy = lock_busy, .door_busy = door_busy, .r = r};
    a.may = (struct licence){.removed = -1, .written = -1, .finished = -1, .granted = -1, .cancelled = -1, .added = -1, .given_up = -1,
                              .opened = -1, .own = -1};
    if (owns_region(&a) && random_of(&n->seed) % 6 == 0)
        which = GIVE_UP_REGION;
    a.key = pick_key(n, &before);
    a.slot = before.slot_of[a.key];
    a.may.reaps = before.lock != 0 && !lock_busy; /* whoever takes a dead holder's lock recovers */
    n->did = acts[which].name;
    n->rc = 0;
    acts[which].act(&a);
    n->key = a.key;
    n->operations[which] += n->rc != SC_E_BUSY;
    check_frame(&a);
}
