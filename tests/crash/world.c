#define _GNU_SOURCE
#include "world.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

char keys[KEYS][KEY_BYTES];

enum { SEED = 7 }; /* of the key hash: fixed, so that a scenario is the same in every run */

void die(const char *what)
{
    perror(what);
    exit(3);
}

static void name_keys(const struct sc_geometry *g)
{
    /* The last keys begin their probes at neighbouring entries of the index: KEY_ANCHOR + i at i before the last. The
     * others keep away from there. */
    uint64_t mask = (UINT64_C(1) << g->index_bits) - 1, last = mask / 2;
    for (uint32_t k = 0; k < KEYS; k++)
        for (uint32_t salt = 0;; salt++) {
            struct sc_key key;
            char text[KEY_BYTES + 1];
            snprintf(text, sizeof text, "key-%02u-%09u", k % 100, salt % 1000000000);
            sc_key_load(&key, text, KEY_BYTES, SEED);
            memcpy(keys[k], text, KEY_BYTES);
            uint64_t at = key.hash & mask;
            if (k < KEY_ANCHOR ? at > last : at == last - (k - KEY_ANCHOR))
                break;
        }
}

void parts_of(const struct sc_geometry *g, struct part out[PARTS])
{
    out[0] = (struct part){0, g->layout_table + 4096};
    out[1] = (struct part){g->region_table, g->regions * sizeof(struct sc_region)};
    out[2] = (struct part){g->slot_table, g->metadata - g->slot_table};
    out[3] = (struct part){g->payload, g->capacity};
}

uint64_t snapshot_bytes(const struct sc_geometry *g)
{
    struct part parts[PARTS];
    uint64_t bytes = 0;
    parts_of(g, parts);
    for (int i = 0; i < PARTS; i++)
        bytes += parts[i].bytes;
    return bytes;
}

/* What a process copies out of the header when it opens the segment: that of this world's present arena. */
static void seats_follow_header(struct world *w)
{
    const struct sc_header *h = (const struct sc_header *)w->map;
    for (int i = 0; i < SEATS; i++) {
        w->seats[i].epoch_us = h->epoch_us;
        w->seats[i].seed = h->seed;
        w->seats[i].checksum = h->checksum;
    }
}

void world_load(struct world *w, const uint8_t *bytes)
{
    struct part parts[PARTS];
    parts_of(&w->g, parts);
    for (int i = 0; i < PARTS; bytes += parts[i].bytes, i++)
        memcpy(w->map + parts[i].at, bytes, parts[i].bytes);
    seats_follow_header(w);
}

void world_save(const struct world *w, uint8_t *bytes)
{
    struct part parts[PARTS];
    parts_of(&w->g, parts);
    for (int i = 0; i < PARTS; bytes += parts[i].bytes, i++)
        memcpy(bytes, w->map + parts[i].at, parts[i].bytes);
}

struct sc_config world_config(void)
{
    return (struct sc_config){.capacity = BLOCKS * BLOCK_BYTES, .block_size = BLOCK_BYTES, .slots = SLOTS, .lanes = LANES,
                              .regions = REGIONS, .read_lease_us = HOUR_US, .write_lease_us = HOUR_US, .lock_timeout_us = 0,
                              .eviction_window_us = HOUR_US};
}

void world_format(struct world *w)
{
    struct sc_config c = world_config();
    for (int i = 0; i < SEATS; i++)
        seat_empty(w, (enum seat)i);
    if (sc_format(w->fd, &c) < 0)
        die("sc_format");
    memset(w->map + 4096, 0, w->g.segment_bytes - 4096);
    struct sc_header *h = (struct sc_header *)w->map;
    h->seed = SEED;
    h->checksum = sc_checksum(h);
    seats_follow_header(w);
}

static void seat_open(struct world *w, enum seat seat)
{
    struct sc_segment *s = &w->seats[seat];
    memset(s, 0, sizeof *s);
    if (sc_segment_open(w->fd, true, s) < 0)
        die("sc_segment_open");
}

void world_make(struct world *w)
{
    struct sc_config c = world_config();
    memset(w, 0, sizeof *w);
    sc_plan(c.capacity, c.block_size, c.slots, c.lanes, c.regions, &w->g);
    name_keys(&w->g);
    w->fd = memfd_create("crash", MFD_CLOEXEC);
    if (w->fd < 0 || sc_format(w->fd, &c) < 0)
        die("memfd");
    w->map = mmap(NULL, w->g.segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, w->fd, 0);
    if (w->map == MAP_FAILED)
        die("mmap");
    for (int i = 0; i < SEATS; i++)
        seat_open(w, (enum seat)i);
    world_format(w);
}

