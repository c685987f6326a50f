/* target.c - one input, one run: operations make a state, then damage and operations take turns (or come at once, from
 * two threads), then the arena is rebuilt, as after a death, and must be of use again. */
#include "fuzz.h"

#include <pthread.h>

enum { START = 40, STEPS = 40 };

bool undamaged;

static struct sc_segment *somebody(struct world *w)
{
    for (int h = 0; h < HANDLES; h++)
        if (w->handles[h])
            return w->handles[h];
    return world_attach(w, 0, "", 0, 1) == 0 ? w->handles[0] : NULL;
}

/* The lock in the name of a lane that is none, and so does not live: its next taker rebuilds. */
static void leave_lock(struct world *w)
{
    sc_store(&((struct sc_header *)w->map)->lock, 0xffff);
}

static bool twins(const struct world *w)
{
    const struct sc_slot *slots = (const struct sc_slot *)(w->map + w->g.slot_table);
    for (uint32_t a = 0; a < w->g.slots; a++)
        for (uint32_t b = 0; b < a; b++)
            if (sc_state_of(slots[a].state) && sc_state_of(slots[b].state) && slots[a].hash == slots[b].hash)
                return true;
    return false;
}

/* After a rebuild only the truth itself can be wrong: shares of nobody, a layout that is gone, a key that was written
 * again after its entry was lost, a region that is lost and in use. */
static int64_t verify(struct world *w, struct sc_segment *s)
{
    static char report[1 << 16];
    leave_lock(w);
    int64_t findings = sc_verify(s, report, sizeof report);
    if (findings < 0 && findings != SC_E_FENCED && findings != SC_E_DAMAGED)
        fail("after a rebuild: verify gives %lld", (long long)findings);
    for (char *rest = report, *line; findings > 0 && (line = strtok_r(rest, "\n", &rest));) {
        bool known = strstr(line, "was never taken but has a share word") || strstr(line, "names layout") ||
                     (strstr(line, "region") && strstr(line, "broken seal")) ||
                     (strstr(line, "not what its key finds") && twins(w));
        if (!known)
            fail("after a rebuild: %s", line);
    }
    return findings;
}

static void settle(struct world *w)
{
    struct sc_segment *s = somebody(w);
    if (!s || w->truncated)
        return;
    int64_t first = verify(w, s), second = verify(w, s);
    if (undamaged && first != 0)
        fail("findings where nothing was damaged");
    if (first != second)
        fail("%lld findings, then %lld", (long long)first, (long long)second);
    /* A life after damage: all operations, none of which may be disturbed. */
    uint8_t bytes[512];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(i * 37 + (i >> 3) * 11 + (size_t)first);
    struct input in = {bytes, sizeof bytes};
    for (int i = 0; i < STEPS; i++)
        operate(w, &in);
    if ((s = somebody(w)))
        verify(w, s);
}

struct damager { struct world *w; struct input in; };

static void *damage_all(void *arg)
{
    struct damager *d = arg;
    while (d->in.left)
        damage(d->w, &d->in);
    return NULL;
}

/* Half of the input is damage, which falls while the other half is done. */
static void both(struct world *w, struct input *in)
{
    struct damager d = {w, {in->data, in->left / 2}};
    pthread_t thread;
    in->data += d.in.left;
    in->left -= d.in.left;
    if (pthread_create(&thread, NULL, damage_all, &d))
        fail("no thread");
    for (int i = 0; i < STEPS && in->left; i++)
        operate(w, in);
    pthread_join(thread, NULL);
}

static void in_turn(struct world *w, struct input *in)
{
    for (int i = 0; i < STEPS && in->left; i++)
        if (choose(in, 3) == 0 && !undamaged)
            damage(w, in);
        else
            operate(w, in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world w;
    struct input in = {data, size};
    uint32_t mode = choose(&in, 256), start = choose(&in, START);
    world_make(&w, mode & 1 ? 1000000 : 1, mode & 2 ? REGIONS : 0);
    for (uint32_t i = 0; i < start; i++)
        operate(&w, &in);
    w.concurrent = mode >= 192 && !undamaged;
    if (w.concurrent)
        both(&w, &in);
    else
        in_turn(&w, &in);
    settle(&w);
    world_end(&w);
    return 0;
}
