/* layout.h - the bytes of the segment, and who may change each of them.
 *
 * The segment is one POSIX shared-memory file. It gets its name only when it is whole (segment.py), so
 * nobody ever sees a header that is being written. All numbers are little-endian.
 *
 *   offset            bytes                     what
 *   0                 4096                      header            (struct sc_header)
 *   geometry.lane_table   lanes * 2048          lane table        (struct sc_lane)
 *   geometry.layout_table 1024 * 512            layout table      (struct sc_layout)
 *   geometry.region_table regions * 256         region table      (struct sc_region)
 *   geometry.slot_table   slots * 128           slot table        (struct sc_slot)         the truth
 *   geometry.scores   slots * 8                 eviction scores
 *   geometry.ghosts   ghost_lines * 64          what the evicted were worth (ghost.h)
 *   geometry.shares   lanes * share_stride      share table, one row of slots * 8 a lane
 *   geometry.since    lanes * since_stride      when each share was first held, one row of slots * 4 a lane
 *   geometry.index    2^index_bits * 8          index             derived from the slot table
 *   geometry.slot_map slots / 8                 used slots        derived
 *   geometry.block_map (1 + regions) * blocks / 8   used blocks   derived
 *   geometry.owners   (1 + regions) * blocks * 4    block -> slot + 1, 0: nobody; derived
 *   geometry.backed   blocks / 8                blocks of region 0 with memory behind them; bits are only ever set
 *   geometry.metadata                           the end of what every process maps; not a part
 *   geometry.payload  capacity                  region 0; at a multiple of 2 MiB
 *
 * Blocks are numbered through all regions: those of region r begin at r * blocks, and it has at most so many.
 *
 * Who may change what (nobody else may, and "arena lock" means the lane that header.lock names):
 *
 *   header, first 512 bytes   the creator, before the segment has a name; constant ever after
 *   header.lock               any lane, by compare-and-swap from 0 or from a dead holder to itself;
 *                             the holder back to 0
 *   header.index_seq, layouts .. ghosts, index, slot_map, block_map, owners, layouts: arena lock
 *   header.lane_limit, retired, door_pid; lane identity (role .. group): the holder of the door (see lane.h);
 *                             role and pid also the lane itself when it closes
 *   lane.incarnation          the holder of the door, of a lane in which nobody else lives
 *   lane.reaped               arena lock; the lane itself when it closes
 *   lane.counters, gauges, histograms    that lane
 *   slot.state                see slot.h, which has the table of transitions
 *   slot, other fields        arena lock, while the state is FREE; lease_until_us: any granter; seal: who publishes
 *   scores                    any lane that uses the object, a plain store; arena lock, when a slot is filled or freed. One
 *                             that is lost, or late, costs accuracy only
 *   ghosts                    arena lock; whatever is lost or wrong there costs accuracy only
 *   shares[l][s]              see share.h
 *   since[l][s]               lane l's process, a plain store when it holds a share of s that it did not hold before;
 *                             for people: it means something only while that share is held
 *   regions[r]                see region.h
 *   backed                    any lane, after it allocated the memory
 *   payload                   the owner lane of a WRITING slot, or its several writers, in that slot's blocks
 */
#ifndef SC_LAYOUT_H
#define SC_LAYOUT_H

#include <stddef.h>

#include "atomics.h"

#define SC_MAGIC UINT64_C(0x45484341434d4853) /* "SHMCACHE" */
#define SC_VERSION 5

#define SC_MAX_LANES 256
#define SC_MAX_SLOTS (1u << 20)
#define SC_MAX_REGIONS 31 /* of device memory */
#define SC_MAX_BLOCKS (1u << 31) /* of a region; those of all that there can be have numbers below SC_NO_SLOT */
#define SC_MAX_LAYOUTS 1024
#define SC_MAX_KEY 64
#define SC_MAX_GROUP 64
#define SC_MAX_COMMAND 24
#define SC_MAX_FINGERPRINT 256
#define SC_MAX_SPEC 496 /* bytes of one encoded layout */
#define SC_PAYLOAD_ALIGN (UINT64_C(2) << 20)
#define SC_NO_SLOT UINT32_MAX

/* Where the parts lie: computed from the four numbers that the creator chose, never read from the file. */
struct sc_geometry {
    uint64_t capacity, block_size;
    uint32_t slots, lanes, blocks, regions, index_bits, ghost_lines;
    uint64_t lane_table, layout_table, region_table, slot_table, scores, ghosts, shares, share_stride, since, since_stride, index, slot_map,
        block_map, owners, backed, metadata, payload, segment_bytes;
};

