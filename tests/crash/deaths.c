#include "deaths.h"

#include "authority.h"
#include "region_check.h"

uint64_t hash_bytes(const uint8_t *bytes, uint64_t n)
{
    uint64_t h = n;
    for (uint64_t i = 0; i + 16 <= n; i += 16) {
        uint64_t a, b;
        memcpy(&a, bytes + i, 8);
        memcpy(&b, bytes + i + 8, 8);
        h = sc_mix(a ^ UINT64_C(0xa0761d6478bd642f), b ^ h);
        h += i;
    }
    return h;
}

bool seen_before(struct seen *seen, uint64_t hash)
{
    if (seen->at == NULL || 2 * seen->n >= seen->mask) {
        struct seen more = {calloc(seen->at ? 2 * (seen->mask + 1) : 1024, 8), seen->at ? 2 * seen->mask + 1 : 1023, 0};
        if (!more.at)
            die("calloc");
        for (uint64_t i = 0; seen->at && i <= seen->mask; i++)
            if (seen->at[i])
                seen_before(&more, seen->at[i]);
        free(seen->at);
        *seen = more;
    }
    hash += hash == 0;
    uint64_t i = hash & seen->mask;
    for (; seen->at[i]; i = (i + 1) & seen->mask)
        if (seen->at[i] == hash)
            return true;
    seen->at[i] = hash;
    seen->n++;
    return false;
}

static void sum_counters(const struct world *w, uint64_t out[SC_COUNTER_COUNT])
{
    const struct sc_lane *lanes = (const struct sc_lane *)(w->map + w->g.lane_table);
    for (uint32_t c = 0; c < SC_COUNTER_COUNT; c++) {
        out[c] = 0;
        for (uint32_t lane = 0; lane < LANES; lane++)
            out[c] += sc_peek(&lanes[lane].counters[c]);
    }
}

void rehearse(struct bench *b, const struct scene *scene, const struct op *op, struct facts *after, struct result *r)
{
    static struct outcome outcome;
    struct world *w = &b->copy;
    struct call call = {w, &w->seats[S], scene, &outcome};
    uint64_t before[SC_COUNTER_COUNT];
    struct facts first;
    char text[2000];
    world_restore(w, scene->start, op->flags & OP_JOINS ? S : SEATS);
    memset(&outcome, 0, sizeof outcome);
    facts_read(w, &first);
    sum_counters(w, before);
    op->run(&call);
    sum_counters(w, r->effects);
    for (uint32_t c = 0; c < SC_COUNTER_COUNT; c++)
        r->effects[c] -= before[c];
    r->rc = outcome.rc;
    facts_read(w, after);
    r->index_rebuilds = (after->index_seq - first.index_seq) / 2;
    if (after->retired || !scene->start->who[B].alive)
        return;
    if (sc_verify(&w->seats[B], text, sizeof text) != 0)
        found(&r->report, "undisturbed: %s", text);
    check_nothing_stays(w, "undisturbed", &r->report); /* what a death had left is recovered by now: B had the lock */
}

static void complain(const struct stepper *t, const char *where, const struct report *from, struct report *to)
{
    if (from->findings == 0)
        return;
    found(to, "instruction %llu, before address 0x%llx, %s:\n%s", (unsigned long long)t->instructions,
          (unsigned long long)t->address, where, from->text);
}

static const char *const first_names[FIRSTS] = {"a joiner first", "a survivor first", "a successor first",
                                                "a reader first"};

static void check_all(struct bench *b, const struct death *d, struct result *r)
{
    for (int first = 0; first < FIRSTS; first++) {
        struct report report = {0};
        if (!applies(d, (enum first)first))
            continue;
        check_death(&b->copy, d, (enum first)first, &report);
        r->checks++;
        complain(&b->stepper, first_names[first], &report, &r->report);
    }
}

enum { ENOUGH = 12 }; /* findings, to stop at */

void run_deaths(struct bench *b, struct scene *scene, const struct op *op, each_image each, void *arg, struct result *r)
{
    struct stepper *t = &b->stepper;
    struct seen seen = {0};
    struct facts before, after;
    struct expectation e;
    uint64_t bytes = snapshot_bytes(&b->live.g);
    uint8_t *image = malloc(bytes);
    if (!image)
        die("malloc");
    rehearse(b, scene, op, &after, r);
    scene->member.joins = op->flags & OP_JOINS ? (int)r->rc : 0;
    world_restore(&b->copy, scene->start, SEATS);
    facts_read(&b->copy, &before);
    expect(&before, &after, scene->start->who, S, &e);
    struct death d = {image, scene->start->who, S, scene->member, &e};
    for (bool more = step_begin(t, scene, op); more && r->report.findings < ENOUGH;) {
        struct report report = {0};
        more = step_next(t);
        if (more) {
            check_authority(t, &report);
            complain(t, "authority", &report, &r->report);
        }
        world_save(&b->live, image);
        if (t->failure[0] == 0 && !seen_before(&seen, hash_bytes(image, bytes))) {
            check_all(b, &d, r);
            if (each)
                each(b, scene, image, arg);
        }
        step_accept(t);
    }
    if (t->failure[0])
        found(&r->report, "%s", t->failure);
    else if (r->report.findings < ENOUGH && t->out->rc != r->rc)
        found(&r->report, "stepped it gives %lld, undisturbed %lld", (long long)t->out->rc, (long long)r->rc);
    r->instructions = t->instructions;
    r->stops = t->stops;
    r->distinct = seen.n;
    step_end(t);
    free(seen.at);
    free(image);
}

static void print_text(const char *text)
{
    putchar('"');
    for (; *text; text++)
        if (*text == '\n')
            fputs("\\n", stdout);
        else if (*text == '"' || *text == '\\')
            printf("\\%c", *text);
        else if ((unsigned char)*text >= 32)
            putchar(*text);
    putchar('"');
}

void print_result(const char *mode, const struct result *r)
{
    printf("{\"mode\": \"%s\", \"op\": \"%s\", \"state\": \"%s\", \"instructions\": %llu, \"stops\": %llu, "
           "\"distinct\": %llu, \"checks\": %llu, \"rc\": %lld, \"index_rebuilds\": %llu, "
           "\"effects\": {",
           mode, r->op, r->state, (unsigned long long)r->instructions, (unsigned long long)r->stops,
           (unsigned long long)r->distinct, (unsigned long long)r->checks, (long long)r->rc,
           (unsigned long long)r->index_rebuilds);
    const char *comma = "";
    for (uint32_t c = 0; c < SC_COUNTER_COUNT; c++)
        if (r->effects[c]) {
            printf("%s\"%s\": %llu", comma, sc_statistic_name(SC_COUNTER, c), (unsigned long long)r->effects[c]);
            comma = ", ";
        }
    printf("}, \"findings\": ");
    print_text(r->report.text);
    printf("}\n");
    fflush(stdout);
}
