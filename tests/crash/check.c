#define _GNU_SOURCE
#include "check.h"
#include "region_check.h"

/* In these checks nobody waits: all timeouts are 0, so whoever takes the dead for living says SC_E_BUSY. */

static bool lives(const struct death *d, enum seat seat) { return d->who[seat].alive && seat != d->dead; }

static enum seat survivor_of(const struct death *d, bool last)
{
    enum seat first = SEATS;
    for (int i = 0; i < C; i++)
        if (lives(d, (enum seat)i)) {
            if (!last)
                return (enum seat)i;
            first = (enum seat)i;
        }
    return first;
}

bool applies(const struct death *d, enum first first)
{
    if (first == FIRST_JOINER || first == FIRST_SUCCESSOR)
        return true;
    return survivor_of(d, false) != SEATS;
}

static void verify(struct sc_segment *s, const char *when, struct report *r)
{
    char text[2000];
    int64_t n = sc_verify(s, text, sizeof text);
    if (n != 0)
        found(r, "verify %s: %lld: %s", when, (long long)n, n > 0 ? text : "");
}

static void reap(struct sc_segment *s, const char *when, struct report *r)
{
    struct sc_reaped reaped;
    int rc = sc_reap(s, false, &reaped);
    if (rc != 0)
        found(r, "reap %s: %d", when, rc);
}

static bool allowed(const struct expectation *e, int key, int64_t version)
{
    return version >= 0 && (version == e->versions[key][0] || version == e->versions[key][1]);
}

/* A held share, or a reserved one while its lease runs. */
static bool keeps(const struct object *o, uint64_t word)
{
    return sc_held(word) || (sc_reserved(word) && o->lease_until_us > sc_now_us());
}

/* A temporary object goes with the last share, so it must stay only while a survivor has one. */
static bool needed(const struct expectation *e, const struct facts *now, int key)
{
    int slot = e->before.slot_of[key];
    if (e->need[key] != MUST || !(e->before.slots[slot].state & SC_TEMPORARY))
        return e->need[key] == MUST;
    for (uint32_t lane = 0; lane < LANES; lane++)
        if (e->survives[lane] && keeps(&now->slots[slot], now->words[lane][slot]))
            return true;
    return false;
}

/* Until the dead are reaped theirs is in flight, too. */
static bool in_flight(const struct expectation *e, const struct facts *now, int key, bool reaped)
{
    int slot = now->slot_of[key];
    return slot >= 0 && (e->writes[slot][0] || e->writes[slot][1] || together(now, (uint32_t)slot) ||
                         (!reaped && sc_state_of(now->slots[slot].state) == SC_WRITING));
}

/* What each key must be, by a process that reads: `status` is what it got, of an object at ref. */
static void check_key(const struct world *w, const struct expectation *e, const struct facts *now, int key, int status,
                      const struct sc_ref *ref, bool reaped, struct report *r)
{
    const char *when = reaped ? "after recovery" : "before recovery";
    if (status == SC_OK) {
        int64_t version = ref ? version_at(w, (uint32_t)key, ref)
                              : now->slot_of[key] < 0 ? -1 : now->slots[now->slot_of[key]].version;
        if (e->need[key] == ABSENT)
            found(r, "key %d %s: readable, and nobody published it", key, when);
        else if (!allowed(e, key, version))
            found(r, "key %d %s: bytes of version %lld; before %lld, after %lld", key, when, (long long)version,
                  (long long)e->versions[key][0], (long long)e->versions[key][1]);
    } else if (status == SC_IN_FLIGHT) {
        if (!in_flight(e, now, key, reaped))
            found(r, "key %d %s: in flight, and no survivor writes it", key, when);
    } else if (status == SC_LOST ? !lost(now, key) : status != SC_NOT_FOUND) {
        found(r, "key %d %s: status %d", key, when, status);
    }
    if (status != SC_LOST && lost(now, key))
        found(r, "key %d %s: status %d, and its region is lost", key, when, status);
    if (status != SC_OK && needed(e, now, key))
        found(r, "key %d %s: status %d, and it was READY and not being removed", key, when, status);
}