struct sc_header {
    uint64_t magic;
    uint64_t format;                /* version and struct sizes: SC_FORMAT */
    uint64_t capacity;              /* payload bytes */
    uint64_t block_size;            /* bytes, a power of two */
    uint32_t slots;
    uint32_t lanes;
    uint64_t read_lease_us;
    uint64_t write_lease_us;
    uint64_t lock_timeout_us;
    uint64_t created_ns;            /* Unix time */
    uint64_t epoch_us;              /* CLOCK_MONOTONIC at creation: scores count from here */
    uint64_t seed;                  /* of the key hash */
    uint8_t boot_id[16];            /* an arena never outlives the boot that made it */
    uint32_t regions;               /* of device memory that there can be at a time */
    uint32_t reserved0;
    uint64_t eviction_window_us;    /* what one more request is worth; 0: nothing, the order is by time alone */
    uint64_t checksum;              /* over the bytes above and the fingerprint */
    uint32_t fingerprint_bytes;
    uint32_t reserved1;
    char fingerprint[SC_MAX_FINGERPRINT];
    uint8_t reserved3[120];

    sc_word lock;                   /* 512: 0, or lane + 1 | waiters << 16 | incarnation << 32; see lock.h */
    uint8_t pad0[120];
    sc_word index_seq;              /* 640: odd while the index is being rebuilt */
    uint8_t pad1[120];
    sc_half lane_limit;             /* 768: one more than the highest lane ever taken; only grows */
    sc_half retired;                /* 1: the segment has lost its name; nobody may join any more */
    sc_half door_pid;               /* who is in the door, for people */
    uint8_t pad2[116];
    sc_half layouts;                /* 896: entries in the layout table; only grows */
    sc_half index_tombs;            /* tombstones in the index */
    sc_half free_blocks;
    sc_half free_slots;
    sc_half block_cursor;           /* where the next search begins */
    sc_half slot_cursor;
    sc_half detached;               /* WRITING slots that left the index */
    sc_word ghosts;                 /* remembered until now; see ghost.h */
    uint8_t pad3[3160];
};

/* Events that a lane counts, in its own cache lines: X(name). Python's Counters has the same names. */
#define SC_COUNTERS(X)                                                                                             \
    X(lookup_hits) X(lookup_misses) X(read_hits) X(read_misses) X(claims) X(grants) X(releases)                    \
    X(reserved_returned) X(reservations) X(publishes) X(published_bytes) X(aborts) X(deletes) X(evictions)         \
    X(evicted_bytes) X(no_space) X(leases_revoked) X(writes_detached) X(reaped_shares) X(reaped_writes)            \
    X(lock_steals) X(rebuilds)                                                                                     \
    X(prefetch_requests) X(prefetch_keys) X(prefetch_l1_hits) X(prefetch_l2_hits) X(prefetch_cancels)              \
    X(prefetch_contended) X(prefetch_no_space) X(prefetch_errors)                                                  \
    X(l2_lookups) X(l2_lookup_hits) X(l2_lookup_errors) X(l2_loads) X(l2_loaded_bytes) X(l2_load_misses)           \
    X(l2_load_errors) X(l2_timeouts) X(l2_damaged) X(l2_stores) X(l2_stored_bytes) X(l2_store_skips)               \
    X(l2_store_retries) X(l2_store_errors) X(l2_store_no_space) X(l2_store_drops) X(l2_evictions) X(l2_evicted_bytes)

/* What a lane has at this moment: X(name). Zero from its taking on; of a dead lane it says nothing. */
#define SC_GAUGES(X)                                                                                               \
    X(prefetch_queued) X(prefetch_in_flight) X(l2_loading) X(l2_storing) X(l2_backlog_bytes) X(pinned_bytes)

/* How long something took: X(name). */
#define SC_HISTOGRAMS(X)                                                                                           \
    X(prefetch_queue) X(prefetch_first_key) X(prefetch_total) X(l2_lookup) X(l2_load) X(l2_store)

/* Bucket b of a histogram counts times up to SC_BUCKET_US << b microseconds and above those of bucket b - 1; the last
 * counts all that are longer. */
#define SC_BUCKETS 23
#define SC_BUCKET_US 16

enum sc_counter {
#define X(name) SC_##name,
    SC_COUNTERS(X)
#undef X
    SC_COUNTER_COUNT
};
#define X(name) +1
enum { SC_GAUGE_COUNT = SC_GAUGES(X), SC_HISTOGRAM_COUNT = SC_HISTOGRAMS(X) };
#undef X

struct sc_histogram {
    sc_word sum_us;
    sc_word buckets[SC_BUCKETS];
};

