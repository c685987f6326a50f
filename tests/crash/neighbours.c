#include "neighbours.h"

#include "authority.h"
#include "region_check.h"

/* The stepped one holds the lock: nobody else who lives does, since the neighbour's operations are whole. */
static bool lock_is_held(const struct stepper *t)
{
    const struct sc_header *h = (const struct sc_header *)t->w->map;
    uint64_t word = sc_peek(&h->lock);
    uint32_t lane = (uint32_t)(word & 0xffff) - 1;
    const struct sc_lane *lanes = (const struct sc_lane *)(t->w->map + t->w->g.lane_table);
    if (word == 0 || lane >= LANES || sc_peek32(&lanes[lane].incarnation) != word >> 32)
        return false;
    return t->locks >> lane & 1;
}

static void note(struct bench *b, const struct neighbour *n, const char *what, const struct report *from, struct result *r)
{
    if (from->findings == 0)
        return;
    found(&r->report, "stop %llu, instruction %llu, before address 0x%llx, the neighbour last did %s key %d; %s:\n%s",
          (unsigned long long)b->stepper.stops, (unsigned long long)b->stepper.instructions,
          (unsigned long long)b->stepper.address, n->did ? n->did : "nothing", n->key, what, from->text);
}

/* Everything READY in the image must be there after the death, and every living lane's share as in the image. */
static void die_here(struct bench *b, const struct scene *scene, const struct neighbour *n, struct seen *seen,
                     uint8_t *image, struct result *r)
{
    struct report report = {0};
    struct facts facts;
    struct expectation e;
    world_save(&b->live, image);
    if (seen_before(seen, hash_bytes(image, snapshot_bytes(&b->live.g))))
        return;
    facts_read(&b->live, &facts);
    expect(&facts, &facts, b->live.who, S, &e);
    struct death d = {image, b->live.who, S, scene->member, &e};
    enum first first = (enum first)(b->stepper.stops % FIRSTS);
    check_death(&b->copy, &d, applies(&d, first) ? first : FIRST_JOINER, &report);
    r->checks++;
    note(b, n, "as a death", &report, r);
}

/* Reserved shares that the stepped one added to each word, less what it took back, of the word's last generation. */
struct grants { uint32_t generation[LANES][SLOTS]; int32_t net[LANES][SLOTS]; };

static void count_grants(const struct stepper *t, struct grants *g)
{
    for (uint32_t lane = 0; lane < LANES; lane++)
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            uint64_t at = t->w->g.shares + lane * t->w->g.share_stride + slot * 8, was, is;
            memcpy(&was, t->copy + at, 8);
            memcpy(&is, t->w->map + at, 8);
            if (was == is)
                continue;
            int32_t before = sc_generation(was) == sc_generation(is) ? (int32_t)sc_reserved(was) : 0;
            if (g->generation[lane][slot] != sc_generation(is))
                g->net[lane][slot] = 0;
            g->generation[lane][slot] = sc_generation(is);
            g->net[lane][slot] += (int32_t)sc_reserved(is) - before;
        }
}

/* To all ranks or to none: here the first two of g, to whom every granting operation grants. */
static void check_grants(struct bench *b, const struct scene *scene, const struct grants *g, struct report *report)
{
    struct facts now;
    const uint16_t *lanes = scene->start->who[A].rank_lanes;
    facts_read(&b->live, &now);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint32_t generation = sc_generation(now.slots[slot].state);
        int32_t net[2];
        for (int rank = 0; rank < 2; rank++)
            net[rank] = g->generation[lanes[rank]][slot] == generation ? g->net[lanes[rank]][slot] : 0;
        if (sc_state_of(now.slots[slot].state) == SC_READY && net[0] != net[1])
            found(report, "slot %u: the stepped one granted %d to rank 0 and %d to rank 1", slot, net[0], net[1]);
    }
}

/* The shares that the stepped one was told it has are in its row. */
static void check_own_shares(struct bench *b, const struct scene *scene, const struct facts *before, const struct op *op,
                             struct report *report)
{
    struct facts now;
    const struct outcome *out = b->stepper.out;
    const struct identity *who = &scene->start->who[S];
    facts_read(&b->live, &now);
    if (!who->alive || op->flags & OP_LOCKS)
        return; /* it came, or went */
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        int64_t held = sc_held(before->words[who->lane][slot]), is = sc_held(now.words[who->lane][slot]);
        for (uint32_t i = 0; i < out->refs_n; i++)
            held += out->reads && out->refs[i].status == SC_OK && out->refs[i].nbytes && out->refs[i].slot == slot;
        for (uint32_t i = 0; i < scene->refs_n; i++)
            held -= out->releases && scene->refs[i].status == SC_OK && scene->refs[i].slot == slot;
        if (held != is)
            found(report, "slot %u: the stepped one holds %lld shares, and its word says %lld", slot, (long long)held,
                  (long long)is);
    }
}

