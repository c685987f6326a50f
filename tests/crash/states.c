/* The arenas that operations begin in. */
#include "ops.h"

static void join(struct world *w, enum seat seat, const char *group, int rank, uint32_t world_size)
{
    int rc = seat_join(w, seat, group, rank, world_size);
    if (rc != 0) {
        fprintf(stderr, "a state cannot be built: seat %d gets %d\n", seat, rc);
        exit(3);
    }
}

static void must(int status, const char *what)
{
    if (status != SC_OK) {
        fprintf(stderr, "a state cannot be built: %s gives %d\n", what, status);
        exit(3);
    }
}

static void put(struct world *w, uint32_t key, uint32_t blocks)
{
    must(do_put(w, &w->seats[B], key, blocks * BLOCK_BYTES - (key % 2 ? 96 : 0), 1), "put");
}

static void erase(struct world *w, uint32_t key)
{
    int8_t status = SC_LOST;
    sc_delete(&w->seats[B], keys[key], KEY_BYTES, NULL, 1, false, &status);
    must(status, "delete");
}

static void hold(struct world *w, enum seat seat, uint32_t key)
{
    struct sc_ref ref;
    must(do_read(&w->seats[seat], key, SC_READ_FRESH, &ref), "read");
}

static void st_empty(struct world *w)
{
    world_format(w);
    join(w, S, "g", 0, RANKS);
    sc_close(&w->seats[S]); /* so that it is the second incarnation in its lane */
    join(w, S, "g", 0, RANKS);
    join(w, A, "g", 1, RANKS);
    join(w, B, "g", -1, RANKS);
}

static void st_room(struct world *w)
{
    st_empty(w);
    for (uint32_t k = 0; k < 4; k++)
        put(w, k, 1 + k % 2);
}

static void st_full_slots(struct world *w)
{
    st_empty(w);
    for (uint32_t k = 0; k < SLOTS; k++)
        put(w, k, 1);
}

static void st_full_blocks(struct world *w)
{
    st_empty(w);
    for (uint32_t k = 0; k < BLOCKS / 2; k++)
        put(w, k, 2);
}

static void st_shares(struct world *w)
{
    st_full_blocks(w);
    hold(w, A, 0);
    hold(w, A, 0);
    hold(w, B, 1);
    must(do_grant(&w->seats[B], 1, RANKS), "grant");
    must(do_grant(&w->seats[B], 2, RANKS), "grant");
    hold(w, S, 2);
    hold(w, S, 3);
}

static void st_all_shares(struct world *w)
{
    st_shares(w);
    hold(w, B, 3);
    must(do_grant(&w->seats[A], 4, 2), "grant");
}

static void st_expired(struct world *w)
{
    st_full_blocks(w);
    w->seats[B].read_lease_us = 0;
    for (uint32_t k = 0; k < BLOCKS / 2; k++)
        must(do_grant(&w->seats[B], k, RANKS), "grant");
    must(do_grant(&w->seats[B], 0, 2), "grant");
    hold(w, A, 3);
}

/* One free block after each of four objects, and the largest object at the end. */
static void st_fragmented(struct world *w)
{
    st_empty(w);
    for (uint32_t k = 0; k < 7; k++)
        put(w, k, 1);
    put(w, 7, 3);
    for (uint32_t k = 1; k < 7; k += 2)
        erase(w, k);
    hold(w, A, 6);
}

/* As many tombstones as a table may have, and one more: each key's entry lies before that of the one before. */
static void pile_tombstones(struct world *w, uint32_t n)
{
    put(w, KEY_ANCHOR, 1);
    for (uint32_t i = 1; i <= n; i++) {
        put(w, KEY_ANCHOR + i, 1);
        erase(w, KEY_ANCHOR + i);
    }
}

static void st_tombstones(struct world *w)
{
    st_room(w);
    pile_tombstones(w, 8);
}

static void st_crowded(struct world *w)
{
    st_room(w);
    pile_tombstones(w, 9);
}

static void st_dead_lane(struct world *w)
{
    st_room(w);
    join(w, D, "", 0, 1);
    hold(w, D, 0);
    hold(w, D, 1);
    must(do_grant(&w->seats[D], 2, 1), "grant");
    hold(w, A, 1);
    do_write(w, &w->seats[D], 11, BLOCK_BYTES, false);
    do_write(w, &w->seats[D], 12, BLOCK_BYTES, false);
    world_leave(w, D);
}

