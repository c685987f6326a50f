#include "recoveries.h"

#include "neighbour.h"

enum { SAMPLES = 3, FOLLOWERS = 3 };

/* A fair sample of the images in which the dead one held the lock, or was in the door. */
struct sample {
    uint8_t *images[SAMPLES];
    uint64_t instructions[SAMPLES], n, seed, bytes;
};

static void maybe_keep(const struct bench *b, const struct scene *scene, const uint8_t *bytes, void *arg)
{
    struct sample *sample = arg;
    const struct sc_header *h = (const struct sc_header *)bytes;
    (void)scene;
    if (sc_peek(&h->lock) == 0 && sc_peek32(&h->door_pid) == 0)
        return;
    uint64_t at = sample->n++;
    if (at >= SAMPLES && (at = random_of(&sample->seed) % sample->n) >= SAMPLES)
        return;
    memcpy(sample->images[at], bytes, sample->bytes);
    sample->instructions[at] = b->stepper.instructions;
}

/* What follows a death: B does something that needs no preparation, or a new process joins. */
static bool joins(const struct op *op)
{
    return strcmp(op->name, "join_takeover") == 0 || strcmp(op->name, "join_private") == 0;
}

static const struct op *pick_follower(uint64_t *seed, bool joiner)
{
    for (;;) {
        const struct op *op = &ops[random_of(seed) % ops_n];
        if (joiner ? joins(op) : op->prepare == NULL)
            return op;
    }
}

static void make_follower(const struct scene *from, const uint8_t *bytes, uint64_t n, const struct op *op,
                          struct scene *to)
{
    bool alone = strcmp(op->name, "join_private") == 0;
    to->refs_n = 0;
    memcpy(to->start->bytes, bytes, n);
    memcpy(to->start->who, from->start->who, sizeof to->start->who);
    to->start->who[S].alive = false;
    to->member = alone ? (struct member){"", 0, 1, 0} : (struct member){"g", 0, RANKS, 0};
    if (joins(op))
        return;
    to->start->who[S] = from->start->who[B];
    to->start->who[B].alive = false;
    to->member = (struct member){"g", -1, RANKS, 0};
}

static bool series(struct bench *b, struct scene *scene, const struct op *op, const char *state, uint64_t *seed,
                   uint32_t depth)
{
    uint64_t bytes = snapshot_bytes(&b->live.g);
    struct sample sample = {.seed = random_of(seed), .bytes = bytes};
    struct result *r = calloc(1, sizeof *r);
    bool good;
    for (int i = 0; i < SAMPLES; i++)
        if (!r || !(sample.images[i] = malloc(bytes)))
            die("malloc");
    r->op = op->name;
    r->state = state;
    run_deaths(b, scene, op, maybe_keep, &sample, r);
    print_result("recoveries", r);
    good = r->report.findings == 0;
    for (uint64_t i = 0; depth > 0 && i < SAMPLES && i < sample.n; i++)
        for (int f = 0; f < FOLLOWERS; f++) {
            bool joiner = random_of(seed) % 4 == 0 || !scene->start->who[B].alive;
            const struct op *next = pick_follower(seed, joiner);
            char name[400];
            struct scene then = *scene;
            then.start = snapshot_new(&b->live.g);
            snprintf(name, sizeof name, "%s, dead in %s at %llu", state, op->name, (unsigned long long)sample.instructions[i]);
            make_follower(scene, sample.images[i], bytes, next, &then);
            good = series(b, &then, next, name, seed, depth - 1) && good;
            scene_free(&then);
        }
    for (int i = 0; i < SAMPLES; i++)
        free(sample.images[i]);
    free(r);
    return good;
}

bool run_recoveries(struct bench *b, uint64_t index, uint32_t depth)
{
    uint64_t seed = b->seed * 1000003 + index;
    for (;;) {
        struct scene scene;
        const struct op *op = &ops[random_of(&seed) % ops_n];
        const struct state *state = &states[random_of(&seed) % states_n];
        char name[80];
        if (!scene_make(&b->copy, state, op, &scene))
            continue;
        snprintf(name, sizeof name, "series %llu: %s", (unsigned long long)index, state->name);
        bool good = series(b, &scene, op, name, &seed, depth);
        scene_free(&scene);
        return good;
    }
}
