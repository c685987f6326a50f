/* prefault.c - maps into this process, in the background, what has memory: page tables only, no memory is made by it. A
 * process that reads or writes there for the first time then takes no faults, or one a huge page.
 *
 * The thread counts as a user of its segment, as a call does: sc_close waits for it before anything is unmapped.
 */
#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static sc_half ending; /* 1: this process ends, and nobody maps in any more */

static bool over(const struct sc_segment *s) { return sc_load32(&s->closed) || sc_load32(&ending); }

/* Lets the read go by that has asked for it. False: it is over. */
static bool wait_a_moment(const struct sc_segment *s)
{
    struct timespec nap = {.tv_nsec = 250000};
    for (int n = 0; n < 40 && !over(s); n++)
        nanosleep(&nap, NULL);
    return !over(s);
}

/* Piece by piece: who closes, or changes the mappings of this process, waits for one of them at most. */
static bool map_in(struct sc_segment *s, char *at, uint64_t bytes)
{
    const uint64_t piece = SC_PAYLOAD_ALIGN;
    for (uint64_t done = 0; done < bytes; done += piece) {
        uint64_t n = bytes - done < piece ? bytes - done : piece;
        if (over(s))
            return false;
        if (madvise(at + done, n, MADV_POPULATE_READ) < 0 && errno != EINTR && errno != EAGAIN)
            return false; /* Linux before 5.14; a file that was cut */
    }
    return true;
}

static bool backed(const struct sc_segment *s, uint64_t block) { return sc_peek(sc_backed(s) + block / 64) >> (block % 64) & 1; }

/* What every reader looks at, without the rows of lanes that nobody took, and the blocks with memory: to map others
 * would give them some. */
static void map_all_in(struct sc_segment *s, char *payload)
{
    uint64_t rows = sc_lane_limit(s) * s->g.share_stride;
    if (!map_in(s, (char *)s->base, s->g.shares + rows) ||
        !map_in(s, (char *)s->base + s->g.index, s->g.metadata - s->g.index))
        return;
    for (uint64_t block = 0, end; block < s->g.blocks && !over(s); block = end) {
        bool there = backed(s, block);
        for (end = block + 1; end < s->g.blocks && end % 64 && backed(s, end) == there;)
            end++;
        if (there && !map_in(s, payload + block * s->g.block_size, (end - block) * s->g.block_size))
            return;
    }
}

/* The threads that map in, of this process: a forked child has none of its parent's. */
static sc_half prefaults;
static pthread_once_t prefaults_once = PTHREAD_ONCE_INIT;
static void prefaults_forget(void) { sc_store32(&prefaults, 0); }
static void prefaults_init(void) { pthread_atfork(NULL, NULL, prefaults_forget); }

struct prefault { struct sc_segment *s; char *payload; };

static void *prefault(void *argument)
{
    struct prefault p = *(struct prefault *)argument;
    free(argument);
    sc_guard(p.s);
    if (wait_a_moment(p.s))
        map_all_in(p.s, p.payload);
    sc_leave(p.s, 0);
    sc_sub32(&prefaults, 1);
    return NULL;
}

/* Signals are for the caller's threads, but for those that a thread's own instructions raise. */
static int start_prefault(struct prefault *p)
{
    pthread_t thread;
    sigset_t others, before;
    sigfillset(&others);
    sigdelset(&others, SIGBUS);
    sigdelset(&others, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    int error = pthread_create(&thread, NULL, prefault, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        pthread_detach(thread);
    return error;
}

int sc_prefault(struct sc_segment *s, char *payload)
{
    struct prefault *p = malloc(sizeof *p);
    int rc = p ? sc_enter(s) : SC_E_MEMORY;
    if (rc < 0) {
        free(p);
        return rc;
    }
    *p = (struct prefault){s, payload};
    pthread_once(&prefaults_once, prefaults_init);
    sc_add32(&prefaults, 1); /* before the look at ending; sc_prefault_end stores it before it looks at prefaults */
    if (!sc_load32(&ending) && start_prefault(p) == 0)
        return (int)sc_unguard(s, 0); /* the thread leaves in this one's place, so that sc_close waits for it */
    sc_sub32(&prefaults, 1);
    free(p);
    return (int)sc_leave(s, 0);
}

void sc_prefault_end(void)
{
    struct timespec nap = {.tv_nsec = 100000};
    sc_store32(&ending, 1);
    for (int n = 0; n < 10000 && sc_load32(&prefaults) > 0; n++)
        nanosleep(&nap, NULL);
}