/* Reading goes on, whatever the dead one left: before anything was repaired. */
static void check_statuses(struct world *w, const struct death *d, struct report *r)
{
    enum seat seat = survivor_of(d, false);
    if (seat == SEATS)
        return;
    int8_t status[KEYS];
    struct facts now;
    facts_read(w, &now);
    for (int k = 0; k < KEYS; k++) {
        sc_get_status(&w->seats[seat], keys[k], KEY_BYTES, NULL, 1, &status[k]);
        if (status[k] == SC_OK && d->e->need[k] == ABSENT)
            found(r, "key %d before recovery: readable, and nobody published it", k);
        if (status[k] != SC_OK && d->e->need[k] == MUST)
            found(r, "key %d before recovery: status %d, and it was READY and not being removed", k, status[k]);
        if ((status[k] == SC_LOST) != lost(&now, k))
            found(r, "key %d before recovery: status %d, against its region", k, status[k]);
    }
}

static void read_all(struct world *w, const struct death *d, struct sc_segment *s, bool reaped, struct report *r)
{
    for (int k = 0; k < KEYS; k++) {
        struct sc_ref ref;
        struct facts now;
        facts_read(w, &now);
        /* To give back the only share of a temporary object would remove it. */
        if (now.slot_of[k] >= 0 && now.slots[now.slot_of[k]].state & SC_TEMPORARY) {
            int8_t status;
            sc_get_status(s, keys[k], KEY_BYTES, NULL, 1, &status);
            check_key(w, d->e, &now, k, status, NULL, reaped, r);
            continue;
        }
        int status = do_read(s, (uint32_t)k, SC_READ_FRESH, &ref);
        check_key(w, d->e, &now, k, status, status == SC_OK ? &ref : NULL, reaped, r);
        if (status == SC_OK && sc_release(s, &ref, 1) != 1)
            found(r, "key %d: its fresh share cannot be given back", k);
    }
}

/* The first to come; gives back the process that goes on as C, or NULL. */
static struct sc_segment *arrive(struct world *w, const struct death *d, enum first first, struct report *r)
{
    const struct member *m = &d->member;
    int rc, expected = 0;
    if (first == FIRST_SURVIVOR)
        reap(&w->seats[survivor_of(d, false)], "by a survivor", r);
    if (first == FIRST_READER) {
        read_all(w, d, &w->seats[survivor_of(d, false)], false, r);
        verify(&w->seats[survivor_of(d, true)], "by a survivor, nothing reaped", r);
    }
    if (first == FIRST_SUCCESSOR) {
        rc = seat_join(w, C, m->group, m->rank, m->world_size);
        expected = m->joins;
    } else {
        rc = seat_join(w, C, "", 0, 1);
        if (rc == SC_E_NO_LANE) { /* the last lane is kept for the rank that died in it */
            rc = seat_join(w, C, m->group, m->rank, m->world_size);
            expected = m->joins;
        }
    }
    if (rc != expected)
        found(r, "join: %d, expected %d", rc, expected);
    return rc == 0 ? &w->seats[C] : NULL;
}

/* What becomes of a write by several lanes, as writers.h has it. */
enum fate { GONE, LOST, KEPT };

static enum fate fate_of(const struct death *d, const struct facts *left, uint32_t slot)
{
    uint64_t state = left->slots[slot].state;
    uint32_t filling = 0, done = parts_done(left, slot);
    bool lost = state & SC_DETACHED, group_lives = lives(d, A) || lives(d, B);
    if (state & SC_SEALED)
        return GONE; /* by the dead: survivors' operations are whole */
    for (uint32_t lane = 0; lane < LANES; lane++)
        if (sc_stage(left->words[lane][slot]) == SC_STAGE_WRITING) {
            bool alive = d->e->survives[lane];
            filling += alive;
            lost = lost || !alive;
        } else if (fills(&d->e->before, slot, lane) && !sc_stage(left->words[lane][slot])) {
            lost = true; /* it was about to give its part up */
        }
    if (filling)
        return lost ? LOST : KEPT;
    return lost || done == 0 || done >= left->slots[slot].writers || !group_lives ? GONE : KEPT;
}

