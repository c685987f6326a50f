/* extras.h - deaths that the other modes do not see: before there is an arena, and before somebody who sleeps. */
#ifndef CRASH_EXTRAS_H
#define CRASH_EXTRAS_H

#include "deaths.h"

/* sc_format, killed at every instruction that changed the file: it can be joined when it is whole, and is refused before. */
void run_create(struct bench *b, struct result *r);

/* Somebody sleeps in the kernel until the lock is given back. Its holder is killed at each of its stops, also between
 * giving the lock back and waking the sleeper: the sleeper gets it. */
void run_sleepers(struct bench *b, struct scene *scene, const struct op *op, struct result *r);

#endif
