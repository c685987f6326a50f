/* index.h - from key to slot, without a lock.
 *
 * Open addressing with linear probing over a table of at least four times as many entries as slots:
 *
 *   63        24 23       0
 *   | hash      | slot + 2 |      0: empty, ends a probe    1: tombstone, does not
 *
 * Only the holder of the arena lock changes it. Entries never move, so a probe can miss a key only while the
 * whole table is rebuilt (after a crash, or when tombstones pile up): header.index_seq is odd then. A probe that
 * ends in a miss looks at index_seq again; if the table was touched it asks the truth, the slot table itself.
 */
#ifndef SC_INDEX_H
#define SC_INDEX_H

#include "slot.h"

/* The slot that holds the key in any state but FREE or detached, and its state word; SC_NO_SLOT: nowhere. */
uint32_t sc_index_find(const struct sc_segment *s, const struct sc_key *k, uint64_t *state);
void sc_index_prefetch(const struct sc_segment *s, const struct sc_key *k);

/* What a call is about to touch; each includes those before it. */
enum sc_fetch { SC_FETCH_SLOT, SC_FETCH_SHARE, SC_FETCH_SCORE, SC_FETCH_LEASE };
/* The key's slot by the index alone, unchecked: sends for its lines, and leaves it as the hint that find tries first. */
void sc_index_prefetch_slot(const struct sc_segment *s, struct sc_key *k, enum sc_fetch fetch);

/* Under the arena lock. */
void sc_index_insert(struct sc_segment *s, uint64_t hash, uint32_t slot);
void sc_index_remove(struct sc_segment *s, uint64_t hash, uint32_t slot);
void sc_index_rebuild(struct sc_segment *s);
bool sc_index_crowded(const struct sc_segment *s);

/* Entries that name a slot, and how many of them name this one; for verify. */
uint64_t sc_index_entry(const struct sc_segment *s, uint64_t at);
uint32_t sc_index_slot(uint64_t entry);

#endif
