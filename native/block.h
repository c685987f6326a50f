/* block.h - which blocks and slots are used: two bitmaps and a block -> slot table, all under the arena lock and
 * all derived from the slot table. And which blocks have memory behind them: a bitmap that is only ever set.
 */
#ifndef SC_BLOCK_H
#define SC_BLOCK_H

#include "slot.h"

/* The first block of a free run of n in a region, or SC_NO_SLOT. */
uint32_t sc_block_find(struct sc_segment *s, uint32_t region, uint32_t n);
/* A free run of n that contains this run once the run itself is free; SC_NO_SLOT: the free blocks around it
 * do not suffice. */
uint32_t sc_block_grow(const struct sc_segment *s, uint32_t block, uint32_t blocks, uint32_t n);
void sc_block_use(struct sc_segment *s, uint32_t block, uint32_t n, uint32_t slot);
void sc_block_free(struct sc_segment *s, uint32_t block, uint32_t n);
/* No slot has a block of this run, whatever the map of used blocks says. */
bool sc_block_unowned(const struct sc_segment *s, uint32_t block, uint32_t n);
/* The slot that has a block, or SC_NO_SLOT. */
uint32_t sc_block_owner(const struct sc_segment *s, uint32_t block);
bool sc_block_used(const struct sc_segment *s, uint32_t block);

/* A FREE slot, or SC_NO_SLOT. */
uint32_t sc_slot_find(struct sc_segment *s);
void sc_slot_use(struct sc_segment *s, uint32_t slot);
void sc_slot_free(struct sc_segment *s, uint32_t slot);
bool sc_slot_used(const struct sc_segment *s, uint32_t slot);

void sc_maps_clear(struct sc_segment *s);
/* Of one region, which then counts as free. */
void sc_region_blocks_clear(struct sc_segment *s, uint32_t region);

/* sc_back, without the lock, allocates the memory behind a run; SC_E_MEMORY: the kernel has none, errno says why. */

#endif
