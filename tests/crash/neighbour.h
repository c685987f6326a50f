/* neighbour.h - a live process beside the stepped one: at a stop it does one whole random operation, and all that
 * the operation says and changes is held against what was there before. The stepped one does not move meanwhile.
 */
#ifndef CRASH_NEIGHBOUR_H
#define CRASH_NEIGHBOUR_H

#include "facts.h"

struct neighbour {
    struct world *w;
    struct sc_segment *s;
    uint64_t seed;
    uint32_t version;        /* of the next object that it writes */
    const char *about[5];    /* keys that the stepped one's operation is about; of ours */
    const char *did;         /* the last operation */
    int key;
    int64_t rc;
    uint64_t operations[32]; /* how often each was done, and not refused by the lock */
};

uint64_t random_of(uint64_t *seed);

/* busy: somebody who lives holds the arena lock, or the door. */
void neighbour_acts(struct neighbour *n, bool lock_busy, bool door_busy, struct report *r);
const char *neighbour_operation(uint32_t i); /* NULL beyond the last */

#endif
