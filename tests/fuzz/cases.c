/* cases.c - single damages that once did harm, or would if one check were left out: one a case, always the same. */
#define _GNU_SOURCE
#include "cases.h"

#include <unistd.h>

static void join(struct world *w, int h, const char *group, int32_t rank, uint32_t world_size)
{
    int rc = world_attach(w, h, group, rank, world_size);
    if (rc < 0)
        fail("join gives %d", rc);
}

static uint32_t packed(uint32_t key, char *data)
{
    uint32_t end;
    return keys_pack(&key, 1, data, &end);
}

static void put(struct world *w, int h, uint32_t key)
{
    char data[BYTES], name[SC_MAX_KEY];
    int8_t status = SC_LOST;
    uint32_t version = version_new(w, key, BYTES, 0), width = packed(key, name);
    version_bytes(version, data, BYTES);
    w->versions[version].published = true;
    int64_t rc = sc_put(w->handles[h], name, width, (char *)w->map + w->g.payload, data, BYTES, &status);
    if (rc < 0 || status != SC_OK)
        fail("put of key %u gives %lld, status %d", key, (long long)rc, status);
}

/* What a read gives; what it serves is whole, and that key's. Keeps the share. */
static enum sc_status get(struct world *w, int h, uint32_t key, struct sc_ref *ref)
{
    char name[SC_MAX_KEY];
    uint32_t width = packed(key, name);
    int64_t rc = sc_read(w->handles[h], name, width, NULL, 1, 0, ref);
    if (rc < 0)
        fail("read of key %u gives %lld", key, (long long)rc);
    if (ref->status == SC_OK)
        check_read(w, key, ref);
    return (enum sc_status)ref->status;
}

void expect(struct world *w, int h, uint32_t key, enum sc_status status)
{
    struct sc_ref ref = {0};
    if (get(w, h, key, &ref) != status)
        fail("key %u has status %d, not %d", key, ref.status, (int)status);
    sc_release(w->handles[h], &ref, 1);
}

int64_t try_reserve(struct world *w, int h, uint32_t key, uint32_t region, uint32_t writers, struct sc_ref *ref)
{
    char name[SC_MAX_KEY];
    uint64_t nbytes = BYTES;
    uint32_t width = packed(key, name), plain = 0;
    return sc_reserve_write(w->handles[h], name, width, NULL, 1, &nbytes, &plain, false, region, false, writers, ref);
}

void reserve_in(struct world *w, int h, uint32_t key, struct batch *b, bool fills, uint32_t region, uint32_t writers)
{
    *b = (struct batch){.n = 1, .keys = {key}, .handle = h};
    int64_t rc = try_reserve(w, h, key, region, writers, b->refs);
    if (rc != 1)
        fail("reserve_write of key %u gives %lld, status %d", key, (long long)rc, b->refs[0].status);
    version_reserve(w, h, b, 0, writers);
    if (fills)
        version_fill(w, b, 0);
}

static void reserve_for(struct world *w, int h, uint32_t key, struct batch *b, bool fills, uint32_t writers)
{
    reserve_in(w, h, key, b, fills, 0, writers);
}

void reserve(struct world *w, int h, uint32_t key, struct batch *b, bool fills)
{
    reserve_for(w, h, key, b, fills, 1);
}

void publish(struct world *w, struct batch *b)
{
    int8_t status = SC_LOST;
    sc_publish(w->handles[b->handle], b->refs, 1, 0, &status);
    version_finish(w, b->versions[0], 0, status);
}

static void copy(struct world *w, uint64_t to, uint64_t from, uint64_t bytes) { memcpy(w->map + to, w->map + from, bytes); }

void rebuild(struct world *w, int h)
{
    static char report[1 << 12];
    set(w, HEADER(lock), 0xffff);
    int64_t findings = sc_verify(w->handles[h], report, sizeof report);
    if (findings != 0)
        fail("after a rebuild: %lld findings: %s", (long long)findings, report);
}

static void evict_all(struct world *w, int h)
{
    if (sc_evict(w->handles[h], 0, UINT64_MAX) < 0)
        fail("evict fails");
}

/* The first object to go cannot be described: the search for another victim must go on, and end. */
static void slot_without_bytes(struct world *w)
{
    put(w, 0, A);
    put(w, 0, B);
    set(w, FIELD(0, nbytes), 0);
    evict_all(w, 0);
    expect(w, 0, A, SC_NOT_FOUND);
    expect(w, 0, B, SC_NOT_FOUND);
    rebuild(w, 0);
}

