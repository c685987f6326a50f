/* neighbours.h - two at once: one process is stepped, a live one acts at its stops, and each stop is a death, too. */
#ifndef CRASH_NEIGHBOURS_H
#define CRASH_NEIGHBOURS_H

#include "deaths.h"
#include "neighbour.h"

enum { EVERY_STOP = 0 }; /* else the stop at which alone the neighbour acts, 1 the first */

/* acts: how many operations the neighbour does at a stop. counts: adds up what it did, by neighbour_operation. */
void run_neighbours(struct bench *b, struct scene *scene, const struct op *op, uint64_t seed, uint64_t stop, uint32_t acts,
                    uint64_t *counts, struct result *r);

#endif