static void check_together(const struct death *d, const struct facts *left, const struct facts *now, uint32_t slot,
                           struct report *r)
{
    uint64_t was = left->slots[slot].state, is = now->slots[slot].state;
    bool same = sc_generation(was) == sc_generation(is) && sc_state_of(is) == SC_WRITING;
    enum fate fate = fate_of(d, left, slot), found_fate = !same ? GONE : is & SC_DETACHED ? LOST : KEPT;
    if (fate != found_fate)
        found(r, "slot %u, written together: state %llx -> %llx, which is %d and should be %d (gone, lost, kept)", slot,
              (unsigned long long)was, (unsigned long long)is, found_fate, fate);
}

static bool written_together(const struct facts *left, uint32_t slot)
{
    return sc_state_of(left->slots[slot].state) == SC_WRITING && left->slots[slot].writers > 1;
}

static bool published(const struct facts *a, const struct facts *b, uint32_t slot)
{
    return sc_generation(a->slots[slot].state) == sc_generation(b->slots[slot].state) &&
           sc_state_of(a->slots[slot].state) == SC_WRITING && sc_state_of(b->slots[slot].state) == SC_READY;
}

static void check_word(const struct death *d, const struct facts *found_first, const struct facts *now, uint32_t lane,
                       uint32_t slot, struct report *r)
{
    const struct facts *a = &d->e->before, *b = &d->e->after;
    uint64_t word = now->words[lane][slot], was = a->words[lane][slot], becomes = b->words[lane][slot];
    /* Who gave up or died took the whole write with it; a part that the dead one had done stays with the write. */
    if (written_together(found_first, slot) && (sc_state_of(now->slots[slot].state) == SC_FREE ||
                                                (!d->e->survives[lane] && sc_stage(word) == SC_STAGE_DONE)))
        word = sc_has_shares(word) ? word : was;
    if (word == was && written_together(found_first, slot))
        return;
    /* Expired shares end with their object; whether it may be gone is checked by its key. */
    bool gone = sc_generation(now->slots[slot].state) != sc_generation(a->slots[slot].state);
    if (gone && word == 0 && (sc_held(was) == 0 || becomes == 0))
        return;
    /* Grants come before READY: an object that is there has all that it was published with. */
    bool there = sc_state_of(now->slots[slot].state) == SC_READY && !gone;
    if (there && published(a, b, slot))
        was = becomes;
    /* A lane that was set aside and that the dead one had not yet taken. */
    bool untouched = a->incarnations[lane] == a->reaped[lane] &&
                     found_first->incarnations[lane] == a->incarnations[lane];
    if (d->e->survives[lane] || untouched) {
        bool taken = !d->e->survives[lane] && !a->kept[lane] && word == 0; /* by who came first, from a dead group */
        if (word != was && word != becomes && !taken)
            found(r, "share word of lane %u, slot %u: %llx; before %llx, after %llx", lane, slot, (unsigned long long)word,
                  (unsigned long long)was, (unsigned long long)becomes);
    } else if (word) {
        found(r, "share word of the dead lane %u, slot %u: %llx", lane, slot, (unsigned long long)word);
    }
}

/* What is counted is whole; all our layouts are called so. */
static void check_layouts(struct sc_segment *s, struct report *r)
{
    char spec[SC_MAX_SPEC];
    uint32_t bytes, n = sc_peek32(&sc_header(s)->layouts);
    for (uint32_t number = 1; number <= n; number++)
        if (sc_layout_spec(s, number, spec, &bytes) != 0 || bytes != 8 || !memmem(spec, bytes, "layout", 6))
            found(r, "layout %u of %u is not whole", number, n);
}

static void check_shares_and_writes(struct world *w, const struct death *d, const struct facts *left, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    for (uint32_t lane = 0; lane < LANES; lane++)
        for (uint32_t slot = 0; slot < SLOTS; slot++)
            if (now.unused[lane] && sc_has_shares(now.words[lane][slot]))
                found(r, "lane %u is nobody's and has shares of slot %u: %llx", lane, slot,
                      (unsigned long long)now.words[lane][slot]);
            else
                check_word(d, left, &now, lane, slot, r);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        const uint64_t *writes = d->e->writes[slot];
        uint64_t state = now.slots[slot].state;
        bool writing = sc_state_of(state) == SC_WRITING;
        if (written_together(left, slot)) {
            check_together(d, left, &now, slot, r);
            continue;
        }
        if (writing ? state != writes[0] && state != writes[1] : writes[0] && writes[0] == writes[1])
            found(r, "slot %u: state %llx; a survivor's write was %llx, becomes %llx", slot, (unsigned long long)state,
                  (unsigned long long)writes[0], (unsigned long long)writes[1]);
        if (writing && writes[0] && writes[0] == writes[1] && now.slots[slot].version != d->e->before.slots[slot].version)
            found(r, "slot %u: a survivor's half-written bytes changed", slot);
    }
}