static void lock_bytes(const struct sc_segment *s, short type, uint64_t at, uint64_t n)
{
    struct flock f = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)at, .l_len = (off_t)n};
    if (fcntl(s->lock_fd, F_OFD_SETLK, &f) < 0)
        die("F_OFD_SETLK");
}

struct sc_segment *seat_empty(struct world *w, enum seat seat)
{
    struct sc_segment *s = &w->seats[seat];
    if (s->closed) {
        sc_segment_shut(s);
        seat_open(w, seat);
    }
    lock_bytes(s, F_UNLCK, 0, 0);
    w->who[seat] = (struct identity){0};
    s->lane = SC_NO_SLOT;
    s->incarnation = s->world_size = s->group = 0;
    s->damaged = s->suspect = s->lane_limit = 0;
    s->stolen = false;
    sc_victims_clear(s);
    s->read_lease_us = s->write_lease_us = HOUR_US;
    s->lock_timeout_us = 0; /* who has to wait for anything fails at once */
    return s;
}

void world_leave(struct world *w, enum seat seat)
{
    struct identity was = w->who[seat];
    seat_empty(w, seat);
    was.alive = false;
    w->who[seat] = was;
}

void seat_adopt(struct sc_segment *s, const struct identity *who)
{
    s->lane = who->lane;
    s->incarnation = who->incarnation;
    s->world_size = who->world_size;
    s->group = who->group;
    memcpy(s->rank_lanes, who->rank_lanes, sizeof who->rank_lanes);
    lock_bytes(s, F_WRLCK, s->g.lane_table + who->lane * sizeof(struct sc_lane), 1);
}

void seat_identify(const struct sc_segment *s, struct identity *who)
{
    *who = (struct identity){true, true, s->lane, s->incarnation, s->world_size, s->group, {0}};
    memcpy(who->rank_lanes, s->rank_lanes, sizeof who->rank_lanes);
}

int seat_join(struct world *w, enum seat seat, const char *group, int rank, uint32_t world_size)
{
    struct sc_segment *s = seat_empty(w, seat);
    uint32_t pid;
    int rc = sc_join(s, group, (uint32_t)strlen(group), rank, world_size, &pid);
    if (rc == 0)
        seat_identify(s, &w->who[seat]);
    else
        seat_empty(w, seat);
    return rc;
}

void world_restore(struct world *w, const struct snapshot *from, enum seat but)
{
    for (int i = 0; i < SEATS; i++)
        seat_empty(w, (enum seat)i);
    world_load(w, from->bytes);
    for (int i = 0; i < SEATS; i++) {
        w->who[i] = from->who[i];
        if (from->who[i].alive && i != (int)but)
            seat_adopt(&w->seats[i], &from->who[i]);
    }
}

void world_snapshot(const struct world *w, struct snapshot *to)
{
    world_save(w, to->bytes);
    memcpy(to->who, w->who, sizeof to->who);
}

struct snapshot *snapshot_new(const struct sc_geometry *g)
{
    struct snapshot *n = calloc(1, sizeof *n);
    if (!n || !(n->bytes = malloc(snapshot_bytes(g))))
        die("malloc");
    return n;
}

void snapshot_free(struct snapshot *snapshot)
{
    free(snapshot->bytes);
    free(snapshot);
}

struct content { uint32_t key, version; uint64_t nbytes; };

