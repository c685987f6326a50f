/* segment.h - one process's view of a segment: its mapping, its private copy of the geometry, and the only
 * ways to address the shared bytes.
 *
 * Nothing read from the segment is trusted: the geometry is recomputed from four validated numbers and kept
 * in private memory, and every index that comes out of the segment passes a bound first: sc_extent_of, sc_slot_describe.
 */
#ifndef SC_SEGMENT_H
#define SC_SEGMENT_H

#include <pthread.h>

#include "layout.h"
#include "shmcache.cdef.h"

struct sc_victims; /* of evict.c */

struct sc_segment {
    struct sc_geometry g;
    uint64_t read_lease_us, write_lease_us, lock_timeout_us, eviction_window_us, epoch_us;
    uint64_t seed, checksum;     /* of the key hash; of the header */
    uint8_t *base;               /* header .. backed: everything but the payload */
    uint64_t base_bytes;
    int lock_fd;                 /* never mapped: its open file description holds the lane's byte, so that
                                    closing it in a forked child lets go of all the child inherited */

    /* set by sc_join */
    uint32_t lane, incarnation, world_size, group; /* group: a hash of its name */
    uint16_t rank_lanes[SC_MAX_LANES];
    pthread_mutex_t mutex;       /* the threads of this process take turns at the arena lock */
    sc_half users;               /* threads inside the core */
    sc_half closed;              /* 1: closed; 2: forked */
    sc_half blind;               /* the mapping is zeros of this process alone: guard.h */
    sc_half damaged;             /* the file was cut under its mapping: guard.h */
    sc_half suspect;             /* something contradicted itself: rebuild at the next hold of the arena lock */
    sc_half lane_limit;          /* the highest that this process has seen in the header */
    bool stolen;                 /* the lock just taken was a dead holder's: recover before use */

    /* scratch of evict.c, guarded by the arena lock */
    struct sc_victims *victims[1 + SC_MAX_REGIONS]; /* allocated at the first eviction from a region */
    uint64_t *costs;             /* a cost a block; allocated at the first search for a run */

    struct sc_segment *next, *prev; /* the registry of fork handling */
    bool registered;
};

int sc_plan(uint64_t capacity, uint64_t block_size, uint32_t slots, uint32_t lanes, uint32_t regions, struct sc_geometry *g);

/* Passes unless the segment is closed, forked, fenced or cut; sc_leave after, which gives rc, or SC_E_DAMAGED where the
 * segment was cut meanwhile (guard.h). */
int sc_enter(struct sc_segment *s);
int64_t sc_leave(struct sc_segment *s, int64_t rc);

uint64_t sc_now_us(void);
uint64_t sc_checksum(const struct sc_header *h);

static inline struct sc_header *sc_header(const struct sc_segment *s) { return (struct sc_header *)s->base; }
static inline struct sc_lane *sc_lane(const struct sc_segment *s, uint32_t lane)
{
    return (struct sc_lane *)(s->base + s->g.lane_table) + lane;
}
static inline struct sc_layout *sc_layout(const struct sc_segment *s, uint32_t i)
{
    return (struct sc_layout *)(s->base + s->g.layout_table) + i;
}
static inline struct sc_region *sc_region(const struct sc_segment *s, uint32_t region)
{
    return (struct sc_region *)(s->base + s->g.region_table) + (region - 1);
}
static inline struct sc_slot *sc_slot(const struct sc_segment *s, uint32_t slot)
{
    return (struct sc_slot *)(s->base + s->g.slot_table) + slot;
}
static inline sc_word *sc_score(const struct sc_segment *s, uint32_t slot)
{
    return (sc_word *)(s->base + s->g.scores) + slot;
}
static inline sc_half *sc_ghost_table(const struct sc_segment *s) { return (sc_half *)(s->base + s->g.ghosts); }
static inline sc_word *sc_share(const struct sc_segment *s, uint32_t lane, uint32_t slot)
{
    return (sc_word *)(s->base + s->g.shares + lane * s->g.share_stride) + slot;
}
/* When the lane held this share first; see share.h. */
static inline sc_half *sc_since(const struct sc_segment *s, uint32_t lane, uint32_t slot)
{
    return (sc_half *)(s->base + s->g.since + lane * s->g.since_stride) + slot;
}
static inline sc_word *sc_index(const struct sc_segment *s) { return (sc_word *)(s->base + s->g.index); }
static inline sc_word *sc_slot_map(const struct sc_segment *s) { return (sc_word *)(s->base + s->g.slot_map); }
static inline sc_word *sc_block_map(const struct sc_segment *s) { return (sc_word *)(s->base + s->g.block_map); }
static inline sc_word *sc_backed(const struct sc_segment *s) { return (sc_word *)(s->base + s->g.backed); }
static inline sc_half *sc_owner(const struct sc_segment *s, uint32_t block)
{
    return (sc_half *)(s->base + s->g.owners) + block;
}

/* Lanes that may hold shares: never more than the table has, nor fewer than there were, whatever the header says. */
static inline uint32_t sc_lane_limit(const struct sc_segment *s)
{
    uint32_t n = sc_load32(&sc_header(s)->lane_limit), most = sc_peek32(&s->lane_limit);
    if (n > s->g.lanes)
        n = s->g.lanes;
    if (n > most)
        sc_poke32((sc_half *)&s->lane_limit, n); /* what one remembers changes nothing that others see */
    return n > most ? n : most;
}

/* FNV-1a: not against malice, against stray stores and foreign files. */
static inline uint64_t sc_fnv(uint64_t h, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = (h ^ ((const uint8_t *)data)[i]) * UINT64_C(0x100000001b3);
    return h;
}
static inline uint32_t sc_group_hash(const char *group, uint32_t group_bytes)
{
    return (uint32_t)(sc_fnv(UINT64_C(0xcbf29ce484222325), group, group_bytes) >> 32) | 1;
}

static inline void sc_tally(struct sc_segment *s, enum sc_counter c, uint64_t n)
{
    if (n)
        sc_count(&sc_lane(s, s->lane)->counters[c], n);
}

#endif
