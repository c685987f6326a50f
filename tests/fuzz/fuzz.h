/* fuzz.h - one run: an arena in a file without a name, handles that work in it, damage done to it, and what must hold
 * nevertheless.
 *
 * An input is a string of bytes; each choice takes one or more of them, and a choice without bytes is 0. So every
 * string is a valid run, and a mutated string a similar one.
 *
 * What must hold, whatever was damaged: no signal, no report of a sanitizer, no hang; each call gives a result that its
 * contract names; what is read lies in the payload and is, whole, an object that was published under that key; after a
 * rebuild verify has nothing to say of what is derived. What nobody can notice is left out, and said where it is
 * (damage.c).
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdio.h>
#include <stdlib.h>

#include "arena.h"
#include "writers.h"

enum {
    BLOCK = 4096,
    BLOCKS = 24,
    SLOTS = 12,
    LANES = 6,
    RANKS = 2,
    HANDLES = 4,
    KEYS = 10,
    SAME_WIDTH = 4, /* the first keys have 8 bytes each */
    BATCH = 4,
    BATCHES = 6,
    VERSIONS = 512,
    LOCK_TIMEOUT_US = 2000,
    REGIONS = 2,
    DEVICE_BYTES = 2 * BLOCKS * BLOCK, /* a region of twice as many bytes has blocks of twice the size */
};

struct input { const uint8_t *data; size_t left; };

uint32_t choose(struct input *in, uint32_t n); /* below n */
uint64_t choose_word(struct input *in);

/* A batch of keys, or of what was reserved or read under them. */
struct batch {
    uint32_t n, keys[BATCH], versions[BATCH], parts[BATCH];
    struct sc_ref refs[BATCH];
    int handle; /* -1: the batch is free */
};

/* What was written once: each has a key and bytes of its own. Of several writers each has its part of the bytes. */
struct part_of_write { int handle; bool pending, filled; };
struct version {
    uint32_t key, nbytes, layout, writers, joined, slot, generation;
    struct part_of_write parts[RANKS];
    bool published;
};

struct world {
    int fd;
    uint8_t *map;                 /* the whole segment, writable */
    uint64_t bytes;
    struct sc_geometry g;         /* as it was made */
    struct sc_segment *handles[HANDLES];
    struct batch writes[BATCHES], reads[BATCHES];
    struct version versions[VERSIONS];
    uint32_t version_count;
    uint64_t layouts;             /* numbers of layouts that are in the table */
    bool truncated;               /* the file is shorter than the mappings */
    bool concurrent;              /* damage falls while operations run */
    bool unsure;                  /* damage that nobody can notice: bytes are not compared any more */
    bool shares_lie;              /* shares, or objects that have some, were damaged: held ones may be gone */
    bool forged;                  /* the header was replaced once */
    bool regions_lie;             /* the region table was damaged: memory of a region may be another's by now */
    uint8_t device[REGIONS][DEVICE_BYTES]; /* what lies in device memory, by the region's number */
    uint64_t device_bytes[REGIONS]; /* of the last region that was added under each number */
    bool calm;                    /* no word of the slot table is damaged any more */
    uint8_t touched[(SLOTS * sizeof(struct sc_slot)) / 8]; /* words of the slot table that were damaged */
};

/* world.c */
void world_make(struct world *w, uint64_t lease_us, uint32_t regions);
void world_end(struct world *w);
/* An error of the core, or 0; handle h is free before. */
int world_attach(struct world *w, int h, const char *group, int32_t rank, uint32_t world_size);
void world_detach(struct world *w, int h, bool dies);
void drop_batches(struct world *w, int h);
uint32_t keys_pack(const uint32_t *keys, uint32_t n, char *data, uint32_t *ends);
uint32_t version_new(struct world *w, uint32_t key, uint32_t nbytes, uint32_t layout);
/* What handle h reserved, or its part of what another one did. */
void version_reserve(struct world *w, int h, struct batch *b, uint32_t i, uint32_t writers);
/* False: its memory may be another's by now, and so it must not be published. */
bool version_fill(struct world *w, const struct batch *b, uint32_t i);
/* The part of entry i is finished: published, if it was the last. */
void version_finish(struct world *w, uint32_t version, uint32_t part, int8_t status);
void version_bytes(uint32_t version, char *data, uint32_t nbytes);
void check_read(struct world *w, uint32_t key, const struct sc_ref *ref);
void check_ref(const struct world *w, struct sc_segment *s, const struct sc_ref *ref);
/* The number of a new region, or an error. */
int64_t region_add(struct world *w, int h, uint64_t nbytes);
/* Told where FUZZ_TELL is set. */
void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* damage.c */
void damage(struct world *w, struct input *in);
/* A word of the segment gets a value, unless it is one that must not be damaged twice. */
void damage_word(struct world *w, uint64_t offset, uint64_t value);
uint64_t word_at(const struct world *w, uint64_t offset);

/* operations.c */
void operate(struct world *w, struct input *in);

/* target.c */
extern bool undamaged; /* set: all is as ever, but nothing is damaged. What fails then is wrong by itself. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* cases.c: scripted damage, a case a name. False: there is none of that name. */
bool run_case(const char *name);
void list_cases(void);

#endif