static void run_beyond_the_payload(struct world *w)
{
    put(w, 0, A);
    set32(w, FIELD(0, block), BLOCKS - 1);
    expect(w, 0, A, SC_NOT_FOUND);
    put(w, 0, A);
    rebuild(w, 0);
}

static void longer_than_it_is(struct world *w)
{
    put(w, 0, A);
    put(w, 0, B);
    set(w, FIELD(0, nbytes), 2 * BYTES);
    expect(w, 0, A, SC_NOT_FOUND);
    expect(w, 0, B, SC_OK);
}

static void memory_of_another(struct world *w)
{
    put(w, 0, A);
    put(w, 0, B);
    copy(w, FIELD(0, block), FIELD(1, block), sizeof(sc_half));
    expect(w, 0, A, SC_NOT_FOUND);
    expect(w, 0, B, SC_OK);
    evict_all(w, 0);
    rebuild(w, 0);
}

/* Hash and index agree with the lie. */
static void key_of_another(struct world *w)
{
    put(w, 0, A);
    put(w, 0, B);
    copy(w, FIELD(0, key), FIELD(1, key), SC_MAX_KEY + 8);
    set(w, FIELD(1, state), 0);
    for (uint64_t at = w->g.index; at < w->g.index + (sizeof(sc_word) << w->g.index_bits); at += 8)
        set(w, at, (word_at(w, FIELD(0, hash)) & ~UINT64_C(0xffffff)) | 2);
    expect(w, 0, B, SC_NOT_FOUND);
}

static void record_of_another(struct world *w)
{
    struct sc_ref ref;
    put(w, 0, A);
    put(w, 0, B);
    get(w, 1, A, &ref);
    copy(w, field(w, 1, 0), field(w, 0, 0), sizeof(struct sc_slot)); /* and nobody has shares of that one */
    evict_all(w, 0);
    set32(w, HEADER(block_cursor), 0);
    for (uint32_t key = B; key <= E; key++)
        put(w, 0, key);
    check_read(w, A, &ref);
    rebuild(w, 0);
    expect(w, 0, A, SC_OK);
    expect(w, 0, E, SC_OK);
}

static void half_written_made_ready(struct world *w)
{
    struct batch b;
    put(w, 0, A);
    evict_all(w, 0);
    reserve(w, 0, B, &b, false);
    uint32_t slot = b.refs[0].slot;
    set(w, FIELD(slot, state), sc_with_state(word_at(w, FIELD(slot, state)), SC_READY));
    expect(w, 0, B, SC_NOT_FOUND);
    publish(w, &b);
    expect(w, 0, B, SC_NOT_FOUND);
    rebuild(w, 0);
}

/* Freed long ago, and what the record says is whole: only that it is FREE says otherwise. */
static void freed_made_ready(struct world *w)
{
    put(w, 0, A);
    uint64_t state = word_at(w, FIELD(0, state));
    evict_all(w, 0);
    put(w, 0, B);
    copy(w, FIELD(3, state), FIELD(0, state), sizeof(struct sc_slot));
    set(w, FIELD(0, state), state);
    rebuild(w, 0);
    expect(w, 0, A, SC_NOT_FOUND);
}

/* Whoever was writing must not publish what the next one writes in that slot. */
static void written_made_free(struct world *w)
{
    struct batch old, new;
    reserve(w, 0, A, &old, true);
    uint32_t slot = old.refs[0].slot;
    set(w, FIELD(slot, state), word_at(w, FIELD(slot, state)) & ~UINT64_C(0xffffffff));
    set(w, w->g.slot_map, 0);
    set32(w, HEADER(slot_cursor), 0);
    reserve(w, 0, B, &new, false);
    publish(w, &old);
    expect(w, 0, B, SC_IN_FLIGHT);
}

static void written_made_free_and_rebuilt(struct world *w)
{
    struct batch old, new;
    put(w, 0, A);
    evict_all(w, 0); /* slot 0 is of generation 1 */
    set32(w, HEADER(slot_cursor), 0);
    reserve(w, 0, A, &old, true);
    set(w, FIELD(0, state), 0);
    rebuild(w, 0);
    for (int i = 0; i < 3; i++) {
        reserve(w, 0, B, &new, false);
        publish(w, &old);
        expect(w, 0, B, SC_IN_FLIGHT);
        int8_t status;
        sc_abort_refs(w->handles[0], new.refs, 1, &status);
        set32(w, HEADER(slot_cursor), 0);
    }
}

