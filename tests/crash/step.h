/* step.h - a process that is stepped through one operation, an instruction at a time.
 *
 * It is a child that opens the segment anew and sits in seat S. Its parent compares the segment with the last copy
 * after every instruction: each difference is what a SIGKILL at this instruction would leave.
 */
#ifndef CRASH_STEP_H
#define CRASH_STEP_H

#include <sys/types.h>

#include "ops.h"

enum { WATCHED = 16 };

struct stepper {
    struct world *w;
    const struct scene *scene;
    const struct op *op;
    pid_t child;
    struct outcome *out;             /* what the child tells; shared with it */
    uint8_t *copy;                   /* the segment as it was before the last instruction; by offset */
    struct part watched[WATCHED];
    uint32_t watched_n;
    uint64_t instructions, stops;
    uint64_t address;                /* in this program, of the instruction after the last one */
    uint64_t locks;                  /* bit per lane whose byte is locked, bit 63: the door */
    char failure[160];               /* why stepping ended early; empty: it did not */
};

void step_make(struct stepper *t, struct world *w);
/* The world becomes the scene's, and the child is about to begin. False: ptrace is refused; errno says why. */
bool step_begin(struct stepper *t, const struct scene *scene, const struct op *op);
/* Up to the next instruction that changed something. False: the operation is over, and the child waits behind it. */
bool step_next(struct stepper *t);
/* From here on what is there now counts as known. */
void step_accept(struct stepper *t);
/* The same of the whole segment, watched or not: somebody else has changed it. */
void step_accept_all(struct stepper *t);
/* Without a step: where the segment differs from the copy; SIZE_MAX: nowhere. */
uint64_t step_difference(const struct stepper *t, uint64_t from);
void step_end(struct stepper *t);

#endif