static uint64_t next_word(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

void content_fill(uint8_t *to, uint32_t key, uint32_t version, uint64_t nbytes)
{
    struct content c = {key, version, nbytes};
    uint64_t x = nbytes << 32 ^ (uint64_t)version << 8 ^ (key + 1);
    memcpy(to, &c, sizeof c);
    for (uint64_t at = sizeof c; at + 8 <= nbytes; at += 8) {
        uint64_t word = next_word(&x);
        memcpy(to + at, &word, 8);
    }
}

int64_t content_version(const uint8_t *from, uint32_t key, uint64_t nbytes)
{
    struct content c;
    memcpy(&c, from, sizeof c);
    if (c.key != key || c.nbytes != nbytes)
        return -1;
    uint64_t x = nbytes << 32 ^ (uint64_t)c.version << 8 ^ (key + 1);
    for (uint64_t at = sizeof c; at + 8 <= nbytes; at += 8) {
        uint64_t word = next_word(&x);
        if (memcmp(from + at, &word, 8) != 0)
            return -1;
    }
    return c.version;
}

int64_t device_version(uint64_t block, uint64_t nbytes, uint32_t generation)
{
    return (int64_t)(sc_mix(block << 32 | generation, UINT64_C(0x9e3779b97f4a7c15) ^ nbytes) >> 1);
}

int64_t version_at(const struct world *w, uint32_t key, const struct sc_ref *ref)
{
    if (ref->region)
        return device_version(ref->region * BLOCKS + ref->offset / BLOCK_BYTES, ref->nbytes, ref->generation);
    return content_version(w->map + w->g.payload + ref->offset, key, ref->nbytes);
}

int64_t do_reserve_in(struct sc_segment *s, uint32_t region, const char *key, uint32_t n, uint64_t nbytes, bool temporary,
                      uint32_t writers, struct sc_ref *refs)
{
    uint32_t plain = 0;
    return sc_reserve_write(s, key, KEY_BYTES, NULL, n, &nbytes, &plain, false, region, temporary, writers, refs);
}

int64_t do_reserve(struct sc_segment *s, const char *key, uint32_t n, uint64_t nbytes, bool temporary, uint32_t writers,
                   struct sc_ref *refs)
{
    return do_reserve_in(s, 0, key, n, nbytes, temporary, writers, refs);
}

int64_t do_add_region(struct sc_segment *s)
{
    struct sc_region_spec spec = {.nbytes = REGION_BLOCKS * BLOCK_BYTES, .device = 3};
    memset(spec.handle, 0x48, sizeof spec.handle);
    memset(spec.uuid, 0x55, sizeof spec.uuid);
    return sc_region_add(s, &spec);
}

struct sc_ref do_write_in(struct sc_segment *s, uint32_t region, uint32_t key, uint64_t nbytes)
{
    struct sc_ref ref = {0};
    do_reserve_in(s, region, keys[key], 1, nbytes, false, 1, &ref);
    return ref;
}

struct sc_ref do_write(struct world *w, struct sc_segment *s, uint32_t key, uint64_t nbytes, bool temporary)
{
    struct sc_ref ref = {0};
    if (do_reserve(s, keys[key], 1, nbytes, temporary, 1, &ref) == 1)
        content_fill(w->map + w->g.payload + ref.offset, key, 1, nbytes);
    return ref;
}

struct sc_ref do_write_together(struct world *w, struct sc_segment *s, uint32_t key, uint32_t writers)
{
    struct sc_ref ref = {0};
    if (do_reserve(s, keys[key], 1, BLOCK_BYTES, false, writers, &ref) == 1)
        content_fill(w->map + w->g.payload + ref.offset, key, 1, BLOCK_BYTES);
    return ref;
}

int do_publish(struct sc_segment *s, const struct sc_ref *ref, uint32_t ranks)
{
    int8_t status = SC_LOST;
    int64_t rc = sc_publish(s, ref, 1, ranks, &status);
    return rc < 0 ? (int)rc : status;
}

int do_put(struct world *w, struct sc_segment *s, uint32_t key, uint64_t nbytes, uint32_t version)
{
    static uint8_t data[BLOCKS * BLOCK_BYTES];
    int8_t status = SC_LOST;
    content_fill(data, key, version, nbytes);
    int64_t rc = sc_put(s, keys[key], KEY_BYTES, (char *)w->map + w->g.payload, (const char *)data, nbytes, &status);
    return rc < 0 ? (int)rc : status;
}

int do_read(struct sc_segment *s, uint32_t key, int flags, struct sc_ref *ref)
{
    *ref = (struct sc_ref){0};
    int64_t rc = sc_read(s, keys[key], KEY_BYTES, NULL, 1, flags, ref);
    return rc < 0 ? (int)rc : ref->status;
}

int do_grant(struct sc_segment *s, uint32_t key, uint32_t ranks)
{
    int8_t status = SC_LOST;
    int64_t rc = sc_reserve_read(s, keys[key], KEY_BYTES, NULL, 1, ranks, &status);
    return rc < 0 ? (int)rc : status;
}
