/* evict.h - making room: which objects go, and how one goes. All under the arena lock.
 *
 * A score is one word a slot, the smallest goes first:
 *
 *   63                          17 16                1 0
 *   | time of last access (us)    | 0xffff - depth    | read |
 *
 * The time counts from the arena's creation. Depth is the key's place in its batch: of the keys of one chain the
 * later goes first. read says that a reader has touched the object since it was written.
 */
#ifndef SC_EVICT_H
#define SC_EVICT_H

#include "block.h"
#include "share.h"

static inline uint64_t sc_score_make(const struct sc_segment *s, uint64_t now_us, uint32_t depth, bool read)
{
    return (now_us - s->epoch_us) << 17 | (uint64_t)(0xffff - (depth < 0xffff ? depth : 0xffff)) << 1 | read;
}

static inline uint64_t sc_score_time(const struct sc_segment *s, uint64_t score) { return (score >> 17) + s->epoch_us; }
static inline uint32_t sc_score_depth(uint64_t score) { return 0xffff - (uint32_t)(score >> 1 & 0xffff); }

/* Victims are listed by one scan for many evictions from one region, and a list goes stale as shares come and go. To be
 * called once a hold of the lock: makes lists anew where they are old, or the scan costs next to nothing. */
void sc_refresh_victims(struct sc_segment *s);
/* None is listed any more. */
void sc_victims_clear(struct sc_segment *s);

/* A run of n free blocks of a region, made by evicting what is worth least; SC_NO_SLOT if every run of n contains an
 * object that is being written or has shares, and then nothing was evicted. */
uint32_t sc_make_run(struct sc_segment *s, uint32_t region, uint32_t n);
/* A FREE slot, by evicting the smallest score of this region, or else of another; SC_NO_SLOT if all are in use. */
uint32_t sc_make_slot(struct sc_segment *s, uint32_t region);
/* Evicts the smallest score of a region; the bytes of its blocks, 0 if nothing can go. */
uint64_t sc_evict_one(struct sc_segment *s, uint32_t region);

/* Takes a READY object away if it has no shares. force: reserved shares do not count. False: it stays. */
bool sc_remove(struct sc_segment *s, uint32_t slot, bool force);
/* WRITING -> FREE: nobody fills it any more. False: it was published, or is damaged. */
bool sc_abort(struct sc_segment *s, uint32_t slot);

/* The readers' side of recency, without a lock: some keys of a batch, the first at first_depth. *time_us begins as the
 * time of the call and is carried from one part of a batch to the next. */
void sc_touch(struct sc_segment *s, const uint32_t *slots, uint32_t n, uint32_t first_depth, uint64_t *time_us);

#endif
