/* authority.h - who may change what: each change of the stepped process beside the tables of layout.h, slot.h, share.h and region.h. */
#ifndef CRASH_AUTHORITY_H
#define CRASH_AUTHORITY_H

#include "step.h"

/* The differences between the stepper's copy and the segment are one instruction's. */
void check_authority(const struct stepper *t, struct report *r);

#endif
