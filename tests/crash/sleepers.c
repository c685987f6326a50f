#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>

#include "extras.h"

enum { PATIENCE_US = 60000000 }; /* a sleeper wakes in ten milliseconds; only one that never does takes so long */

struct sleeper { struct sc_segment *s; int64_t rc; char text[2000]; };

static void *sleep_for_lock(void *arg)
{
    struct sleeper *me = arg;
    me->s->lock_timeout_us = PATIENCE_US;
    me->rc = sc_verify(me->s, me->text, sizeof me->text);
    me->s->lock_timeout_us = 0;
    return NULL;
}

static uint64_t lock_word(const struct stepper *t)
{
    return sc_peek(&((const struct sc_header *)t->w->map)->lock);
}

/* Up to the stop; false: the operation is over. */
static bool step_to(struct stepper *t, uint64_t stop)
{
    while (t->stops < stop) {
        if (!step_next(t))
            return false;
        step_accept_all(t); /* the sleeper sets a bit of the lock word */
    }
    return true;
}

static void until_it_sleeps(const struct stepper *t)
{
    struct timespec nap = {.tv_nsec = 200000};
    while (!(lock_word(t) & UINT64_C(1) << 16))
        nanosleep(&nap, NULL);
    nanosleep(&nap, NULL); /* it has said so, and is about to */
}

/* At `from` the stepped one has just got the lock; it dies at `stop`. False: it was over before. */
static bool kill_at(struct bench *b, struct scene *scene, const struct op *op, uint64_t from, uint64_t stop, struct result *r)
{
    struct stepper *t = &b->stepper;
    struct sleeper sleeper = {.s = &b->live.seats[A]};
    pthread_t thread;
    bool more = step_begin(t, scene, op) && step_to(t, from);
    if (!more || pthread_create(&thread, NULL, sleep_for_lock, &sleeper) != 0)
        die("kill_at");
    until_it_sleeps(t);
    step_accept_all(t);
    bool held = true;
    while (more && held && t->stops < stop) {
        more = step_next(t);
        step_accept_all(t);
        held = lock_word(t) && (lock_word(t) & 0xffff) - 1 == scene->start->who[S].lane;
    }
    more = more && held;
    r->instructions += t->instructions;
    r->stops++;
    step_end(t);
    pthread_join(thread, NULL);
    if (sleeper.rc != 0)
        found(&r->report, "the holder was killed at stop %llu: who slept gets %lld %s", (unsigned long long)stop,
              (long long)sleeper.rc, sleeper.text);
    return more;
}

void run_sleepers(struct bench *b, struct scene *scene, const struct op *op, struct result *r)
{
    struct stepper *t = &b->stepper;
    uint64_t from = 0;
    if (!step_begin(t, scene, op))
        die("step_begin");
    while (from == 0 && step_next(t)) {
        step_accept_all(t);
        if (lock_word(t))
            from = t->stops;
    }
    step_end(t);
    if (from == 0)
        return; /* it takes no lock */
    /* The last one is the stop at which the lock word becomes 0, before the call that wakes. */
    for (uint64_t stop = from; kill_at(b, scene, op, from, stop, r);)
        stop++;
    r->distinct = r->stops;
}