enum sc_role { SC_ROLE_NONE = 0, SC_ROLE_PRIVATE = 1, SC_ROLE_RANK = 2, SC_ROLE_CONTROLLER = 3 };

struct sc_lane {
    sc_half incarnation;            /* bumped at each taking; 0: never taken */
    sc_half reaped;                 /* the incarnation whose leftovers are all taken back */
    sc_half role;                   /* enum sc_role */
    sc_half rank;                   /* of a SC_ROLE_RANK lane */
    sc_half world_size;
    sc_half group_bytes;
    sc_half pid;                    /* for people; 0 after a clean close */
    sc_half group_hash;             /* of the group's name; stored before role */
    sc_word started_ns;             /* Unix time of the taking, for people */
    sc_word command[SC_MAX_COMMAND / 8]; /* for people */
    sc_word group[SC_MAX_GROUP / 8];
    sc_word counters[64];
    sc_word gauges[8];
    struct sc_histogram histograms[7];
};
_Static_assert(SC_COUNTER_COUNT <= 64 && SC_GAUGE_COUNT <= 8 && SC_HISTOGRAM_COUNT <= 7, "statistics fit");

/* An entry is whole before header.layouts counts it (release), and never changes after (acquire). */
struct sc_layout {
    uint32_t spec_bytes;
    uint32_t reserved;
    uint64_t nbytes;                /* payload bytes of an object of this layout */
    char spec[SC_MAX_SPEC];
};

/* A run of device memory that one lane's process has allocated. */
struct sc_region {
    sc_word state;                  /* see region.h */
    sc_word seal;                   /* over what is constant while there is a region, the fields down to handle */
    sc_half incarnation;            /* of the owner */
    sc_half blocks;
    sc_half block_shift;            /* its blocks have block_size << block_shift bytes */
    sc_half device;                 /* the owner's number for it, for people */
    sc_word nbytes;                 /* of payload in the allocation */
    sc_word uuid[2];                /* the device's */
    sc_word handle[8];              /* for cuIpcOpenMemHandle */
    sc_half free_blocks;            /* derived */
    sc_half block_cursor;           /* where the next search begins */
    sc_word opened[SC_MAX_LANES / 64]; /* a bit a lane: its process has it open */
    uint8_t pad[96];
};

struct sc_slot {
    sc_word state;                  /* see slot.h */
    sc_word seal;                   /* over all that a reader relies on: sc_seal in slot.h */
    sc_half about;                  /* see slot.h: bytes of the key, the layout, whether it has several writers */
    sc_half block;                  /* the first of as many as nbytes need; says the region, too */
    sc_word nbytes;
    sc_word key[SC_MAX_KEY / 8];    /* zero-padded; a key of up to 32 bytes shares the state's cache line */
    sc_word hash;                   /* of the key */
    sc_word lease_until_us;         /* CLOCK_MONOTONIC after which unclaimed reserved shares may be revoked */
    sc_word reserved_us;            /* CLOCK_MONOTONIC of reserve_write */
    sc_half writers;                /* how many lanes fill it together; 1: its owner alone */
    sc_half group;                  /* of several writers: hash of the group they belong to */
};

_Static_assert(sizeof(struct sc_header) == 4096, "header is one page");
_Static_assert(offsetof(struct sc_header, lock) == 512, "the constant part ends at 512");
_Static_assert(offsetof(struct sc_header, index_seq) == 640, "index_seq has its own cache lines");
_Static_assert(offsetof(struct sc_header, lane_limit) == 768, "lane_limit has its own cache lines");
_Static_assert(offsetof(struct sc_header, layouts) == 896, "words under the arena lock lie together");
_Static_assert(sizeof(struct sc_lane) == 2048 && offsetof(struct sc_lane, counters) == 128, "lane: identity, counters");
_Static_assert(sizeof(struct sc_layout) == 512, "layout entry");
_Static_assert(sizeof(struct sc_region) == 256 && offsetof(struct sc_region, opened) == 128, "region entry");
_Static_assert(sizeof(struct sc_slot) == 128 && offsetof(struct sc_slot, key) == 32, "slot is two cache lines");
_Static_assert(offsetof(struct sc_slot, hash) == 96, "slot tail");

/* A binary built from other structs is refused at attach. */
#define SC_FORMAT                                                                                                  \
    ((uint64_t)SC_VERSION | (uint64_t)sizeof(struct sc_slot) << 16 | (uint64_t)sizeof(struct sc_lane) << 32 |      \
     (uint64_t)(SC_COUNTER_COUNT | SC_GAUGE_COUNT << 7 | SC_HISTOGRAM_COUNT << 11) << 48)

#endif