/* Its writers' parts are of another generation, and so it looks as if nobody were left; but it is no write of the dead. */
static void written_together_made_older(struct world *w)
{
    struct batch old, new;
    char name[SC_MAX_KEY];
    int8_t status;
    join(w, 2, "engine", 1, RANKS);
    reserve_for(w, 1, A, &old, true, RANKS);
    set(w, FIELD(0, state), word_at(w, FIELD(0, state)) | UINT64_C(0xffffffff) << 32);
    rebuild(w, 0);
    set32(w, HEADER(slot_cursor), 0);
    reserve_for(w, 1, B, &new, false, RANKS);
    reserve_for(w, 2, B, &new, false, RANKS);
    sc_finish_write(w->handles[2], name, packed(B, name), NULL, 1, 0, &status);
    publish(w, &old);
    expect(w, 0, B, SC_IN_FLIGHT);
}

/* The state word says for how many ranks shares were asked. */
static void shares_for_ranks_that_are_none(struct world *w)
{
    struct batch parts[2];
    join(w, 2, "engine", 1, RANKS);
    reserve_for(w, 1, A, &parts[0], true, RANKS);
    reserve_for(w, 2, A, &parts[1], true, RANKS);
    set(w, FIELD(0, state), word_at(w, FIELD(0, state)) | SC_ASKED);
    publish(w, &parts[0]);
    publish(w, &parts[1]);
    expect(w, 0, A, SC_OK);
}

static void owner_that_cannot_be(struct world *w)
{
    static struct sc_census census;
    struct batch b;
    reserve_for(w, 1, A, &b, true, RANKS);
    set(w, FIELD(0, state), word_at(w, FIELD(0, state)) | UINT64_C(0xffff0000));
    sc_census(w->handles[0], &census);
    publish(w, &b);
    rebuild(w, 0);
}

static void owner_of_another(struct world *w)
{
    struct batch b;
    struct sc_ref ref;
    char name[SC_MAX_KEY];
    int8_t status;
    put(w, 0, A);
    evict_all(w, 0);
    reserve(w, 0, B, &b, false);
    uint64_t at = FIELD(b.refs[0].slot, state);
    set(w, at, (word_at(w, at) & ~UINT64_C(0xffff0000)) | (uint64_t)w->handles[1]->lane << 16);
    sc_finish_write(w->handles[1], name, packed(B, name), NULL, 1, 0, &status);
    if (status == SC_OK || get(w, 1, B, &ref) == SC_OK)
        fail("one lane publishes what another writes");
}

static void used_slot_counts_as_free(struct world *w)
{
    struct sc_ref ref;
    put(w, 0, A);
    get(w, 1, A, &ref);
    set(w, w->g.slot_map, 0);
    set32(w, HEADER(slot_cursor), 0);
    put(w, 0, B);
    check_read(w, A, &ref);
    expect(w, 0, A, SC_OK);
    expect(w, 0, B, SC_OK);
    rebuild(w, 0);
}

static void used_block_counts_as_free(struct world *w)
{
    struct sc_ref ref;
    put(w, 0, A);
    get(w, 1, A, &ref);
    set(w, w->g.block_map, 0);
    set32(w, HEADER(block_cursor), 0);
    set32(w, HEADER(free_blocks), BLOCKS);
    put(w, 0, B);
    check_read(w, A, &ref);
    expect(w, 0, A, SC_OK);
    expect(w, 0, B, SC_OK);
    rebuild(w, 0);
}

static void nobody_has_lanes(struct world *w)
{
    struct sc_ref ref;
    put(w, 0, A);
    get(w, 1, A, &ref);
    set32(w, HEADER(lane_limit), 0);
    evict_all(w, 1);
    for (uint32_t key = B; key < KEYS; key++)
        put(w, 1, key);
    check_read(w, A, &ref);
    expect(w, 0, A, SC_OK);
}

static void index_without_an_end(struct world *w)
{
    put(w, 0, A);
    for (uint64_t at = w->g.index; at < w->g.index + (sizeof(sc_word) << w->g.index_bits); at += 8)
        if (word_at(w, at) == 0)
            set(w, at, (word_at(w, FIELD(0, hash)) & ~UINT64_C(0xffffff)) | (uint64_t)(SLOTS + 7));
    expect(w, 0, A, SC_OK);
    expect(w, 0, B, SC_NOT_FOUND);
    put(w, 0, B);
    rebuild(w, 0);
    expect(w, 0, B, SC_OK);
}

static void index_beyond_the_slots(struct world *w)
{
    put(w, 0, A);
    for (uint64_t at = w->g.index; at < w->g.index + (sizeof(sc_word) << w->g.index_bits); at += 8)
        set(w, at, (word_at(w, FIELD(0, hash)) & ~UINT64_C(0xffffff)) | 0xffffff);
    expect(w, 0, A, SC_NOT_FOUND);
    rebuild(w, 0);
    expect(w, 0, A, SC_OK);
}

