/* memory.h - a simulated memory as weak as C11 allows, but for what the next lines say: the core runs on it, lanes being
 * fibers of one thread.
 *
 * Each word has a history of values. A load may give any of them that is not older than what its lane knows of the word.
 * What a lane knows is a view: for each word, the oldest value that it may still see. A release store attaches its lane's
 * view to the value, an acquire load of that value joins it; fences do the same for relaxed accesses around them; a
 * read-modify-write sees the latest value, and passes on the view of the value that it replaces. Accesses that are
 * sequentially consistent besides see at least what the latest such access of the word wrote or saw: so all of them have
 * one order, and of two lanes that each mark and then look one sees the other. They order nothing else.
 *
 * Stronger than C11: no load sees a store that comes later in the run (no hardware forwards such values through the
 * dependencies that the core has), stores of one word follow one another as they are run, and the oldest values of a long
 * history are forgotten. What the core keeps in plain bytes (layout specs, names of groups) is not simulated.
 */
#ifndef WEAK_MEMORY_H
#define WEAK_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Begins with an empty history; every choice follows from the seed. */
void weak_begin(uint64_t seed);
/* The fiber whose accesses follow. */
void weak_become(unsigned fiber);
/* Its own plain memory was set to zero. */
void weak_cleared(void *at, size_t bytes);
/* What the kernel orders: who gets a lock comes after who had it. */
void weak_kernel_acquire(unsigned lock);
void weak_kernel_release(unsigned lock);
/* A number below n, of the seed's sequence. */
uint32_t weak_below(uint32_t n);

/* Called before each access: another fiber may go on. Defined by the program. */
void weak_step(void);

enum { WEAK_FIBERS = 5 };

#endif
