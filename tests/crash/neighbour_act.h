/* neighbour_act.h - one operation of a neighbour, while it is held against what was there before. */
#ifndef CRASH_NEIGHBOUR_ACT_H
#define CRASH_NEIGHBOUR_ACT_H

#include "neighbour.h"

/* What one operation may have changed. */
struct licence {
    bool removes;            /* objects that nobody holds; reserved shares stop it while their lease runs */
    bool force;              /* reserved shares do not stop it */
    bool reaps;              /* what dead lanes left */
    bool sweeps;             /* what nobody has a share of, in regions that are lost */
    bool settles;            /* a lost region may go with its last object */
    int removed;             /* ... and only this key; -1: any */
    int written;             /* a key that may have become this lane's write, or its object; -1 */
    int finished;            /* a slot of this lane's that may be published or given back; -1 */
    bool detaches;           /* a writer may lose its key */
    int granted, cancelled;  /* a slot of which ranks may have got, or lost, one reserved share; -1 */
    int added, given_up;     /* a region that may have become this lane's; its own, that may be lost; -1. 0: whichever */
    int opened;              /* a region of which it may have said whether it has it open; -1 */
    int own;                 /* a slot in which its own share word may have changed; -1 */
};

struct act {
    struct neighbour *n;
    const struct facts *before;
    struct facts after;
    struct licence may;
    bool lock_busy, door_busy;
    int key, slot;           /* slot of the key before; -1 */
    struct report *r;
};

void want(struct act *a, bool good, const char *what);
/* A lock that a living process holds cannot be had; any other is had at once. */
bool refused(struct act *a, bool busy);
bool alive(const struct neighbour *n, uint32_t lane);
/* Somebody has a share that keeps the object that was there before. */
bool protected(const struct act *a, int slot);

/* neighbour_regions.c */
void act_region_add(struct act *a);
void act_region_give_up(struct act *a);
void act_region_opened(struct act *a);
void act_region_check(struct act *a);
bool owns_region(const struct act *a);
/* Whatever was done, no region changed that may not have. */
void check_regions_frame(struct act *a);

#endif