/* Nobody rebuilds it: the next to hold the lock finds that this is a lie. */
static void index_said_to_be_rebuilt(struct world *w)
{
    static char report[1 << 12];
    put(w, 0, A);
    set(w, HEADER(index_seq), 1);
    memset(w->map + w->g.index, 0, sizeof(sc_word) << w->g.index_bits);
    expect(w, 0, A, SC_OK);
    put(w, 0, B);
    if (word_at(w, HEADER(index_seq)) & 1 || sc_verify(w->handles[0], report, sizeof report) != 0)
        fail("nobody rebuilt it: %s", report);
}

static void key_with_dirty_padding(struct world *w)
{
    put(w, 0, E); /* of 1 byte */
    set(w, FIELD(0, key), word_at(w, FIELD(0, key)) | UINT64_C(0x5a) << 56);
    expect(w, 0, E, SC_NOT_FOUND);
    rebuild(w, 0);
}

static void lock_of_a_live_neighbour(struct world *w)
{
    put(w, 0, A);
    struct sc_segment *other = w->handles[1];
    set(w, HEADER(lock), (uint64_t)other->incarnation << 32 | (other->lane + 1));
    expect(w, 0, A, SC_OK);
    if (sc_clear(w->handles[0]) != SC_E_BUSY)
        fail("it was not busy");
    if (sc_clear(w->handles[1]) < 0)
        fail("the one that is said to have it cannot have it");
    rebuild(w, 0);
}

static void lane_with_a_long_name(struct world *w)
{
    static struct sc_lane_info info;
    set32(w, w->g.lane_table + offsetof(struct sc_lane, group_bytes), UINT32_MAX);
    sc_get_lane(w->handles[1], 0, &info);
    if (info.group_bytes > sizeof info.group)
        fail("a group of %u bytes", info.group_bytes);
    put(w, 0, A);
    join(w, 2, "engine", -1, RANKS);
}

static void lanes_of_long_names(struct world *w)
{
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint64_t at = w->g.lane_table + lane * sizeof(struct sc_lane);
        set32(w, at + offsetof(struct sc_lane, role), SC_ROLE_RANK);
        set32(w, at + offsetof(struct sc_lane, group_bytes), UINT32_MAX);
    }
    int rc = world_attach(w, 2, "other", 0, 1);
    if (rc < 0 && rc != SC_E_NO_LANE)
        fail("join gives %d", rc);
}

static void layouts_without_end(struct world *w)
{
    char spec[SC_MAX_SPEC] = "x";
    uint32_t bytes;
    if (sc_layout_number(w->handles[0], spec, 1, 1) != 1)
        fail("no layout");
    set32(w, HEADER(layouts), UINT32_MAX);
    set32(w, w->g.layout_table, UINT32_MAX);
    if (sc_layout_spec(w->handles[0], 1, spec, &bytes) != SC_E_DAMAGED)
        fail("a spec of %u bytes", bytes);
    if (sc_layout_spec(w->handles[0], SC_MAX_LAYOUTS + 1, spec, &bytes) != SC_E_DAMAGED)
        fail("a layout beyond the table");
    spec[0] = 'y';
    if (sc_layout_number(w->handles[0], spec, 1, 1) != SC_E_LAYOUTS)
        fail("the table is not full");
}

/* With a right checksum: what the header asks for is not believed, either. */
static void attach_to_header(struct world *w, uint64_t offset, uint64_t value, uint64_t bytes)
{
    struct sc_header *h = (struct sc_header *)w->map;
    memcpy(w->map + offset, &value, bytes);
    h->checksum = sc_checksum(h);
    int rc = world_attach(w, 3, "", 0, 1);
    if (rc != SC_E_DAMAGED)
        fail("attach gives %d", rc);
}

static void timeout_of_ages(struct world *w) { attach_to_header(w, HEADER(lock_timeout_us), UINT64_MAX / 2, 8); }
/* Whatever length the file has: payload begins at a multiple of SC_PAYLOAD_ALIGN. */
static void attach_to_any_size(struct world *w, uint32_t slots, uint32_t lanes, uint64_t offset, uint64_t value)
{
    struct sc_geometry g;
    if (sc_plan(w->g.capacity, w->g.block_size, slots, lanes, w->g.regions, &g) < 0)
        fail("no geometry");
    for (uint64_t i = 0; i < 24; i++) {
        if (ftruncate(w->fd, (off_t)(g.segment_bytes + i * SC_PAYLOAD_ALIGN)) < 0)
            fail("no room for a file");
        attach_to_header(w, offset, value, 4);
    }
}

