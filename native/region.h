/* region.h - regions: where payload lies. Region 0 is host memory, in the segment; regions 1 .. g.regions are device
 * memory, each allocated by one process, its owner, and opened by others through the handle in the region table.
 *
 *   state word   63          32 31        16 15        0
 *                | generation  | owner lane | kind     |
 *
 *   transition             by whom                                               how
 *   NONE(g) -> LIVE(g+1)   holder of the arena lock, for itself (the owner)      store, release
 *   LIVE(g) -> LOST(g)     holder of the arena lock: the owner, giving it up     store
 *                          or closing, or whoever reaps it
 *   LOST(g) -> NONE(g)     holder of the arena lock: no object lies in it, and   store
 *                          no living process says that it has it open
 *
 *   other fields    holder of the arena lock, while the state is NONE; free_blocks and block_cursor always
 *   opened          each lane's process its own bit, before it opens and after it has closed; of the dead, who reaps
 *
 * A region lives while it is LIVE and its owner lives. Objects in one that does not are lost: SC_LOST for whoever asks.
 * They leave as objects do, when nobody has a share of them, so that the memory that a reader looks at is not said to be
 * another's meanwhile. A publisher says READY first and looks at the region second, who loses a region stores LOST first
 * and looks at the slots second (all sequentially consistent): no object stays behind.
 *
 * No driver is ever called in here: whoever has opened a region closes it when it finds it lost (regions.py). An owner
 * that gives its region up frees the memory when nobody has it open any more: it stores LOST first and looks at opened
 * second, who opens it says so first and looks at the state second.
 */
#ifndef SC_REGION_H
#define SC_REGION_H

#include "segment.h"

enum sc_region_kind { SC_REGION_NONE = 0, SC_REGION_LIVE = 1, SC_REGION_LOST = 2 };

static inline enum sc_region_kind sc_kind_of(uint64_t word) { return (enum sc_region_kind)(word & 0xffff); }
static inline uint64_t sc_region_word(uint32_t generation, uint32_t owner, enum sc_region_kind kind)
{
    return (uint64_t)generation << 32 | (uint64_t)owner << 16 | kind;
}

static inline uint32_t sc_region_of(const struct sc_segment *s, uint64_t block)
{
    return block < s->g.blocks ? 0 : (uint32_t)(block / s->g.blocks);
}
/* Where the numbers of a region's blocks begin. */
static inline uint64_t sc_first_block(const struct sc_segment *s, uint32_t region) { return (uint64_t)region * s->g.blocks; }
static inline uint64_t sc_all_blocks(const struct sc_segment *s) { return sc_first_block(s, s->g.regions + 1); }

/* How much there is of a region, and what ties its objects to it. None of another than this arena's. */
struct sc_extent { uint64_t first, blocks, block_size, tie; };
struct sc_extent sc_device_extent(const struct sc_segment *s, uint32_t region);
static inline struct sc_extent sc_extent_of(const struct sc_segment *s, uint32_t region)
{
    return region ? sc_device_extent(s, region) : (struct sc_extent){0, s->g.blocks, s->g.block_size, 0};
}
static inline uint64_t sc_blocks_for(const struct sc_extent *e, uint64_t nbytes)
{
    return nbytes <= e->blocks * e->block_size ? (nbytes + e->block_size - 1) / e->block_size : UINT32_MAX;
}

/* Of a region of the arena: counts and cursors, under the arena lock. */
static inline sc_half *sc_free_blocks(const struct sc_segment *s, uint32_t region)
{
    return region ? &sc_region(s, region)->free_blocks : &sc_header(s)->free_blocks;
}
static inline sc_half *sc_block_cursor(const struct sc_segment *s, uint32_t region)
{
    return region ? &sc_region(s, region)->block_cursor : &sc_header(s)->block_cursor;
}

/* Nobody has given it up, nor reaped it. Region 0 always. */
static inline bool sc_region_stays(const struct sc_segment *s, uint32_t region)
{
    return !region || (region <= s->g.regions && sc_kind_of(sc_load(&sc_region(s, region)->state)) == SC_REGION_LIVE);
}
/* And its owner lives. The kernel is asked once a call of the core (guard.h). */
bool sc_region_lives(const struct sc_segment *s, uint32_t region);

/* The entry agrees with itself: what it says is what its owner wrote. */
bool sc_region_sound(const struct sc_segment *s, uint32_t region);

/* Under the arena lock. All regions of a lane are lost, and it has none open. */
void sc_regions_lose(struct sc_segment *s, uint32_t lane);
/* The same for one region. */
void sc_region_lose(struct sc_segment *s, uint32_t region);
/* A lost region that nothing lies in and nobody has open is none any more. */
void sc_region_settle(struct sc_segment *s, uint32_t region);
/* Without the lock, a look at the table. */
bool sc_any_lost(const struct sc_segment *s);

#endif
