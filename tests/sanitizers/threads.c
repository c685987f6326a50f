/* threads.c - lanes as threads of one process, for ThreadSanitizer: threads SEED OPERATIONS. */
#include <sanitizer/tsan_interface.h>
#include <stdio.h>
#include <stdlib.h>

#include "lanes.h"
#include "one_mapping.h"

enum { THREADS = 5 };

/* What stands for the kernel's locks before ThreadSanitizer. */
static char locks[KERNEL_LOCKS];
void kernel_acquire(unsigned lock) { __tsan_acquire(&locks[lock]); }
void kernel_release(unsigned lock) { __tsan_release(&locks[lock]); }

void memory_cleared(void *at, size_t bytes) { (void)at, (void)bytes; }
/* Plain accesses: what synchronizes them is what is tested. */
uint64_t payload_load(const uint64_t *word) { return *word; }
void payload_store(uint64_t *word, uint64_t value) { *word = value; }

static int segment;
static uint64_t operations;

static void *run(void *arg)
{
    struct lane *l = arg;
    for (uint64_t i = 0; i < operations; i++)
        lane_step(l, segment);
    return NULL;
}

int main(int argc, char **argv)
{
    static struct lane lanes[THREADS];
    pthread_t threads[THREADS];
    if (argc != 3)
        return 2;
    operations = strtoull(argv[2], NULL, 10);
    segment = lanes_create();
    for (uint32_t i = 0; i < THREADS; i++) {
        lanes[i].number = i;
        lanes[i].random = strtoull(argv[1], NULL, 10) * THREADS + i + 1;
        CHECK(pthread_create(&threads[i], NULL, run, &lanes[i]) == 0);
    }
    for (uint32_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    lanes_settle(lanes, THREADS, segment);
    lanes_report(lanes, THREADS);
    one_mapping_end();
    return 0;
}
