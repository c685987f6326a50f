/* share.h - share words: one a lane and slot, in the lane's own row.
 *
 *   63          32 31       16 15   14 13    0
 *   | generation  | reserved  | stage | held |
 *
 *   change             by whom                                    how: by compare-and-swap
 *   held + 1           the lane's process                         takes a fresh share
 *   reserved -> held   the lane's process                         claims
 *   held - 1           the lane's process                         releases, or undoes
 *   reserved - 1       the lane's process; any controller         finish_read; cancel_read
 *   reserved + 1       any lane                                   grants
 *   stage              the lane's process; when it gave up or     its part in a write by several lanes: writers.h
 *                      died, the holder of the arena lock
 *   word -> 0          holder of the arena lock                   reaps the dead, or itself at close (swap)
 *
 * A word of another generation than the slot's counts as zero, and so shares end with their object: nobody takes an
 * expired reserved share out of a word. A word's generation never goes back: who finds a later one than its own is
 * late, and its object is gone.
 *
 * A share protects once it is in the word and the state word, looked at afterwards, still is READY (or EVICTING,
 * set back to READY) with its generation. The evictor marks EVICTING first, reads the words second, and frees by
 * compare-and-swap; all are sequentially consistent, so one of the two sees the other, also where the share is a claim
 * or a new grant of a reserved share that the evictor found expired.
 *
 * Beside each word the since table has when its lane began to hold the object: in units of 2^14 us from the arena's
 * creation, which wrap after two years. Who decides anything never looks at it.
 */
#ifndef SC_SHARE_H
#define SC_SHARE_H

#include "index.h"

enum { SC_RESERVED_MAX = 0xffff, SC_HELD_MAX = 0x3fff };
enum sc_stage { SC_STAGE_NONE = 0, SC_STAGE_WRITING = 1, SC_STAGE_DONE = 2 };

static inline uint32_t sc_held(uint64_t word) { return (uint32_t)word & SC_HELD_MAX; }
static inline uint32_t sc_reserved(uint64_t word) { return (uint32_t)(word >> 16) & SC_RESERVED_MAX; }
static inline bool sc_has_shares(uint64_t word) { return sc_held(word) || sc_reserved(word); }
static inline enum sc_stage sc_stage(uint64_t word) { return (enum sc_stage)(word >> 14 & 3); }
static inline uint64_t sc_with_stage(uint64_t word, enum sc_stage stage)
{
    return (word & ~(UINT64_C(3) << 14)) | (uint64_t)stage << 14;
}
static inline uint64_t sc_share_word(uint32_t generation, uint32_t reserved, uint32_t held)
{
    return (uint64_t)generation << 32 | (uint64_t)reserved << 16 | held;
}

enum sc_take { SC_GONE = 0, SC_FRESH = 1, SC_CLAIMED = 2, SC_SATURATED = 3 };

/* Claims a reserved share of s's lane, unless fresh is set, else takes a fresh one, of the object that state names. */
enum sc_take sc_share_take(struct sc_segment *s, uint32_t slot, uint64_t state, bool fresh, uint64_t now_us);
/* How long the lane has held the object of which it holds a share. */
uint64_t sc_share_held_us(const struct sc_segment *s, uint32_t lane, uint32_t slot, uint64_t now_us);
/* Gives back a held share. False: there is none of that generation. */
bool sc_share_release(struct sc_segment *s, uint32_t slot, uint32_t generation);

/* Adds a reserved share to a lane's word; protects only after sc_share_confirm. False: late, or 65,535 already. Its lane may
 * use it before that, and the object may go then: the granter finds nothing, and counts no grant. */
bool sc_share_grant(struct sc_segment *s, uint32_t lane, uint32_t slot, uint32_t generation);
/* Takes an unclaimed share back from a lane. */
bool sc_share_ungrant(struct sc_segment *s, uint32_t lane, uint32_t slot, uint32_t generation);
/* The look at the state word that makes shares count: true if the object is still there. */
bool sc_share_confirm(struct sc_segment *s, uint32_t slot, uint32_t generation);

/* Nobody was granted a share of the slot's object within the read lease. */
bool sc_lease_over(const struct sc_segment *s, uint32_t slot);
/* Under the arena lock, the slot being EVICTING: true if a lane has a share that keeps it. Reserved shares whose lease is
 * over do not, nor any with force: how many there are is added to *expired. */
bool sc_share_any(const struct sc_segment *s, uint32_t slot, uint32_t generation, bool force, uint64_t *expired);
/* Just a look: no lane has any share. */
bool sc_share_none(const struct sc_segment *s, uint32_t slot, uint32_t generation);

#endif
