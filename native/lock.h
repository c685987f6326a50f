/* lock.h - the arena lock: one word, futex waiting, theft from the dead.
 *
 *   63          32 31      17  16      15          0
 *   | incarnation |    0     | waiters | lane + 1    |      0: nobody
 *
 * The holder stores the word back to 0 (release); who takes it by compare-and-swap acquires what the last holder
 * wrote. The word names lane and incarnation, so whether its holder lives is never a question of time: the holder
 * is dead when its lane's byte is unlocked or its lane carries a later incarnation. Of several that find it dead
 * exactly one wins the compare-and-swap from the dead word to its own. The winner must recover (recover.h).
 * A death between the store of 0 and the wake costs a waiter one slice of waiting.
 */
#ifndef SC_LOCK_H
#define SC_LOCK_H

#include "lane.h"

/* 0, or SC_E_BUSY after timeout_us. s->stolen says that the last holder died. */
int sc_lock_take(struct sc_segment *s, uint64_t timeout_us);
void sc_lock_give(struct sc_segment *s);

/* For people: the lane in the lock word (SC_NO_SLOT: nobody) and whether it lives. */
uint32_t sc_lock_holder(const struct sc_segment *s, uint32_t *incarnation, bool *alive);

#endif
