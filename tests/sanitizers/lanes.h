/* lanes.h - seeded random operations of lanes over few keys, slots and blocks, with bytes that tell which object they
 * belong to; lanes close, die between operations, die with the arena lock held, and come back.
 */
#ifndef LANES_H
#define LANES_H

#include "arena.h"

enum { KEYS = 8, HOST_KEYS = 5, KEY_BYTES = 12, WRITES = 3, READS = 4, RANKS = 2, REGIONS = 2, BLOCK = 4096 };

/* What lanes do, counted where it came to something. */
#define LANE_OPERATIONS(X)                                                                                         \
    X(RESERVED) X(PARTS) X(PUBLISHED) X(LOST) X(ABORTED) X(READ) X(CLAIMED) X(GRANTED) X(CANCELLED) X(DELETED)   \
    X(EVICTED) X(REAPED) X(STOLEN) X(DIED) X(LAYOUT) X(ADDED) X(GIVEN_UP) X(OPENED) X(CLOSED) X(FREED)            \
    X(READ_IN_REGION) X(READ_LOST) X(PUBLISHED_IN_REGION) X(PUBLISHED_LOST)
#define LANE_ENUM(name) DONE_##name,
#define LANE_NAME(name) #name,
enum { LANE_OPERATIONS(LANE_ENUM) OPERATIONS };

/* A region that the process has open, or owns. generation 0: it has not. */
struct device;
struct mapping { uint32_t generation; struct device *device; uint64_t serial; };

struct lane {
    struct sc_segment own, *s;               /* s: &own, or NULL while it has none */
    uint64_t random;
    uint32_t number;                         /* 0 .. RANKS - 1: that rank of the group; RANKS: its controller; else private */
    struct sc_ref writes[WRITES], reads[READS];
    uint32_t write_keys[WRITES], read_keys[READS];
    struct mapping open[REGIONS + 1], owned;  /* open: by the region's number, those of others */
    uint32_t own_region;                     /* 0: none */
    uint64_t done[OPERATIONS];
};

/* The arena of these tests: leases so short that some run out in between. The descriptor of its nameless file. */
int lanes_create(void);

/* Opens a segment of its own and joins; false: no lane for it now. */
bool lane_join(struct lane *l, int fd);
/* One random operation. */
void lane_step(struct lane *l, int fd);
/* As if its process were killed: nothing of it is touched any more. In the lock: it holds the arena lock at that moment. */
void lane_die(struct lane *l, bool in_lock);
/* Gives all back and leaves. */
void lane_close(struct lane *l);

/* regions.c */

/* Adds, gives up, opens or closes a region, or frees what nobody has open any more. */
void regions_step(struct lane *l);
/* The device memory of a region, opened where it is not yet; NULL: the region is lost. */
uint64_t *region_map(struct lane *l, uint32_t region);
/* The same of one that is open, or NULL: it was lost before it could be opened. Checks that it is not freed. */
uint64_t *region_mapped(const struct lane *l, uint32_t region);
/* Before the lane leaves: it closes what it has open, or leaves that to its end. */
void regions_leave(struct lane *l);
/* Nobody but this lane is there: no region is left, and each can be had and filled. */
void regions_settled(struct lane *l);

/* A random number below n, of the lane's own. */
uint32_t below(struct lane *l, uint32_t n);

/* When no lane is in the core any more: nothing that they left is stuck. They are closed; then the whole arena can be used. */
void lanes_settle(struct lane *lanes, uint32_t n, int fd);
/* Prints what the lanes have done, and the core's counters; name=number. */
void lanes_report(const struct lane *lanes, uint32_t n);

/* Its own plain memory was set to zero: a simulated memory wants to know. */
void memory_cleared(void *at, size_t bytes);
/* What the payload's words are read and written by: plain accesses, or those of a simulated memory. */
uint64_t payload_load(const uint64_t *word);
void payload_store(uint64_t *word, uint64_t value);

/* Prints what is wrong and ends the program. */
#define CHECK(what)                                                                                                \
    do {                                                                                                           \
        if (!(what))                                                                                               \
            lanes_failed(__FILE__, __LINE__, #what);                                                               \
    } while (0)
void lanes_failed(const char *file, int line, const char *what) __attribute__((noreturn));

#endif
