/* recover.h - what a death leaves, and taking it back. All under the arena lock.
 *
 *   where it dies                 what is left                        who takes it back
 *   holding the arena lock        index, maps, counts half changed;   the next to want the lock steals it and
 *                                 a slot EVICTING                     rebuilds (sc_recover)
 *   with shares                   words in its row                    whoever needs the room, joins as its
 *   writing                       WRITING slots                       successor, or calls reap (sc_reap_lane)
 *   as the owner of a region      objects that are lost               the same
 *
 * Each step leaves the segment such that doing it again, by anybody, ends in the same state.
 */
#ifndef SC_RECOVER_H
#define SC_RECOVER_H

#include "lock.h"
#include "writers.h"

/* Takes the arena lock, repairing what a dead holder left. SC_E_BUSY after timeout_us. */
int sc_begin(struct sc_segment *s, uint64_t timeout_us, struct sc_reaped *r);
void sc_end(struct sc_segment *s);

/* Takes back all that a lane has: shares, writes, regions. Another's lane counts as reaped then, up to this incarnation. */
void sc_reap_lane(struct sc_segment *s, uint32_t lane, uint32_t incarnation, struct sc_reaped *r);
/* Reaps a lane that is dead and not reaped. False: it is not. */
bool sc_reap_if_dead(struct sc_segment *s, uint32_t lane, struct sc_reaped *r);
/* The same for every lane, and for writes that waited in vain for more writers. False: there was none. */
bool sc_reap_dead(struct sc_segment *s, struct sc_reaped *r);

/* Objects of lost regions go that nobody has a share of, and then the regions themselves. */
void sc_sweep_lost(struct sc_segment *s);

/* Without the lock, a look at every slot: a write waits in vain for more writers. */
bool sc_any_overdue(const struct sc_segment *s);

/* Rebuilds all that is derived from the slot table. A slot that contradicts itself or another is freed. */
void sc_recover(struct sc_segment *s, struct sc_reaped *r);

#endif