/* Only what the dead one had can make room. */
static void st_dead_pins(struct world *w)
{
    st_full_blocks(w);
    erase(w, 4);
    join(w, D, "", 0, 1);
    for (uint32_t k = 0; k < 4; k++)
        hold(w, D, k);
    do_write(w, &w->seats[D], 11, 2 * BLOCK_BYTES, false);
    hold(w, A, 0);
    world_leave(w, D);
}

static void st_writers(struct world *w)
{
    st_room(w);
    do_write(w, &w->seats[A], 10, BLOCK_BYTES, false);
    do_write(w, &w->seats[B], 13, 2 * BLOCK_BYTES, false);
}

/* A's write lost its key to B, which has published; a second one to B, which still writes. */
static void st_detached(struct world *w)
{
    st_room(w);
    do_write(w, &w->seats[A], 10, BLOCK_BYTES, false);
    do_write(w, &w->seats[A], 14, BLOCK_BYTES, false);
    w->seats[B].write_lease_us = 0;
    put(w, 10, 1);
    do_write(w, &w->seats[B], 14, BLOCK_BYTES, false);
}

/* A writes with others: it has begun (17), it is done (18), and of three writers it and D are done (9). */
static void st_together(struct world *w)
{
    struct sc_ref ref;
    st_room(w);
    do_write_together(w, &w->seats[A], 17, 2);
    ref = do_write_together(w, &w->seats[A], 18, 2);
    must(do_publish(&w->seats[A], &ref, 1) == SC_PART ? SC_OK : SC_LOST, "a part");
}

/* Rank 2 came, and died: in the midst of its part (17), with it done (18); and with all that ever came done (9). */
static void st_dead_writer(struct world *w)
{
    struct sc_ref ref;
    st_room(w);
    join(w, D, "g", RANKS - 1, RANKS);
    do_write_together(w, &w->seats[A], 17, 2);
    do_write_together(w, &w->seats[D], 17, 2);
    ref = do_write_together(w, &w->seats[D], 18, 2);
    must(do_publish(&w->seats[D], &ref, 0) == SC_PART ? SC_OK : SC_LOST, "a part");
    do_write_together(w, &w->seats[A], 18, 2);
    ref = do_write_together(w, &w->seats[D], 9, 2);
    must(do_publish(&w->seats[D], &ref, 0) == SC_PART ? SC_OK : SC_LOST, "a part");
    world_leave(w, D);
}

static void temporary(struct world *w, uint32_t key, uint32_t ranks)
{
    struct sc_ref ref = do_write(w, &w->seats[B], key, BLOCK_BYTES, true);
    must(do_publish(&w->seats[B], &ref, ranks), "publish");
}

static void st_temporary(struct world *w)
{
    st_empty(w);
    put(w, 0, 1);
    temporary(w, 12, 2);
    temporary(w, 13, 0);
    temporary(w, 14, 3);
    join(w, D, "", 0, 1);
    hold(w, D, 13);
    hold(w, S, 14);
    temporary(w, 15, 0);
    hold(w, S, 15);
    world_leave(w, D);
}

static void st_full_lanes(struct world *w)
{
    st_room(w);
    join(w, D, "", 0, 1);
    join(w, N1, "", 0, 1);
    join(w, N2, "", 0, 1);
    join(w, N3, "", 0, 1);
    hold(w, N1, 0);
    hold(w, D, 1);
}

/* D died holding the lock, having changed all that is derived as far as it can be wrong. */
static void st_ruins(struct world *w)
{
    struct sc_reaped r = {0};
    st_shares(w);
    erase(w, 4);
    join(w, D, "", 0, 1);
    do_write(w, &w->seats[D], 11, BLOCK_BYTES, false);
    put(w, 5, 1);
    struct sc_segment *s = &w->seats[D];
    must(sc_begin(s, 0, &r), "lock");
    sc_store(&sc_header(s)->index_seq, sc_load(&sc_header(s)->index_seq) | 1);
    for (uint64_t at = 0; at < UINT64_C(1) << s->g.index_bits; at++)
        sc_store(sc_index(s) + at, 0);
    sc_poke(sc_slot_map(s), ~sc_peek(sc_slot_map(s)));
    sc_poke(sc_block_map(s), ~sc_peek(sc_block_map(s)));
    sc_poke32(&sc_header(s)->free_blocks, 77);
    sc_poke32(&sc_header(s)->free_slots, 0);
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (sc_state_of(sc_load(&sc_slot(s, slot)->state)) == SC_READY) {
            sc_store(&sc_slot(s, slot)->state, sc_with_state(sc_load(&sc_slot(s, slot)->state), SC_EVICTING));
            break;
        }
    pthread_mutex_unlock(&s->mutex); /* the seat's, which another process will have */
    world_leave(w, D);
}

