/* slot.h - the state word of a slot, and the key in it.
 *
 *   63          32 31        16 15     6   5        4           3          2     0
 *   | generation  | owner lane | asked   | sealed | temporary | detached | state |
 *
 *   transition                    by whom                                              how
 *   FREE(g)     -> WRITING(g)     holder of the arena lock, for itself (the owner)     store, release
 *   FREE(g)     -> FREE(g+2^28)   holder of the arena lock: its seal says that it was    store
 *                                 freed by a stray store, or by somebody who died
 *   WRITING(g)  -> +detached      holder of the arena lock: the lease is over, or one   compare-and-swap
 *                                 of several writers gave up or died
 *   WRITING(g)  -> +asked, +sealed   one of several writers; see writers.h             compare-and-swap
 *   WRITING(g)  -> READY(g)       the owner; no lock                                   compare-and-swap
 *   WRITING(g)  -> FREE(g+1)      holder of the arena lock, for the owner or the dead  compare-and-swap
 *   READY(g)    -> EVICTING(g)    holder of the arena lock                             compare-and-swap
 *   EVICTING(g) -> READY(g)       holder of the arena lock, or a reader whose share    compare-and-swap
 *                                 is in its share word: it calls the eviction off
 *   EVICTING(g) -> FREE(g+1)      holder of the arena lock, having seen no share       compare-and-swap
 *
 * The other fields of a slot are filled while it is FREE and constant until it is FREE again. A reader without
 * a share reads them between two looks at the state word and keeps them only if the generation stayed; one with
 * a share may rely on them. Who reuses a slot fences (release) between the new generation and the new fields.
 *
 * The seal is a checksum that ties them to the key, the slot and the generation, so that stray stores into the table
 * give no bytes of another object. It is another one while the object is written: who publishes changes it, just before
 * the state. A slot whose seal is broken is served to nobody, and freed by the next rebuild (sc_recover).
 */
#ifndef SC_SLOT_H
#define SC_SLOT_H

#include <string.h>

#include "region.h"

enum sc_state { SC_FREE = 0, SC_WRITING = 1, SC_READY = 2, SC_EVICTING = 3 };
#define SC_DETACHED (UINT64_C(1) << 3)
#define SC_TEMPORARY (UINT64_C(1) << 4)
#define SC_SEALED (UINT64_C(1) << 5)
#define SC_ASKED (UINT64_C(0x3ff) << 6)

