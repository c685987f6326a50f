/* evict.h - making room: which objects go, and how one goes. All under the arena lock.
 *
 * A score is one word a slot, the smallest goes first:
 *
 *   63             18 17             2 1     0
 *   | worth (2 us)   | 0xffff - depth  | count |
 *
 * worth: the time of the last access, from the arena's creation on, and as often the eviction window as there were
 * requests beyond the first; with a window of 0 the least recently used goes first. count: how many requests have
 * used the object, 1 to 3: each call that wrote it, was granted shares of it, read it without, or touched it; those of
 * before it was evicted, too, where a ghost remembers them. Depth is the deepest place that the key had in a batch: of the
 * keys of one chain the later goes first.
 */
#ifndef SC_EVICT_H
#define SC_EVICT_H

#include "block.h"
#include "ghost.h"
#include "share.h"

enum { SC_COUNT_MAX = 3 };

static inline uint32_t sc_score_count(uint64_t score) { return score & 3 ? score & 3 : 1; }
static inline uint32_t sc_score_depth(uint64_t score) { return 0xffff - (uint32_t)(score >> 2 & 0xffff); }

static inline uint64_t sc_score_make(const struct sc_segment *s, uint64_t now_us, uint32_t depth, uint32_t count)
{
    uint64_t worth = (now_us - s->epoch_us + s->eviction_window_us * (count - 1)) >> 1;
    return worth << 18 | (uint64_t)(0xffff - (depth < 0xffff ? depth : 0xffff)) << 2 | count;
}

/* Of the last access. */
static inline uint64_t sc_score_time(const struct sc_segment *s, uint64_t score)
{
    return (score >> 18 << 1) + s->epoch_us - s->eviction_window_us * (sc_score_count(score) - 1);
}

/* Of a new object. */
static inline uint64_t sc_score_first(const struct sc_segment *s, uint64_t now_us, uint64_t hash, uint32_t depth)
{
    uint32_t before = s->eviction_window_us ? sc_ghost_count(s, hash) : 0;
    return sc_score_make(s, now_us, depth, before < SC_COUNT_MAX ? before + 1 : SC_COUNT_MAX);
}

/* Victims are listed by one scan for many evictions from one region, and a list goes stale as shares come and go, and as
 * objects come that are worth less. To be called once a hold of the lock: makes lists anew where they are so old that
 * scans cost a hundredth of the time. */
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

/* The readers' side of scores, without a lock: up to 32 keys of a batch, the first at first_depth. requests: a bit a key
 * whose request was not counted yet. *time_us begins as the time of the call and is carried from one part of a batch to
 * the next. */
void sc_touch(struct sc_segment *s, const uint32_t *slots, uint32_t n, uint32_t first_depth, uint32_t requests, uint64_t *time_us);

#endif