/* Arenas with regions of device memory. Key 0 is the host's; 1, 2, 3 lie in a region: 1 is held, 2 reserved, 3 nobody's. */

static uint32_t add(struct world *w, enum seat seat)
{
    int64_t region = do_add_region(&w->seats[seat]);
    must(region > 0 ? SC_OK : SC_LOST, "a region");
    return (uint32_t)region;
}

static void open_it(struct world *w, enum seat seat, uint32_t region)
{
    struct sc_region_info info;
    must(sc_get_region(&w->seats[seat], region, &info), "a look at a region");
    must(sc_region_opened(&w->seats[seat], region, info.generation, true), "open");
}

static void put_in(struct world *w, uint32_t region, uint32_t key, uint32_t blocks, uint32_t ranks)
{
    struct sc_ref ref = do_write_in(&w->seats[B], region, key, blocks * BLOCK_BYTES);
    must(ref.status, "reserve");
    must(do_publish(&w->seats[B], &ref, ranks), "publish");
}

static void objects_in(struct world *w, uint32_t region, enum seat holder)
{
    put(w, 0, 1);
    put_in(w, region, 1, 1, 0);
    put_in(w, region, 2, 1, RANKS);
    put_in(w, region, 3, 1, 0);
    hold(w, holder, 1);
}

static void write_in(struct world *w, uint32_t region, enum seat writer)
{
    must(do_write_in(&w->seats[writer], region, 8, BLOCK_BYTES).status, "reserve");
}

/* A's, with all that there can be in it. */
static void st_region(struct world *w)
{
    st_empty(w);
    uint32_t region = add(w, A);
    objects_in(w, region, S);
    hold(w, B, 1);
    write_in(w, region, B);
    open_it(w, B, region);
}

/* D's, who is dead and not reaped. */
static void st_region_dead(struct world *w)
{
    st_empty(w);
    join(w, D, "", 0, 1);
    uint32_t region = add(w, D);
    objects_in(w, region, A);
    write_in(w, region, B);
    open_it(w, A, region);
    open_it(w, B, region);
    world_leave(w, D);
}

/* A has given it up: what nobody has a share of is gone. */
static void st_region_lost(struct world *w)
{
    st_empty(w);
    uint32_t region = add(w, A);
    objects_in(w, region, B);
    hold(w, S, 3);
    write_in(w, region, B);
    open_it(w, B, region);
    must(sc_region_give_up(&w->seats[A], region), "give up");
}

/* S's own. */
static void st_region_own(struct world *w)
{
    st_empty(w);
    uint32_t region = add(w, S);
    objects_in(w, region, A);
    write_in(w, region, A);
    open_it(w, A, region);
}

/* Each number is a living one's, and the first has no free block. */
static void st_regions_full(struct world *w)
{
    st_empty(w);
    uint32_t region = add(w, A);
    add(w, B);
    objects_in(w, region, A);
    put_in(w, region, 4, 1, 0);
}

/* Each number is somebody's, but the second one's owner is dead. */
static void st_regions_taken(struct world *w)
{
    st_empty(w);
    add(w, A);
    join(w, D, "", 0, 1);
    uint32_t region = add(w, D);
    put(w, 0, 1);
    put_in(w, region, 3, 2, 0);
    open_it(w, D, 1);
    world_leave(w, D);
}

const struct state states[] = {
    {"empty", st_empty, false},           {"room", st_room, false},           {"full_slots", st_full_slots, false},
    {"full_blocks", st_full_blocks, false}, {"shares", st_shares, false},     {"all_shares", st_all_shares, false},
    {"expired", st_expired, false},       {"fragmented", st_fragmented, false}, {"tombstones", st_tombstones, false},
    {"crowded", st_crowded, false},       {"dead_lane", st_dead_lane, false}, {"dead_pins", st_dead_pins, false},
    {"writers", st_writers, false},       {"detached", st_detached, false},   {"temporary", st_temporary, false},
    {"full_lanes", st_full_lanes, false}, {"ruins", st_ruins, false},
    {"together", st_together, false},     {"dead_writer", st_dead_writer, false},
    {"region", st_region, true},   {"region_dead", st_region_dead, true}, {"region_lost", st_region_lost, true},
    {"region_own", st_region_own, true}, {"regions_full", st_regions_full, true},
    {"regions_taken", st_regions_taken, true},
};
const uint32_t states_n = sizeof states / sizeof states[0];
