/* check.h - what must hold of a copy of the segment that a death left: the dead are dead, the survivors live on. */
#ifndef CRASH_CHECK_H
#define CRASH_CHECK_H

#include "facts.h"

/* Who comes first after the death. */
enum first {
    FIRST_JOINER,      /* a new process */
    FIRST_SURVIVOR,    /* a survivor that reaps */
    FIRST_SUCCESSOR,   /* a new process in the place of the dead one */
    FIRST_READER,      /* a survivor that reads, and then one that verifies */
    FIRSTS
};

struct member { const char *group; int rank; uint32_t world_size; int joins; /* what its sc_join gives */ };

struct death {
    const uint8_t *bytes;
    const struct identity *who;       /* as it was before the operation */
    enum seat dead;
    struct member member;             /* of the dead, for its successor */
    const struct expectation *e;
};

bool applies(const struct death *d, enum first first);
void check_death(struct world *w, const struct death *d, enum first first, struct report *r);

#endif
