/* arena.h - what read.c, write.c and arena.c share behind shmcache.cdef.h, the core's contract. */
#ifndef SC_ARENA_H
#define SC_ARENA_H

#include "recover.h"

struct sc_keys { const char *data; uint32_t width; const uint32_t *ends; uint32_t n; };

enum { SC_CHUNK = 32 }; /* keys whose cache lines are fetched together */

static inline struct sc_keys sc_keys_of(const char *data, uint32_t width, const uint32_t *ends, uint32_t n)
{
    return (struct sc_keys){data, width, ends, n};
}
static inline uint32_t sc_chunk_of(uint32_t from, uint32_t n) { return n - from < SC_CHUNK ? n - from : SC_CHUNK; }

/* Loads keys from .. from + n - 1 and sends for their index and slot lines. */
void sc_keys_load(const struct sc_segment *s, const struct sc_keys *keys, uint32_t from, uint32_t n,
                  enum sc_fetch fetch, struct sc_key *out);
void sc_ref_fill(const struct sc_segment *s, const struct sc_object *o, bool temporary, struct sc_ref *ref);

/* One reserved share, with a lease, for each of ranks 0 .. ranks - 1: all or none. Protects after sc_share_confirm. */
bool sc_grant(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t ranks, uint64_t lease_until_us);
/* When the lease of what is granted now is over: up to a thousandth later, so that of grants close to one another only the
 * first stores it. */
uint64_t sc_lease_end(const struct sc_segment *s);
void sc_ungrant(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t ranks);

/* Frees an object that is not to stay, temporary or lost, once its last share is back. Best effort, it can be evicted
 * anyway. */
void sc_drop(struct sc_segment *s, uint32_t slot, uint32_t generation);

/* The object lies in a region whose owner is gone. */
static inline bool sc_lost(const struct sc_segment *s, uint32_t slot)
{
    uint32_t region = sc_region_of(s, sc_peek32(&sc_slot(s, slot)->block));
    return region && region <= s->g.regions && !sc_region_lives(s, region); /* beyond: the slot is damaged */
}

#endif
