/* lane.h - lanes: who is alive, who takes which lane, and the door that all pass on the way in.
 *
 * A lane is alive while the first byte of its row is locked by an open-file-description lock. The kernel lets
 * go of it when the last descriptor of that description closes, whatever killed the process.
 *
 * The door is one more byte with such a lock. Whoever joins or destroys the arena holds it, so that lanes are
 * handed out one at a time and a segment is never unlinked under a joining process. Its holder's death opens it.
 *
 * A lane's life: taken (byte locked, incarnation + 1) -> alive -> closed (it reaps itself: reaped = incarnation)
 * or dead (reaped != incarnation, until somebody reaps it). A rank's lane is set aside for its group when the
 * group's first member joins, so that shares can be granted to a worker that has not come yet.
 */
#ifndef SC_LANE_H
#define SC_LANE_H

#include "segment.h"

enum sc_lane_state { SC_LANE_FREE = 0, SC_LANE_ALIVE = 1, SC_LANE_DEAD = 2, SC_LANE_VACANT = 3 };

struct sc_member { const char *group; uint32_t group_bytes; int32_t rank; uint32_t world_size; };

/* True while some process holds the lane's byte. This process's own lane counts as held. */
bool sc_lane_held(const struct sc_segment *s, uint32_t lane);
/* This process's own lane is dead for all others from here on. */
void sc_lane_let_go(struct sc_segment *s);
enum sc_lane_state sc_lane_state(const struct sc_segment *s, uint32_t lane);

/* In the door, of a lane that nobody lives in: nothing is left in its row. Who was there was reaped, and nobody can
 * have granted to it since, for it was no rank's. */
bool sc_lane_empty(const struct sc_segment *s, uint32_t lane);

/* A hash of the name of the lane's group; 0 for a lane without one. */
uint32_t sc_lane_group(const struct sc_segment *s, uint32_t lane);

/* Waits at most timeout_us. The caller must shut the door again. */
int sc_door_open(struct sc_segment *s, uint64_t timeout_us);
void sc_door_shut(struct sc_segment *s);

/* In the door: locks a lane's byte for m and writes who it is; s->lane and s->incarnation are set.
 * On SC_E_LANE_IN_USE *pid is the owner's. 0: the row may hold what a predecessor left, reap it before use.
 * 1: it is empty, or was set aside for this rank, and its reserved shares were granted to it: keep them. */
int sc_lane_take(struct sc_segment *s, const struct sc_member *m, uint32_t *pid);

/* What the header's limit must not fall below: lanes that were ever taken. */
void sc_lanes_remember(struct sc_segment *s);

/* In the door: the lane set aside for a rank of m's group, or SC_NO_SLOT. */
uint32_t sc_lane_of_rank(const struct sc_segment *s, const struct sc_member *m, uint32_t rank);

/* In the door: a lane that nobody lives in. SC_NO_SLOT where every lane is taken. */
uint32_t sc_lane_find(const struct sc_segment *s, const struct sc_member *m);
/* In the door, the row of shares being empty: sets the lane aside for the rank. */
void sc_lane_assign(struct sc_segment *s, uint32_t lane, const struct sc_member *m, uint32_t rank);

/* In the door: 0, or SC_E_WORLD_SIZE where live members of m's group state another world_size. Lanes of a group
 * without live members that stated another one are set free. */
int sc_group_check(struct sc_segment *s, const struct sc_member *m);

#endif
