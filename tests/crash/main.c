/* crash - kills a process at every instruction of every operation, and looks at what is left.
 *
 *   crash list
 *   crash rehearsals [--op NAME] [--state NAME]      the operations, undisturbed
 *   crash deaths [--op NAME] [--state NAME] [--part I/N]
 *   crash neighbours --seed N [--op NAME] [--state NAME] [--part I/N] [--count N] [--all]
 *   crash sleepers [--op NAME] [--state NAME] [--part I/N]
 *   crash create
 *   crash recoveries --seed N [--from I] [--count N] [--depth N]
 *
 * One line of JSON a scenario; --until-found stops after the first with a finding. Exit code 77: ptrace is refused here.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <unistd.h>

#include "extras.h"
#include "neighbours.h"
#include "recoveries.h"

struct choice { const char *op, *state; uint32_t part, parts, depth; uint64_t from, count; bool until_found, all; };

enum { SCENARIO_S = 120 }; /* then it hangs, and SIGALRM ends this process */

static struct bench bench;
static char now_at[200];

static void on_alarm(int signal)
{
    ssize_t n = write(STDERR_FILENO, now_at, strlen(now_at));
    (void)n;
    _exit(128 + signal);
}

static bool chosen(const struct choice *c, const struct op *op, const struct state *state, uint32_t *n)
{
    if ((c->op && strcmp(c->op, op->name) != 0) || (c->state && strcmp(c->state, state->name) != 0))
        return false;
    return (*n)++ % c->parts == c->part;
}

static bool deaths(const struct op *op, const struct state *state)
{
    static struct result r;
    struct scene scene;
    memset(&r, 0, sizeof r);
    r.op = op->name;
    r.state = state->name;
    if (!scene_make(&bench.copy, state, op, &scene))
        return true;
    run_deaths(&bench, &scene, op, NULL, NULL, &r);
    print_result("deaths", &r);
    scene_free(&scene);
    return r.report.findings == 0;
}

static bool sleepers(const struct op *op, const struct state *state)
{
    static struct result r;
    struct scene scene;
    memset(&r, 0, sizeof r);
    r.op = op->name;
    r.state = state->name;
    if (op->flags & OP_JOINS || !scene_make(&bench.copy, state, op, &scene))
        return true;
    run_sleepers(&bench, &scene, op, &r);
    print_result("sleepers", &r);
    scene_free(&scene);
    return r.report.findings == 0;
}

static bool rehearsals(const struct op *op, const struct state *state)
{
    static struct result r;
    struct scene scene;
    struct facts after;
    memset(&r, 0, sizeof r);
    r.op = op->name;
    r.state = state->name;
    if (!scene_make(&bench.copy, state, op, &scene))
        return true;
    rehearse(&bench, &scene, op, &after, &r);
    print_result("rehearsals", &r);
    scene_free(&scene);
    return r.report.findings == 0;
}

static bool create(void)
{
    static struct result r = {.op = "create", .state = "nothing"};
    run_create(&bench, &r);
    print_result("create", &r);
    return r.report.findings == 0;
}

static bool each_scenario(const struct choice *c, bool (*run)(const struct op *, const struct state *))
{
    bool good = true;
    uint32_t n = 0;
    for (uint32_t i = 0; i < ops_n; i++)
        for (uint32_t j = 0; j < states_n; j++) {
            if (!chosen(c, &ops[i], &states[j], &n))
                continue;
            snprintf(now_at, sizeof now_at, "hangs: %s in %s, seed %llu\n", ops[i].name, states[j].name,
                     (unsigned long long)bench.seed);
            alarm(SCENARIO_S);
            good = run(&ops[i], &states[j]) && good;
            if (!good && c->until_found)
                return false;
        }
    return good;
}

static uint64_t neighbours_did[32];
static const struct choice *choice;

static uint64_t hash_name(const char *name)
{
    uint64_t h = 1;
    while (*name)
        h = h * 131 + (unsigned char)*name++;
    return h;
}

