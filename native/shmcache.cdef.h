/* shmcache.cdef.h - the core as Python sees it. Plain declarations: the compiler includes this file (with stdint.h
 * before it), and cffi reads it.
 *
 * Keys come packed: one after the other in `keys`, all of `width` bytes, or, where width is 0, each ending at
 * ends[i]; the caller has checked that each has 1 to 64 bytes. Functions of keys give how many of them have the
 * status SC_OK, or an sc_error below zero; status[i] is an sc_status.
 */

enum sc_error {
    SC_E_CLOSED = -1,      /* closed, or this is a forked child */
    SC_E_BUSY = -2,        /* a live holder kept the lock or the door beyond lock_timeout */
    SC_E_DAMAGED = -3,     /* the bytes of the segment contradict each other */
    SC_E_VERSION = -4,     /* made by a binary with another layout.h */
    SC_E_MEMORY = -5,      /* the kernel refused memory; errno says why */
    SC_E_SYSTEM = -6,      /* a system call failed; errno says why */
    SC_E_LANE_IN_USE = -7, /* the rank's owner lives */
    SC_E_NO_LANE = -8,     /* every lane is taken */
    SC_E_WORLD_SIZE = -9,  /* the live members of the group state another world_size */
    SC_E_RETIRED = -10,    /* the segment lost its name before the door was passed */
    SC_E_LAYOUTS = -11,    /* the layout table is full */
    SC_E_FENCED = -12,     /* the lane's lock was lost and another process took the lane */
    SC_E_UNLIKE = -13,     /* a key is being written by this group on other terms: SC_UNLIKE; nothing stays reserved */
    SC_E_REGIONS = -14     /* every number of a region of device memory is taken, or there is none of this number */
};

enum sc_status {
    SC_OK = 0,
    SC_NOT_FOUND = 1,
    SC_IN_FLIGHT = 2,
    SC_EXISTS = 3,
    SC_NO_SPACE = 4,
    SC_NO_SHARE = 5,
    SC_LOCKED = 6,
    SC_NOT_OWNER = 7,
    SC_LOST = 8,
    SC_PART = 9,           /* SC_OK, but of several writers others are to come: the object is not published yet */
    SC_UNLIKE = 10         /* this group is writing the key, with other writers, nbytes, layout, region or temporary */
};

/* What an arena is made of. Leases in microseconds. */
struct sc_config {
    uint64_t capacity, block_size;
    uint32_t slots, lanes, regions;          /* regions: of device memory that there can be at a time */
    uint64_t read_lease_us, write_lease_us, lock_timeout_us;
    uint64_t eviction_window_us;             /* 0: the least recently used goes first */
    char fingerprint[256];
    uint32_t fingerprint_bytes;
    uint8_t boot_id[16];
};

/* What became of a key that was to be reserved or read, and its object where status is SC_OK. offset counts from the
 * start of the region (0: the payload); nbytes is 0 in a record that was never filled. batch.py knows this order. */
struct sc_ref {
    uint64_t offset, nbytes;
    uint32_t slot, generation;
    uint16_t layout, region, temporary, status;
};

struct sc_reaped { uint64_t lanes, shares, writes, lock; };

/* A snapshot, taken without a lock. */
struct sc_info {
    uint64_t capacity, block_size, payload, metadata, segment_bytes;
    uint32_t slots, lanes, regions, lane_limit, layouts;
    uint64_t read_lease_us, write_lease_us, lock_timeout_us, eviction_window_us, created_ns;
    char fingerprint[256];
    uint32_t fingerprint_bytes;
    uint8_t boot_id[16];
    uint32_t lock_lane, lock_incarnation;    /* lock_lane UINT32_MAX: nobody holds it */
    bool lock_alive;
};

/* Why an object's blocks are not to be had: the first that holds, from the last to the first. */
enum sc_standing {
    SC_IDLE = 0,           /* they are: readable, and nobody has a share that keeps it */
    SC_KEPT_RESERVED = 1,  /* a share is reserved, its lease not over */
    SC_KEPT_WRITING = 2,   /* it is being written */
    SC_KEPT_HELD = 3,      /* a share is held */
    SC_KEPT_DEAD = 4       /* all that would be one of these belongs to the dead, who are not reaped yet */
};

/* What a lane has of objects that are there. */
struct sc_lane_census { uint64_t reserved, held, held_bytes, writing, oldest_held_us; };
/* bytes: in blocks of region 0, one a standing. */
struct sc_census { uint64_t objects, writing, bytes[5]; struct sc_lane_census lanes[256]; };

