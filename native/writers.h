/* writers.h - who fills a slot that is WRITING: its owner alone, or several lanes of one group together.
 *
 * Of several writers (slot.writers = n > 1) each has a part, told by the stage in its share word of that generation:
 *
 *   stage               by whom, how
 *   none -> WRITING     the lane itself, under the arena lock: it joins, while fewer than n have
 *   WRITING -> DONE     the lane itself, no lock: it has filled its part and will not touch it again. Before that it leaves
 *                       in the state word for how many ranks it asks shares (asked: the most that anybody asks for)
 *   WRITING -> none     holder of the arena lock: the lane gave up or died
 *
 * Who finds n lanes DONE seals the state word, with itself as the owner. One succeeds; it grants what was asked for and
 * publishes as an only writer does. A part that is DONE stays done, whatever becomes of its writer, while somebody of the
 * group lives.
 *
 * Where one gives up or dies before its part is done nobody publishes: the key is free again at once (detached), the blocks
 * when no lane fills them any more. The same holds where the write lease is over. All these steps are made under the arena
 * lock, and lose against READY.
 */
#ifndef SC_WRITERS_H
#define SC_WRITERS_H

#include "evict.h"
#include "lane.h"

/* The lane may still write into the slot's blocks, or publish them; state is of WRITING. */
bool sc_fills(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane);

/* The lane has a part in the write, done or not. */
bool sc_has_part(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane);
/* Of several writers none is left: their lock holder died half-way through a step below. */
bool sc_forsaken(const struct sc_segment *s, uint32_t slot, uint64_t state);

/* Under the arena lock: takes a part in the write of a slot for s's lane. SC_OK; SC_IN_FLIGHT: another group's write, or one
 * in which this lane has or had its part, or nothing is left to join; SC_UNLIKE: this group's, but of another kind. */
struct sc_terms { uint64_t nbytes; uint32_t layout, region, writers; bool temporary; };
enum sc_status sc_join_write(struct sc_segment *s, uint32_t slot, uint64_t state, const struct sc_terms *terms);
/* Under the arena lock, of a slot that is WRITING and that only its holder knows yet: the first part is s's lane's. */
void sc_first_part(struct sc_segment *s, uint32_t slot, uint32_t generation);

/* This lane's part is done. SC_OK: it was the last, and *state is sealed for this lane to publish; SC_PART: others are
 * to come; else why not. */
enum sc_status sc_finish_part(struct sc_segment *s, uint32_t slot, uint64_t *state, uint32_t ranks);

/* Under the arena lock: the key of a write is free again, its memory stays while somebody fills it. False: it was published. */
bool sc_detach(struct sc_segment *s, uint32_t slot);
/* Of several writers those that have come are done, and the others did not come within the write lease, or never will:
 * nobody of the group lives, but perhaps the lane that is about to go (SC_NO_SLOT: none is). */
bool sc_overdue(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t lane, uint64_t now_us);
/* Under the arena lock: lane, which gave up or died, will not write any more. True: nobody fills the slot, it is FREE. */
bool sc_abandon(struct sc_segment *s, uint32_t slot, uint32_t lane);

#endif