/* The successor can do what it came for: grant to every rank of its group, whose lanes the dead one may have been about to
 * set aside. */
static void check_grants(struct world *w, const struct death *d, struct sc_segment *s, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    for (int k = 0; k < KEYS; k++) {
        int8_t status = SC_LOST;
        uint32_t ranks = d->member.world_size;
        if (!readable(&now, k) || now.slots[now.slot_of[k]].state & SC_TEMPORARY)
            continue;
        int granted = do_grant(s, (uint32_t)k, ranks);
        reap(s, "of what was there before the grant", r);
        sc_cancel_read(s, keys[k], KEY_BYTES, NULL, 1, ranks, &status);
        if (granted != SC_OK || status != SC_OK)
            found(r, "the successor grants key %d to %u ranks: %d, and takes it back: %d", k, ranks, granted, status);
        return;
    }
}

/* What a recovery may not change, in one order. */
struct essence {
    struct sc_slot slots[SLOTS];
    struct sc_region regions[REGIONS];
    uint64_t shares[LANES][SLOTS], maps[2], lock, entries[64];
    uint32_t owners[ALL_BLOCKS], counts[5];
    struct { uint32_t incarnation, reaped, role, rank, world_size, group_bytes, pid; char group[SC_MAX_GROUP]; } lanes[LANES];
};

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void essence_of(const struct sc_segment *s, struct essence *e)
{
    memset(e, 0, sizeof *e);
    const struct sc_header *h = sc_header(s);
    memcpy(e->slots, (const void *)sc_slot(s, 0), sizeof e->slots);
    e->maps[0] = sc_peek(sc_slot_map(s));
    e->maps[1] = sc_peek(sc_block_map(s));
    e->lock = sc_peek(&h->lock);
    memcpy(e->regions, (const void *)sc_region(s, 1), sizeof e->regions);
    for (uint32_t i = 0; i < REGIONS; i++)
        sc_poke32(&e->regions[i].block_cursor, 0);
    for (uint32_t b = 0; b < ALL_BLOCKS; b++)
        e->owners[b] = sc_block_used(s, b) ? sc_peek32(sc_owner(s, b)) : SC_NO_SLOT;
    uint32_t counts[] = {sc_peek32(&h->lane_limit), sc_peek32(&h->layouts), sc_peek32(&h->free_blocks), sc_peek32(&h->free_slots),
                         sc_peek32(&h->detached)};
    memcpy(e->counts, counts, sizeof counts);
    for (uint64_t at = 0; at < UINT64_C(1) << s->g.index_bits && at < 64; at++)
        e->entries[at] = sc_index_entry(s, at);
    qsort(e->entries, 64, sizeof e->entries[0], by_value);
    for (uint32_t i = 0; i < LANES; i++) {
        const struct sc_lane *l = sc_lane(s, i);
        for (uint32_t slot = 0; slot < SLOTS; slot++)
            e->shares[i][slot] = sc_peek(sc_share(s, i, slot));
        e->lanes[i].incarnation = sc_peek32(&l->incarnation);
        e->lanes[i].reaped = sc_peek32(&l->reaped);
        e->lanes[i].role = sc_peek32(&l->role);
        e->lanes[i].rank = sc_peek32(&l->rank);
        e->lanes[i].world_size = sc_peek32(&l->world_size);
        e->lanes[i].group_bytes = sc_peek32(&l->group_bytes);
        e->lanes[i].pid = sc_peek32(&l->pid);
        sc_peek_text(l->group, SC_MAX_GROUP / 8, e->lanes[i].group);
    }
}

