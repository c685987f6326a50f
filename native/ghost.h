/* ghost.h - what is remembered of keys whose objects were evicted: how many requests had used them.
 *
 * A table of lines of 64 bytes, 16 ghosts each; a key's line follows from its hash.
 *
 *   31         8 7       2 1     0
 *   | hash       | epoch   | count |      0: none
 *
 * An epoch is as many evictions as there are slots, and header.ghosts counts them all; after eight epochs a ghost is over
 * (and after 64, where none has taken its place, alive for eight again). So all ghosts are remembered equally long. That
 * matters: a chain is worth its prefix, and one ghost that is lost before its neighbours breaks it. For the same reason
 * three quarters of the table are empty or over: a line that is full of others, whose oldest has to go, is rare (once in a
 * hundred thousand).
 *
 * Under the arena lock. Nobody relies on a ghost: one that is lost, damaged, of an epoch long past or of another key (once
 * in four million) makes an object's score a little wrong, no more. So nothing is ever repaired here, or removed.
 */
#ifndef SC_GHOST_H
#define SC_GHOST_H

#include "segment.h"

/* How many requests used the object of this key before it was evicted, 0 if nobody remembers. */
uint32_t sc_ghost_count(const struct sc_segment *s, uint64_t hash);
/* count: 1 to 3. */
void sc_ghost_remember(struct sc_segment *s, uint64_t hash, uint32_t count);

#endif