static inline enum sc_state sc_state_of(uint64_t word) { return (enum sc_state)(word & 7); }
static inline uint32_t sc_generation(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t sc_owner_of(uint64_t word) { return (uint32_t)(word >> 16) & 0xffff; }
static inline uint64_t sc_with_state(uint64_t word, enum sc_state state) { return (word & ~UINT64_C(7)) | state; }
static inline uint32_t sc_asked(uint64_t word) { return (uint32_t)(word >> 6) & 0x3ff; }
static inline uint64_t sc_published(uint64_t word) { return sc_with_state(word & ~(SC_ASKED | SC_SEALED), SC_READY); }
static inline uint64_t sc_freed(uint64_t word) { return (uint64_t)(sc_generation(word) + 1) << 32; }
/* Of a slot that contradicted itself: past every generation that somebody may remember of it. */
static inline uint64_t sc_freed_far(uint64_t word) { return (uint64_t)(sc_generation(word) + (1u << 28)) << 32; }
static inline uint64_t sc_writing(uint64_t word, uint32_t owner, uint64_t flags)
{
    return (uint64_t)sc_generation(word) << 32 | (uint64_t)owner << 16 | flags | SC_WRITING;
}

/* slot.about: layout << 16 (0: plain bytes, n: entry n - 1 of the layout table) | several writers << 8 | bytes of the key */
static inline uint32_t sc_about(uint32_t key_bytes, uint32_t layout, bool several)
{
    return layout << 16 | (uint32_t)several << 8 | key_bytes;
}
static inline uint32_t sc_key_bytes(uint32_t about) { return about & 0xff; }

/* A key as the core handles it: padded to words, with its hash. */
struct sc_key { uint64_t words[SC_MAX_KEY / 8], hash; uint32_t bytes, hint; }; /* hint: a slot to try first */

static inline uint64_t sc_mix(uint64_t a, uint64_t b)
{
    __uint128_t p = (__uint128_t)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

/* In the way of wyhash: two words a multiplication. */
static inline void sc_key_load(struct sc_key *k, const void *data, uint32_t bytes, uint64_t seed)
{
    const char *from = data;
    uint64_t h = seed, *w = k->words;
    uint32_t rest = bytes;
    for (; rest >= 16; rest -= 16, from += 16, w += 2) {
        memcpy(w, from, 16);
        h = sc_mix(w[0] ^ UINT64_C(0xa0761d6478bd642f), w[1] ^ h);
    }
    if (rest) {
        w[0] = w[1] = 0; /* bytes <= 64, so there are two words left */
        memcpy(w, from, rest);
        h = sc_mix(w[0] ^ UINT64_C(0xa0761d6478bd642f), w[1] ^ h);
    }
    k->hash = sc_mix(h ^ UINT64_C(0x1d8e4e27c47d124f), bytes ^ UINT64_C(0x589965cc75374cc3));
    k->bytes = bytes;
    k->hint = SC_NO_SLOT;
}

/* Valid only if the generation is the same before and after. */
static inline bool sc_key_is(const struct sc_slot *slot, const struct sc_key *k)
{
    if (sc_key_bytes(sc_peek32(&slot->about)) != k->bytes)
        return false;
    for (uint32_t i = 0; i < (k->bytes + 7) / 8; i++)
        if (sc_peek(&slot->key[i]) != k->words[i])
            return false;
    return true;
}

/* What a reader gets to know of an object it has a share of. */
struct sc_object { uint32_t slot, generation, layout, blocks; uint64_t block, nbytes, hash; uint32_t region; };

static inline bool sc_several(uint32_t about) { return about >> 8 & 1; }

/* Of the header and the region, too: with another block size the same blocks are other bytes. state: only what does not
 * change while the slot is used; of several writers the owner does. */
static inline uint64_t sc_seal(const struct sc_segment *s, const struct sc_object *o, uint32_t about, uint64_t state, bool ready)
{
    uint64_t of = (state & SC_TEMPORARY) | (sc_several(about) ? 0 : (uint64_t)sc_owner_of(state) << 8);
    uint64_t tie = s->checksum ^ (o->region ? sc_device_extent(s, o->region).tie : 0);
    uint64_t h = sc_mix(o->hash ^ tie ^ ((uint64_t)o->generation << 32 | o->slot),
                        UINT64_C(0x9fb21c651e98df25) ^ o->nbytes);
    uint64_t phase = ready ? UINT64_C(0xa0761d6478bd642f) : UINT64_C(0xe7037ed1a0b428db);
    return sc_mix(h ^ (o->block << 32 | about), phase ^ of) | 1; /* never 0, which a FREE slot has */
}

/* Bounds-checks what the slot says, and whether it says so of this hash and generation. hash: of the key that was asked
 * for, or what the slot has. A publisher may have changed the seal and not yet the state. */
static inline bool sc_slot_describe(const struct sc_segment *s, uint32_t slot, uint64_t state, uint64_t hash,
                                    struct sc_object *o)
{
    const struct sc_slot *r = sc_slot(s, slot);
    uint32_t about = sc_peek32(&r->about);
    uint64_t seal = sc_peek(&r->seal), nbytes = sc_peek(&r->nbytes), block = sc_peek32(&r->block);
    struct sc_extent e = sc_extent_of(s, sc_region_of(s, block));
    uint32_t blocks = (uint32_t)sc_blocks_for(&e, nbytes);
    *o = (struct sc_object){slot, sc_generation(state), about >> 16, blocks, block, nbytes, hash, sc_region_of(s, block)};
    return nbytes > 0 && block - e.first + blocks <= e.blocks && o->layout <= SC_MAX_LAYOUTS &&
           (seal == sc_seal(s, o, about, state, true) ||
            (sc_state_of(state) == SC_WRITING && seal == sc_seal(s, o, about, state, false)));
}

/* Several lanes fill this slot together. */
static inline bool sc_collective(const struct sc_segment *s, uint32_t slot)
{
    return sc_several(sc_peek32(&sc_slot(s, slot)->about));
}

#endif
