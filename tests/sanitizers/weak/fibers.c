/* fibers.c - lanes as fibers on a simulated weak memory: fibers SEED OPERATIONS. Any access may be followed by another
 * lane's. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <ucontext.h>

#include "guard.h"
#include "lanes.h"
#include "memory.h"
#include "one_mapping.h"

enum { STACK = 256 * 1024 };

static struct lane lanes[WEAK_FIBERS];
static ucontext_t contexts[WEAK_FIBERS], outside;
static bool ended[WEAK_FIBERS];
static unsigned running;
static uint32_t calm; /* accesses between two changes of fibers, on average; 0: no more changes */
static uint64_t operations, clock_ns;
static int segment;

void kernel_acquire(unsigned lock) { weak_kernel_acquire(lock); }
void kernel_release(unsigned lock) { weak_kernel_release(lock); }
void memory_cleared(void *at, size_t bytes) { weak_cleared(at, bytes); }
uint64_t payload_load(const uint64_t *word) { return atomic_load_explicit(word, memory_order_relaxed); }
void payload_store(uint64_t *word, uint64_t value) { atomic_store_explicit(word, value, memory_order_relaxed); }

/* What the core keeps for each thread, and fibers are threads to it. */
static uint32_t known[WEAK_FIBERS], depth[WEAK_FIBERS];
void __real_sc_guard(struct sc_segment *s);
int64_t __real_sc_unguard(struct sc_segment *s, int64_t rc);

void __wrap_sc_guard(struct sc_segment *s)
{
    __real_sc_guard(s);
    if (depth[running]++ == 0)
        sc_known_to_live = 0;
}

int64_t __wrap_sc_unguard(struct sc_segment *s, int64_t rc)
{
    depth[running]--;
    return __real_sc_unguard(s, rc);
}

static void change_fiber(void)
{
    if (!calm)
        return;
    unsigned from = running, to = weak_below(WEAK_FIBERS);
    while (ended[to])
        to = (to + 1) % WEAK_FIBERS;
    if (to == from)
        return;
    running = to;
    weak_become(to);
    known[from] = sc_known_to_live;
    sc_known_to_live = known[to];
    swapcontext(&contexts[from], &contexts[to]);
}

void weak_step(void)
{
    clock_ns += 100;
    if (calm && weak_below(calm) == 0)
        change_fiber();
}

/* The system's calls that wait, and its clock. */
long __wrap_syscall(long number, ...)
{
    (void)number; /* futex: who waits is woken at once, which it must bear */
    clock_ns += 1000;
    change_fiber();
    errno = EAGAIN;
    return -1;
}

int __wrap_nanosleep(const struct timespec *wanted, struct timespec *left)
{
    (void)left;
    clock_ns += (uint64_t)wanted->tv_nsec;
    change_fiber();
    return 0;
}

int __wrap_clock_gettime(clockid_t which, struct timespec *t)
{
    (void)which;
    *t = (struct timespec){(time_t)(clock_ns / 1000000000), (long)(clock_ns % 1000000000)};
    return 0;
}

/* The seed of the key hash. */
ssize_t __wrap_getrandom(void *to, size_t bytes, unsigned flags)
{
    (void)flags;
    for (size_t i = 0; i < bytes; i++)
        ((uint8_t *)to)[i] = (uint8_t)weak_below(256);
    return (ssize_t)bytes;
}

static void run(void)
{
    struct lane *l = &lanes[running];
    for (uint64_t i = 0; i < operations; i++) {
        if (i % 64 == 0)
            calm = 1u << weak_below(7);
        lane_step(l, segment);
    }
    ended[running] = true;
    for (unsigned i = 0; i < WEAK_FIBERS; i++)
        if (!ended[i])
            change_fiber();
    setcontext(&outside);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    uint64_t seed = strtoull(argv[1], NULL, 10);
    operations = strtoull(argv[2], NULL, 10);
    clock_ns = 1000000000;
    weak_begin(seed);
    weak_become(0);
    segment = lanes_create();
    for (unsigned i = 0; i < WEAK_FIBERS; i++) {
        lanes[i].number = i;
        lanes[i].random = seed * WEAK_FIBERS + i + 1;
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = malloc(STACK);
        contexts[i].uc_stack.ss_size = STACK;
        CHECK(contexts[i].uc_stack.ss_sp);
        makecontext(&contexts[i], run, 0);
    }
    calm = 1;
    swapcontext(&outside, &contexts[0]);
    calm = 0;
    lanes_settle(lanes, WEAK_FIBERS, segment);
    lanes_report(lanes, WEAK_FIBERS);
    one_mapping_end();
    return 0;
}