/* One object and who keeps it. block: of its region. reserved, held: shares of all lanes. age_us: since its memory was reserved. */
struct sc_object_info {
    char key[64];
    uint64_t nbytes, block, blocks, age_us, reserved, held;
    uint32_t key_bytes, slot, generation, layout, region;
    uint32_t owner;                          /* the lane that writes it, or did */
    uint32_t writing;
    uint32_t standing;                       /* enum sc_standing */
};

/* What one lane has of one object. held_us: since it began to hold it; reserved_us: since the last grant, or up to
 * a thousandth of the read lease less. */
struct sc_share_info { uint32_t slot, generation, reserved, held; uint64_t reserved_us, held_us; };

/* A histogram: bucket b counts times up to 16 << b microseconds, the last one all that are longer. */
struct sc_times { uint64_t sum_us, buckets[23]; };

struct sc_lane_info {
    uint32_t role, state;                    /* enum sc_role, enum sc_lane_state of the core */
    uint32_t rank, world_size, incarnation, pid;
    uint64_t started_ns;
    char command[24], group[64];
    uint32_t group_bytes;
    uint64_t counters[64];                   /* each in the order of sc_statistic_name */
    uint64_t gauges[8];
    struct sc_times histograms[7];
};

/* A region of device memory: as its owner describes it, and as it is. */
struct sc_region_spec { uint8_t handle[64], uuid[16]; uint64_t nbytes; uint32_t device; };
struct sc_region_info {
    uint32_t state;                          /* 0: there is none; 1: it lives; 2: it is lost */
    uint32_t generation, owner, incarnation, device; /* owner: a lane, in that incarnation; device: its number for it */
    uint32_t blocks, free_blocks;
    uint64_t block_size, nbytes;             /* nbytes: of payload in the allocation */
    uint8_t handle[64], uuid[16];
    uint64_t opened[4];                      /* the lanes whose processes have it open, a bit each */
};

struct sc_segment;

/* The segment's file. */
int sc_segment_bytes(const struct sc_config *c, uint64_t *segment_bytes, uint64_t *metadata_bytes);
int sc_format(int fd, const struct sc_config *c);
/* Maps the metadata of the segment behind fd after checking it, and opens the file once more for its locks. s is the
 * caller's memory, all zero. */
int sc_segment_open(int fd, bool writable, struct sc_segment *s);
/* Lets go of mapping and locks; s stays, so that late callers find it closed. Again: nothing. */
void sc_segment_shut(struct sc_segment *s);
void sc_formats(int fd, uint64_t *found, uint64_t *own);
int sc_back(struct sc_segment *s, uint64_t block, uint64_t n);
int sc_populate(struct sc_segment *s, char *payload, uint64_t block, uint64_t n);
/* Maps the metadata, and what of the payload has memory, into this process: in a thread of its own, which ends when the
 * segment is closed (sc_close waits for it), or by sc_prefault_end, which a process calls before it lets go of segments
 * that it has not closed. */
int sc_prefault(struct sc_segment *s, char *payload);
void sc_prefault_end(void);

/* Coming and going. */
int sc_join(struct sc_segment *s, const char *group, uint32_t group_bytes, int32_t rank, uint32_t world_size,
            uint32_t *pid);
int sc_close(struct sc_segment *s);
/* Nobody may join any more. On success the caller is in the door: it unlinks the segment's name, then calls
 * sc_door_close. On SC_E_BUSY *pid is a live lane's, or of who is in the door. */
int sc_retire(struct sc_segment *s, bool force, uint32_t *pid);
void sc_door_close(struct sc_segment *s);

/* Writing. nbytes and layouts: one for all keys, or where `each` is set one a key. region: where they are to lie, SC_LOST where
 * it does not live. writers: how many lanes of the group fill each object together, 1 to the group's world_size. */
int64_t sc_reserve_write(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                         const uint64_t *nbytes, const uint32_t *layouts, bool each, uint32_t region, bool temporary,
                         uint32_t writers, struct sc_ref *refs);
/* Of refs, those whose status is SC_OK. Others get their own status again. */
int64_t sc_publish(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, uint32_t ranks, int8_t *status);
int64_t sc_abort_refs(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, int8_t *status);
int64_t sc_finish_write(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                        uint32_t ranks, int8_t *status);
int64_t sc_abort_write(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                       int8_t *status);
int64_t sc_put(struct sc_segment *s, const char *key, uint32_t width, char *payload, const char *data,
               uint64_t nbytes, int8_t *status);
int64_t sc_delete(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n, bool force,
                  int8_t *status);
