/* region_check.h - what must hold of regions after a death, beside what check.c says of objects and shares. */
#ifndef CRASH_REGION_CHECK_H
#define CRASH_REGION_CHECK_H

#include "check.h"

/* After the death was reaped; left: what the image had. */
void check_regions(const struct world *w, const struct death *d, const struct facts *left, struct report *r);
/* No object that nobody has a share of is in a region that was given up. */
void check_nothing_stays(const struct world *w, const char *when, struct report *r);
/* Nobody else is there: every region can be had, and each of its blocks. */
void fill_regions(struct world *w, struct sc_segment *s, struct report *r);

#endif