static void check_second_recovery(struct sc_segment *s, struct report *r)
{
    static struct essence once, twice;
    struct sc_reaped reaped = {0};
    essence_of(s, &once);
    if (once.lock)
        found(r, "the lock is %llx after recovery", (unsigned long long)once.lock);
    /* Held by an incarnation that nobody has: its holder is dead. */
    sc_poke(&sc_header(s)->lock, UINT64_C(0xfffffff1) << 32 | 1);
    int rc = sc_begin(s, 0, &reaped);
    if (rc == 0) {
        sc_reap_dead(s, &reaped);
        sc_end(s);
    }
    if (rc != 0 || !reaped.lock || reaped.lanes || reaped.shares || reaped.writes)
        found(r, "second recovery: %d, lanes %llu, shares %llu, writes %llu", rc, (unsigned long long)reaped.lanes,
              (unsigned long long)reaped.shares, (unsigned long long)reaped.writes);
    essence_of(s, &twice);
    if (memcmp(&once, &twice, sizeof once) != 0) {
        size_t at = 0;
        while (((const char *)&once)[at] == ((const char *)&twice)[at])
            at++;
        found(r, "a second recovery changed something (byte %zu of struct essence)", at);
    }
}

/* Held shares are given back, reserved ones claimed first; there are as many as the words say. */
static void spend_shares(struct world *w, struct sc_segment *s, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t word = now.words[s->lane][slot], state = now.slots[slot].state;
        struct sc_ref ref = {.nbytes = now.slots[slot].nbytes, .slot = slot, .generation = sc_generation(state),
                             .region = (uint16_t)now.slots[slot].region, .status = SC_OK};
        /* Of what is lost a reserved share is given back by who asks for it. */
        bool lives = now.regions[now.slots[slot].region].lives;
        for (uint32_t i = 0; i < sc_reserved(word); i++) {
            struct sc_ref claimed;
            if (do_read(s, (uint32_t)now.slots[slot].key, 0, &claimed) != (lives ? SC_OK : SC_LOST))
                found(r, "lane %u: its reserved share of slot %u cannot be claimed", s->lane, slot);
        }
        uint64_t rest = sc_load(sc_share(s, s->lane, slot));
        if (!lives && sc_generation(rest) == sc_generation(state) && sc_reserved(rest))
            found(r, "lane %u: it still has reserved shares of slot %u, which is lost", s->lane, slot);
        for (uint32_t i = 0; i < sc_held(word) + (lives ? sc_reserved(word) : 0); i++)
            if (sc_release(s, &ref, 1) != 1)
                found(r, "lane %u: its held share of slot %u cannot be given back", s->lane, slot);
        if (word && sc_release(s, &ref, 1) != 0)
            found(r, "lane %u: one share of slot %u more than it had", s->lane, slot);
    }
}

static void finish_writes(struct world *w, struct sc_segment *s, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        const struct object *o = &now.slots[slot];
        if (!fills(&now, slot, s->lane))
            continue;
        struct sc_ref ref = {.nbytes = o->nbytes, .slot = slot, .generation = sc_generation(o->state), .status = SC_OK};
        bool last = o->writers == 1 || parts_done(&now, slot) + 1 >= o->writers;
        int status = do_publish(s, &ref, 0), expected = o->state & SC_DETACHED ? SC_NOT_OWNER : last ? SC_OK : SC_PART;
        if (expected != SC_NOT_OWNER && !now.regions[o->region].lives)
            expected = SC_LOST;
        if (status != expected)
            found(r, "lane %u: publishing its write in slot %u gives %d", s->lane, slot, status);
    }
}

/* Rank 2 of g comes at last, and finds what was granted to it. */
static void late_rank_comes(struct world *w, const struct death *d, struct report *r)
{
    if (!lives(d, A) || sc_load32(&sc_header(&w->seats[A])->retired) ||
        sc_lane_held(&w->seats[A], w->who[A].rank_lanes[RANKS - 1]))
        return;
    int rc = seat_join(w, D, "g", RANKS - 1, RANKS);
    if (rc != 0)
        found(r, "rank %d cannot come: %d", RANKS - 1, rc);
    else
        spend_shares(w, &w->seats[D], r);
}