/* Pass 0: the neighbour acts at every stop. Others: at one, which the seed picks; with --all at each in turn. */
static bool neighbours(const struct op *op, const struct state *state)
{
    static struct result r;
    struct scene scene;
    uint64_t stops = 1, end = choice->from + choice->count;
    bool good = true;
    memset(&r, 0, sizeof r);
    r.op = op->name;
    r.state = state->name;
    if (!scene_make(&bench.copy, state, op, &scene))
        return true;
    struct facts after;
    struct result undisturbed = {0};
    rehearse(&bench, &scene, op, &after, &undisturbed);
    scene.member.joins = op->flags & OP_JOINS ? (int)undisturbed.rc : 0;
    uint64_t own = hash_name(op->name) ^ 31 * hash_name(state->name);
    for (uint64_t pass = choice->from; pass < end && good; pass++) {
        uint64_t seed = own + bench.seed * 1000003 + pass, before = r.stops;
        uint64_t stop = pass == 0 ? EVERY_STOP : choice->all ? pass : 1 + random_of(&seed) % stops;
        run_neighbours(&bench, &scene, op, seed, stop, 1 + (uint32_t)(random_of(&seed) % 3), neighbours_did, &r);
        stops = r.stops > before ? r.stops - before : 1;
        if (choice->all && pass >= stops)
            end = pass + 1;
        good = r.report.findings == 0;
        if (!good)
            found(&r.report, "repeat: crash neighbours --seed %llu --op %s --state %s --count %llu%s",
                  (unsigned long long)bench.seed, r.op, r.state, (unsigned long long)(pass + 1),
                  choice->all ? " --all" : "");
    }
    print_result("neighbours", &r);
    scene_free(&scene);
    return good;
}

static void print_neighbours(void)
{
    printf("{\"mode\": \"operations of neighbours\"");
    for (uint32_t i = 0; neighbour_operation(i); i++)
        printf(", \"%s\": %llu", neighbour_operation(i), (unsigned long long)neighbours_did[i]);
    printf("}\n");
}

static bool each_series(const struct choice *c)
{
    bool good = true;
    for (uint64_t i = c->from; i < c->from + c->count; i++) {
        if (i % c->parts != c->part)
            continue;
        snprintf(now_at, sizeof now_at, "hangs: series %llu of seed %llu\n", (unsigned long long)i,
                 (unsigned long long)bench.seed);
        alarm(SCENARIO_S);
        good = run_recoveries(&bench, i, c->depth) && good;
        if (!good && c->until_found)
            return false;
    }
    return good;
}

static void list(void)
{
    for (uint32_t i = 0; i < ops_n; i++)
        printf("op %s\n", ops[i].name);
    for (uint32_t i = 0; i < states_n; i++)
        printf("state %s\n", states[i].name);
}

static bool can_step(void)
{
    struct scene scene;
    scene_make(&bench.copy, &states[0], &ops[0], &scene);
    bool can = step_begin(&bench.stepper, &scene, &ops[0]);
    step_end(&bench.stepper);
    scene_free(&scene);
    return can;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"op", 1, 0, 'o'},   {"state", 1, 0, 's'}, {"part", 1, 0, 'p'},
                                            {"seed", 1, 0, 'r'}, {"from", 1, 0, 'f'},  {"count", 1, 0, 'c'},
                                            {"depth", 1, 0, 'd'}, {"until-found", 0, 0, 'u'}, {"all", 0, 0, 'a'}, {0}};
    struct choice c = {.parts = 1, .count = 1, .depth = 1};
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (o) {
        case 'o': c.op = optarg; break;
        case 's': c.state = optarg; break;
        case 'r': bench.seed = strtoull(optarg, NULL, 0); break;
        case 'f': c.from = strtoull(optarg, NULL, 0); break;
        case 'c': c.count = strtoull(optarg, NULL, 0); break;
        case 'd': c.depth = (uint32_t)strtoul(optarg, NULL, 0); break;
        case 'a': c.all = true; break;
        case 'u': c.until_found = true; break;
        case 'p':
            if (sscanf(optarg, "%u/%u", &c.part, &c.parts) == 2 && c.parts)
                break;
            /* fall through */
        default: return 2;
        }
    const char *mode = optind < argc ? argv[optind] : "list";
    if (strcmp(mode, "list") == 0) {
        list();
        return 0;
    }
    signal(SIGALRM, on_alarm);
    world_make(&bench.live);
    world_make(&bench.copy);
    step_make(&bench.stepper, &bench.live);
    if (!can_step()) {
        fprintf(stderr, "%s\n", bench.stepper.failure);
        return 77;
    }
    if (strcmp(mode, "rehearsals") == 0)
        return each_scenario(&c, rehearsals) ? 0 : 1;
    if (strcmp(mode, "deaths") == 0)
        return each_scenario(&c, deaths) ? 0 : 1;
    if (strcmp(mode, "sleepers") == 0)
        return each_scenario(&c, sleepers) ? 0 : 1;
    if (strcmp(mode, "create") == 0)
        return create() ? 0 : 1;
    if (strcmp(mode, "neighbours") == 0) {
        bool good;
        choice = &c;
        good = each_scenario(&c, neighbours);
        print_neighbours();
        return good ? 0 : 1;
    }
    if (strcmp(mode, "recoveries") == 0)
        return each_series(&c) ? 0 : 1;
    return 2;
}