static void too_many_slots(struct world *w)
{
    attach_to_any_size(w, SC_MAX_SLOTS, LANES, HEADER(slots), SC_MAX_SLOTS + 1);
}
static void too_many_lanes(struct world *w) { attach_to_any_size(w, SLOTS, SC_MAX_LANES, HEADER(lanes), SC_MAX_LANES + 1); }
static void too_many_regions(struct world *w)
{
    attach_to_any_size(w, SLOTS, LANES, HEADER(regions), SC_MAX_REGIONS + 1);
}
static void no_block_size(struct world *w) { attach_to_header(w, HEADER(block_size), 0, 8); }
static void long_fingerprint(struct world *w) { attach_to_header(w, HEADER(fingerprint_bytes), UINT32_MAX, 4); }

/* Another block size makes another file of the same length; the objects in it would be other bytes. */
static void blocks_of_another_size(struct world *w)
{
    struct sc_header *h = (struct sc_header *)w->map;
    put(w, 0, A);
    put(w, 0, B);
    h->block_size *= 2;
    h->checksum = sc_checksum(h);
    for (int i = 0; i < HANDLES; i++)
        world_detach(w, i, true);
    join(w, 0, "", 0, 1);
    expect(w, 0, B, SC_NOT_FOUND);
    expect(w, 0, A, SC_NOT_FOUND);
}

/* A text that is too short leaves findings out, whole ones. */
static void more_findings_than_fit(struct world *w)
{
    static char text[1 << 12];
    for (uint32_t slot = 0; slot < w->g.slots; slot++)
        sc_store(sc_share(w->handles[0], w->g.lanes - 1, slot), 1);
    for (uint64_t bytes = 1; bytes <= sizeof text; bytes += 7) {
        int64_t findings = sc_verify(w->handles[0], text, bytes);
        size_t told = strlen(text), lines = 0;
        for (size_t i = 0; i < told; i++)
            lines += text[i] == '\n';
        if (findings != w->g.slots || told >= bytes || (told && text[told - 1] != '\n'))
            fail("verify gives %lld, %zu lines, %zu of %zu bytes", (long long)findings, lines, told, (size_t)bytes);
        if (bytes + 7 > sizeof text && lines != w->g.slots)
            fail("verify tells %zu findings of %u", lines, w->g.slots);
    }
}

#define CASE(name) {#name, name}
static const struct { const char *name; void (*run)(struct world *); } cases[] = {
    CASE(slot_without_bytes), CASE(run_beyond_the_payload), CASE(longer_than_it_is), CASE(memory_of_another),
    CASE(key_of_another), CASE(record_of_another), CASE(half_written_made_ready), CASE(freed_made_ready),
    CASE(written_made_free), CASE(written_made_free_and_rebuilt), CASE(written_together_made_older),
    CASE(owner_of_another), CASE(shares_for_ranks_that_are_none), CASE(owner_that_cannot_be),
    CASE(lanes_of_long_names), CASE(used_slot_counts_as_free), CASE(used_block_counts_as_free),
    CASE(nobody_has_lanes), CASE(index_without_an_end), CASE(index_beyond_the_slots),
    CASE(index_said_to_be_rebuilt), CASE(key_with_dirty_padding), CASE(lock_of_a_live_neighbour),
    CASE(lane_with_a_long_name), CASE(layouts_without_end), CASE(timeout_of_ages), CASE(too_many_slots),
    CASE(too_many_lanes), CASE(no_block_size), CASE(long_fingerprint), CASE(blocks_of_another_size),
    CASE(more_findings_than_fit), CASE(region_larger_than_it_is), CASE(region_of_endless_blocks),
    CASE(object_of_another_region), CASE(object_of_no_region), CASE(region_of_no_kind),
    CASE(region_of_an_owner_that_cannot_be), CASE(region_said_to_live_again), CASE(region_opened_by_all),
    CASE(object_of_an_earlier_region), CASE(region_with_false_counts), CASE(too_many_regions),
};

bool run_case(const char *name)
{
    static struct world w;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (strcmp(cases[i].name, name) != 0)
            continue;
        world_make(&w, 1000000, REGIONS);
        join(&w, 0, "", 0, 1);
        join(&w, 1, "engine", 0, RANKS);
        cases[i].run(&w);
        world_end(&w);
        return true;
    }
    return false;
}

void list_cases(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        puts(cases[i].name);
}
