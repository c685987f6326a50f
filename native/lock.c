#define _GNU_SOURCE
#include "lock.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPINS = 200, SLICE_US = 10000 };
#define WAITERS (UINT64_C(1) << 16)

static uint32_t lane_of(uint64_t word) { return (uint32_t)(word & 0xffff) - 1; }
static uint32_t incarnation_of(uint64_t word) { return (uint32_t)(word >> 32); }
static uint64_t own_word(const struct sc_segment *s)
{
    return (uint64_t)s->incarnation << 32 | (uint64_t)(s->lane + 1);
}

static bool holder_alive(const struct sc_segment *s, uint64_t word)
{
    uint32_t lane = lane_of(word);
    /* A word that names no lane, or this very lane (whose threads take turns at s->mutex), has no living holder. */
    if (lane >= s->g.lanes || lane == s->lane)
        return false;
    return sc_load32(&sc_lane(s, lane)->incarnation) == incarnation_of(word) && sc_lane_held(s, lane);
}

static void futex_wait(sc_word *word, uint32_t low, uint64_t us)
{
    struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT, low, &t, NULL, 0);
}

static bool mutex_take(struct sc_segment *s, uint64_t timeout_us)
{
    if (pthread_mutex_trylock(&s->mutex) == 0)
        return true;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    uint64_t ns = (uint64_t)t.tv_nsec + timeout_us % 1000000 * 1000;
    t.tv_sec += (time_t)(timeout_us / 1000000 + ns / 1000000000);
    t.tv_nsec = (long)(ns % 1000000000);
    return pthread_mutex_timedlock(&s->mutex, &t) == 0;
}

static bool spin(sc_word *word, uint64_t mine)
{
    for (int i = 0; i < SPINS; i++) {
        uint64_t seen = 0;
        if (sc_peek(word) == 0 && sc_cas(word, &seen, mine))
            return true;
        sc_relax();
    }
    return false;
}

int sc_lock_take(struct sc_segment *s, uint64_t timeout_us)
{
    uint64_t deadline = sc_now_us() + timeout_us;
    if (!mutex_take(s, timeout_us))
        return SC_E_BUSY;
    sc_word *word = &sc_header(s)->lock;
    s->stolen = false;
    if (spin(word, own_word(s)))
        return 0;
    /* Who has waited takes the lock with the waiters bit set, since others may still be asleep. */
    uint64_t mine = own_word(s) | WAITERS, seen = sc_load(word);
    for (;;) {
        if (seen == 0) {
            if (sc_cas(word, &seen, mine))
                return 0;
            continue;
        }
        if (!holder_alive(s, seen)) {
            if (!sc_cas(word, &seen, mine))
                continue;
            s->stolen = true;
            return 0;
        }
        if (!(seen & WAITERS) && !sc_cas(word, &seen, seen | WAITERS))
            continue;
        uint64_t now = sc_now_us();
        if (now >= deadline) {
            pthread_mutex_unlock(&s->mutex);
            return SC_E_BUSY;
        }
        uint64_t left = deadline - now;
        futex_wait(word, (uint32_t)(seen | WAITERS), left < SLICE_US ? left + 1 : SLICE_US);
        seen = sc_load(word);
    }
}

void sc_lock_give(struct sc_segment *s)
{
    sc_word *word = &sc_header(s)->lock;
    if (sc_swap(word, 0) & WAITERS)
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
    pthread_mutex_unlock(&s->mutex);
}

uint32_t sc_lock_holder(const struct sc_segment *s, uint32_t *incarnation, bool *alive)
{
    uint64_t word = sc_load(&sc_header(s)->lock);
    if (word == 0 || lane_of(word) >= s->g.lanes)
        return SC_NO_SLOT;
    *incarnation = incarnation_of(word);
    *alive = sc_load32(&sc_lane(s, lane_of(word))->incarnation) == *incarnation && sc_lane_held(s, lane_of(word));
    return lane_of(word);
}