int64_t sc_evict(struct sc_segment *s, uint32_t region, uint64_t nbytes);
int64_t sc_clear(struct sc_segment *s);

/* Reading. */
int64_t sc_lookup(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n);
int64_t sc_get_status(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                      int8_t *status);
int64_t sc_touch_keys(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                      int8_t *status);
int64_t sc_reserve_read(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                        uint32_t ranks, int8_t *status);
/* SC_AGAIN: only the keys whose status is SC_IN_FLIGHT are tried. SC_PREFIX: stops at the first key that is not SC_OK
 * and leaves those behind it SC_IN_FLIGHT. SC_READ_FRESH: takes a fresh share, and leaves reserved ones where they are; for who
 * reads instead of those that were granted, so that it counts as no request.
 * SC_READ_STORE: the same for who copies objects to L2: temporary ones are SC_NOT_FOUND, and nothing counts as read. */
enum sc_read_flags { SC_PREFIX = 1, SC_AGAIN = 2, SC_READ_FRESH = 4, SC_READ_STORE = 8 };
int64_t sc_read(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n, int flags,
                struct sc_ref *refs);
int64_t sc_release(struct sc_segment *s, const struct sc_ref *refs, uint32_t n);
int64_t sc_finish_read(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                       int8_t *status);
int64_t sc_cancel_read(struct sc_segment *s, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n,
                       uint32_t ranks, int8_t *status);

/* Regions of device memory, by number from 1 on. Nothing in here calls a driver. The size of a block in one of so many bytes,
 * which must be a multiple of it. */
uint64_t sc_region_block_size(const struct sc_segment *s, uint64_t nbytes);
/* There may be one: without any, nothing lies in device memory. */
bool sc_has_regions(struct sc_segment *s);
/* The number of a new one, whose owner is this lane. */
int64_t sc_region_add(struct sc_segment *s, const struct sc_region_spec *spec);
/* Its objects are lost, and it goes with the last of them. SC_OK; SC_NOT_OWNER: it is not this lane's. */
int sc_region_give_up(struct sc_segment *s, uint32_t region);
int sc_get_region(struct sc_segment *s, uint32_t region, struct sc_region_info *info);
/* SC_OK, or SC_LOST where it does not live. For who has a share of an object in it, so that it is the same one. */
int sc_region_check(struct sc_segment *s, uint32_t region);
/* Says whether this process has it open: true before it opens it, false after it has closed it. SC_LOST where it does not live
 * any more in this generation: then it must not be opened. */
int sc_region_opened(struct sc_segment *s, uint32_t region, uint32_t generation, bool open);

/* The layout table: the number of a layout (1 and up), and a layout by its number. */
int64_t sc_layout_number(struct sc_segment *s, const char *spec, uint32_t spec_bytes, uint64_t nbytes);
int sc_layout_spec(struct sc_segment *s, uint32_t number, char *spec, uint32_t *spec_bytes);

/* The whole. Of a closed segment sc_get_info and sc_get_lane say nothing: all is 0, and nobody holds the lock. */
/* SC_E_BUSY at once where the lock cannot be had, unless wait is set. */
int sc_reap(struct sc_segment *s, bool wait, struct sc_reaped *r);
int64_t sc_verify(struct sc_segment *s, char *report, uint64_t report_bytes);
void sc_get_info(struct sc_segment *s, struct sc_info *info);
void sc_get_lane(struct sc_segment *s, uint32_t lane, struct sc_lane_info *info);
/* Walks over objects and shares, without a lock. The two lists give how many they filled in, at most `most`. */
void sc_census(struct sc_segment *s, struct sc_census *c);
uint32_t sc_list_objects(struct sc_segment *s, struct sc_object_info *objects, uint32_t most);
uint32_t sc_list_shares(struct sc_segment *s, uint32_t lane, struct sc_share_info *shares, uint32_t most);
uint32_t sc_own_lane(const struct sc_segment *s);
/* SC_E_DAMAGED where the file was found cut under its mapping, so that what the last calls told is worth nothing. */
int sc_intact(const struct sc_segment *s);

/* The statistics of this process's lane: a note adds value to a counter or a gauge, or one time of value microseconds to
 * a histogram, by its number. After sc_close nothing happens. */
enum sc_statistic { SC_COUNTER = 0, SC_GAUGE = 1, SC_HISTOGRAM = 2 };
struct sc_note { uint32_t kind, number; int64_t value; };
void sc_note(struct sc_segment *s, const struct sc_note *notes, uint32_t n);
/* The name of statistic i of a kind; NULL beyond the last. */
const char *sc_statistic_name(enum sc_statistic kind, uint32_t i);
