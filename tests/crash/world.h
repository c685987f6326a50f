/* world.h - a small arena without a name, the processes in it, and copies of both.
 *
 * A snapshot is the bytes of the segment and, of each process, what it keeps in private memory. So an arena can be put
 * back to any moment, in another file, with any of its processes dead: a process lives while its seat's lane is locked
 * by an open file description of its own, as anywhere.
 *
 *   S   the stepped one: rank 0 of the group "g" of three (unless a state says otherwise)
 *   A   a survivor: rank 1 of g              B   a survivor: a controller of g
 *   rank 2 of g is set aside and never comes: what was granted to it must stay
 *   D   dead before S begins                 N   more lanes, where a state needs the table full
 *   C   the first to come after S's death
 */
#ifndef CRASH_WORLD_H
#define CRASH_WORLD_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"

enum { BLOCK_BYTES = 4096, BLOCKS = 10, SLOTS = 8, LANES = 8, KEYS = 30, KEY_BYTES = 16, RANKS = 3 };
enum { REGIONS = 2, REGION_BLOCKS = 4, ALL_BLOCKS = BLOCKS * (1 + REGIONS) };
enum { KEY_ANCHOR = 20, HOUR_US = 1000000000 };
enum seat { S, A, B, D, N1, N2, N3, C, SEATS };

/* What an attached process knows of itself. */
struct identity {
    bool attached, alive;
    uint32_t lane, incarnation, world_size, group;
    uint16_t rank_lanes[RANKS];
};

struct snapshot {
    uint8_t *bytes;
    struct identity who[SEATS];
};

struct world {
    int fd;
    struct sc_geometry g;
    uint8_t *map;                     /* the whole segment */
    struct sc_segment seats[SEATS];   /* opened once; a seat is attached while its identity is */
    struct identity who[SEATS];
};

extern char keys[KEYS][KEY_BYTES];

void die(const char *what);

/* The parts of the segment that a copy keeps: all but the unused ends of the layout table and the region table. */
struct part { uint64_t at, bytes; };
enum { PARTS = 4 };
void parts_of(const struct sc_geometry *g, struct part out[PARTS]);
uint64_t snapshot_bytes(const struct sc_geometry *g);

struct sc_config world_config(void);
void world_make(struct world *w);
void world_format(struct world *w);
void world_leave(struct world *w, enum seat seat); /* as a death: the kernel lets go of the lane */
void world_load(struct world *w, const uint8_t *bytes);
void world_save(const struct world *w, uint8_t *bytes);
void world_restore(struct world *w, const struct snapshot *from, enum seat but); /* all live seats but one */
void world_snapshot(const struct world *w, struct snapshot *to);
struct snapshot *snapshot_new(const struct sc_geometry *g);
void snapshot_free(struct snapshot *snapshot);

/* A seat's segment is made ready for a process that joins by itself. */
struct sc_segment *seat_empty(struct world *w, enum seat seat);
void seat_adopt(struct sc_segment *s, const struct identity *who);
void seat_identify(const struct sc_segment *s, struct identity *who);
int seat_join(struct world *w, enum seat seat, const char *group, int rank, uint32_t world_size);

/* An object's bytes tell its key, its version and its length, and are whole or not. */
void content_fill(uint8_t *to, uint32_t key, uint32_t version, uint64_t nbytes);
/* The version, or -1: not the whole of an object of that key. */
int64_t content_version(const uint8_t *from, uint32_t key, uint64_t nbytes);
/* There is no device memory here: the bytes of an object in it are where it lies, and which object it is. */
int64_t device_version(uint64_t block, uint64_t nbytes, uint32_t generation);
/* What somebody with a share finds. */
int64_t version_at(const struct world *w, uint32_t key, const struct sc_ref *ref);

/* One place for each call of the core whose signature is long. */
int64_t do_reserve(struct sc_segment *s, const char *key, uint32_t n, uint64_t nbytes, bool temporary, uint32_t writers,
                   struct sc_ref *refs);
int64_t do_reserve_in(struct sc_segment *s, uint32_t region, const char *key, uint32_t n, uint64_t nbytes, bool temporary,
                      uint32_t writers, struct sc_ref *refs);
struct sc_ref do_write_in(struct sc_segment *s, uint32_t region, uint32_t key, uint64_t nbytes);
int64_t do_add_region(struct sc_segment *s);
int do_put(struct world *w, struct sc_segment *s, uint32_t key, uint64_t nbytes, uint32_t version);
int do_read(struct sc_segment *s, uint32_t key, int flags, struct sc_ref *ref);
int do_grant(struct sc_segment *s, uint32_t key, uint32_t ranks);
struct sc_ref do_write(struct world *w, struct sc_segment *s, uint32_t key, uint64_t nbytes, bool temporary);
struct sc_ref do_write_together(struct world *w, struct sc_segment *s, uint32_t key, uint32_t writers);
int do_publish(struct sc_segment *s, const struct sc_ref *ref, uint32_t ranks);

#endif