static void survivors_go_on(struct world *w, const struct death *d, struct report *r)
{
    for (int i = 0; i < C; i++)
        if (lives(d, (enum seat)i)) {
            spend_shares(w, &w->seats[i], r);
            finish_writes(w, &w->seats[i], r);
        }
    if (!lives(d, D))
        late_rank_comes(w, d, r);
}

/* Every block and every slot at once: slots of one block, and of two, until both have run out. */
static void fill(struct world *w, struct sc_segment *s, struct report *r)
{
    for (uint32_t k = 0; k < SLOTS; k++) {
        uint64_t nbytes = (k < BLOCKS - SLOTS ? 2 : 1) * BLOCK_BYTES;
        int status = do_put(w, s, k, nbytes, 9);
        if (status != SC_OK)
            found(r, "filling: object %u of %llu bytes gives %d", k, (unsigned long long)nbytes, status);
    }
    for (uint32_t k = 0; k < SLOTS; k++) {
        struct sc_ref ref;
        if (do_read(s, k, 0, &ref) != SC_OK || version_at(w, k, &ref) != 9)
            found(r, "filling: object %u is not there as written", k);
        else
            sc_release(s, &ref, 1);
    }
}

/* All the rest dies, too. Then everything is there to be used: lanes, slots, blocks. */
static void check_reuse(struct world *w, struct report *r)
{
    for (int i = 0; i < SEATS; i++)
        world_leave(w, (enum seat)i);
    for (int i = 0; i < LANES; i++) {
        int rc = seat_join(w, (enum seat)i, "", 0, 1);
        if (rc != 0)
            found(r, "lane %d of %d cannot be taken: %d", i + 1, LANES, rc);
        if (rc != 0)
            return;
    }
    struct sc_segment *s = &w->seats[0];
    reap(s, "of all", r);
    sc_clear(s);
    if (sc_peek32(&sc_header(s)->free_blocks) != BLOCKS || sc_peek32(&sc_header(s)->free_slots) != SLOTS)
        found(r, "after clear %u blocks and %u slots are free", sc_peek32(&sc_header(s)->free_blocks),
              sc_peek32(&sc_header(s)->free_slots));
    fill_regions(w, s, r);
    sc_clear(s);
    fill(w, s, r);
    verify(s, "of the full arena", r);
}

static void check_retired(struct world *w, const struct death *d, struct report *r)
{
    uint32_t pid;
    struct facts now;
    facts_read(w, &now);
    int rc = seat_join(w, C, "", 0, 1);
    if (rc != SC_E_RETIRED)
        found(r, "join of a retired segment: %d", rc);
    if (survivor_of(d, false) != SEATS) {
        reap(&w->seats[survivor_of(d, false)], "in a retired segment", r);
        verify(&w->seats[survivor_of(d, false)], "in a retired segment", r);
        check_shares_and_writes(w, d, &now, r);
        survivors_go_on(w, d, r);
    }
    rc = sc_retire(seat_empty(w, C), false, &pid); /* the next destroy takes the name away */
    if (rc != 0)
        found(r, "the destroyer after the dead one gets %d", rc);
    sc_door_close(&w->seats[C]);
}

void check_death(struct world *w, const struct death *d, enum first first, struct report *r)
{
    struct snapshot image = {.bytes = (uint8_t *)d->bytes};
    struct facts left;
    memcpy(image.who, d->who, sizeof image.who);
    image.who[d->dead].alive = false;
    world_restore(w, &image, SEATS);
    facts_read(w, &left);
    check_statuses(w, d, r);
    if (left.retired) {
        check_retired(w, d, r);
        return;
    }
    struct sc_segment *s = arrive(w, d, first, r);
    if (s == NULL)
        s = survivor_of(d, false) == SEATS ? NULL : &w->seats[survivor_of(d, false)];
    if (s) {
        if (first == FIRST_SUCCESSOR && w->who[C].alive)
            check_grants(w, d, s, r);
        reap(s, "after the death", r);
        verify(s, "after the death", r);
        check_shares_and_writes(w, d, &left, r);
        check_regions(w, d, &left, r);
        read_all(w, d, s, true, r);
        check_layouts(s, r);
        check_second_recovery(s, r);
        survivors_go_on(w, d, r);
        check_nothing_stays(w, "when survivors had gone on", r);
        verify(s, "when survivors had gone on", r);
    }
    check_reuse(w, r);
}
