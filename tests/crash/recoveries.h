/* recoveries.h - a death during the recovery from a death, and so on: images of one run are the starts of the next. */
#ifndef CRASH_RECOVERIES_H
#define CRASH_RECOVERIES_H

#include "deaths.h"

/* The index-th series of a seed: a random operation in a random state; some of its images; and in each of them other
 * processes' operations, killed at every instruction, too. depth: how many deaths follow the first one. */
bool run_recoveries(struct bench *b, uint64_t index, uint32_t depth);

#endif