/* What it writes has just become READY, in a region that was given up. */
static bool publishes_late(const struct stepper *t, const struct scene *scene)
{
    const struct sc_ref *ref = &scene->refs[0];
    uint64_t at = t->w->g.slot_table + ref->slot * sizeof(struct sc_slot), was, is;
    if (scene->refs_n == 0 || ref->region == 0)
        return false;
    memcpy(&was, t->copy + at, 8);
    memcpy(&is, t->w->map + at, 8);
    const struct sc_region *r = (const struct sc_region *)(t->w->map + t->w->g.region_table) + (ref->region - 1);
    return sc_state_of(was) == SC_WRITING && is == sc_published(was) && sc_kind_of(sc_peek(&r->state)) != SC_REGION_LIVE;
}

/* Until a joiner has said that its lane has a new life, the old one seems to go on. */
static void seat_joiner(struct world *w, const struct stepper *t)
{
    for (uint32_t lane = 0; lane < LANES; lane++) {
        const struct sc_lane *l = (const struct sc_lane *)(w->map + w->g.lane_table) + lane;
        bool others = false;
        for (int i = 0; i < SEATS; i++)
            others = others || (i != S && w->who[i].alive && w->who[i].lane == lane);
        if (t->locks >> lane & 1 && !others)
            w->who[S] = (struct identity){.alive = true, .lane = lane, .incarnation = sc_peek32(&l->incarnation)};
    }
}

static void check_end(struct bench *b, const struct scene *scene, const struct facts *before, const struct op *op,
                      const struct grants *grants, struct neighbour *n, bool late, struct report *report)
{
    char text[2000];
    int64_t rc = b->stepper.out->rc;
    bool refused = rc == SC_E_NO_LANE || rc == SC_E_REGIONS || rc == SC_E_UNLIKE || rc == SC_E_RETIRED || (rc == SC_E_BUSY && op->flags & OP_LOCKS);
    if (rc < 0 && !refused)
        found(report, "the stepped one gets %lld", (long long)rc);
    if ((rc = sc_verify(n->s, text, sizeof text)) != 0)
        found(report, "verify when both are done: %lld: %s", (long long)rc, text);
    if (late && b->stepper.out->status[0] != SC_LOST)
        found(report, "it was published after its region was given up: status %d", b->stepper.out->status[0]);
    check_own_shares(b, scene, before, op, report);
    struct sc_reaped reaped;
    sc_reap(n->s, false, &reaped); /* who gave the last share back may not have had the lock */
    check_nothing_stays(&b->live, "when both are done", report);
    if (op->flags & OP_GRANTS)
        check_grants(b, scene, grants, report);
}

void run_neighbours(struct bench *b, struct scene *scene, const struct op *op, uint64_t seed, uint64_t stop, uint32_t acts,
                    uint64_t *counts, struct result *r)
{
    enum { ENOUGH = 6 };
    struct stepper *t = &b->stepper;
    struct seen seen = {0};
    struct facts before;
    struct grants grants = {0};
    uint8_t *image = malloc(snapshot_bytes(&b->live.g));
    enum seat seat = random_of(&seed) % 2 ? A : B;
    struct neighbour n = {.w = &b->live, .s = &b->live.seats[seat], .seed = seed, .version = 100,
                          .about = {scene->readable, scene->free, scene->written, scene->abandoned, scene->own}};
    if (!image)
        die("malloc");
    bool more = step_begin(t, scene, op), late = false;
    facts_read(&b->live, &before);
    while (more && r->report.findings < ENOUGH) {
        struct report report = {0};
        if (!(more = step_next(t)))
            break;
        check_authority(t, &report);
        if (op->flags & OP_JOINS)
            seat_joiner(&b->live, t);
        late = late || publishes_late(t, scene);
        count_grants(t, &grants);
        note(b, &n, "authority", &report, r);
        report = (struct report){0};
        for (uint32_t i = 0; (stop == EVERY_STOP || t->stops == stop) && i < acts && !report.findings; i++)
            neighbour_acts(&n, lock_is_held(t), t->locks >> 63, &report);
        note(b, &n, "what it did", &report, r);
        step_accept_all(t);
        if (stop == EVERY_STOP || t->stops >= stop)
            die_here(b, scene, &n, &seen, image, r);
    }
    struct report report = {0};
    if (t->failure[0])
        found(&report, "%s", t->failure);
    else if (!more)
        check_end(b, scene, &before, op, &grants, &n, late, &report);
    note(b, &n, "at the end", &report, r);
    for (uint32_t i = 0; neighbour_operation(i); i++)
        counts[i] += n.operations[i];
    r->instructions += t->instructions;
    r->stops += t->stops;
    r->distinct += seen.n;
    r->rc = t->out->rc;
    step_end(t);
    free(seen.at);
    free(image);
}
