/* The operations, each as S does it, and what S did before. */
#include "region_ops.h"

enum { NEW_KEY = 16, OLD_LEASE_US = 0 };

int ready_key(const struct world *w, int index, bool free)
{
    struct facts f;
    facts_read(w, &f);
    for (int k = 0; k < KEYS; k++) {
        int slot = f.slot_of[k];
        if (!readable(&f, k) || sc_state_of(f.slots[slot].state) != SC_READY)
            continue;
        bool shared = false;
        for (uint32_t lane = 0; lane < LANES; lane++)
            shared = shared || f.words[lane][slot];
        if (!(free && shared) && index-- == 0)
            return k;
    }
    return -1;
}

/* Writing. */

static void reserve(struct call *c, uint32_t n, uint64_t nbytes, bool temporary)
{
    c->out->rc = do_reserve(c->s, keys[NEW_KEY], n, nbytes, temporary, 1, c->out->refs);
    c->out->refs_n = n;
}

static void run_reserve(struct call *c) { reserve(c, 1, BLOCK_BYTES, false); }
static void run_reserve_run(struct call *c) { reserve(c, 1, 3 * BLOCK_BYTES, false); }
static void run_reserve_all(struct call *c) { reserve(c, 1, BLOCKS * BLOCK_BYTES, false); }
static void run_reserve_batch(struct call *c) { reserve(c, 3, BLOCK_BYTES + 8, false); }
static void run_reserve_temporary(struct call *c) { reserve(c, 1, BLOCK_BYTES, true); }

static void reserve_key(struct call *c, const char *key)
{
    c->out->rc = do_reserve(c->s, key, 1, BLOCK_BYTES, false, 1, c->out->refs);
    c->out->refs_n = 1;
}

static int written_by(const struct world *w, enum seat seat)
{
    struct facts f;
    facts_read(w, &f);
    for (int k = 0; k < KEYS; k++)
        if (f.slot_of[k] >= 0 && w->who[seat].attached && fills(&f, (uint32_t)f.slot_of[k], w->who[seat].lane))
            return k;
    return -1;
}

static bool a_writes(struct world *w, struct scene *scene)
{
    (void)scene;
    return written_by(w, A) >= 0 || do_write(w, &w->seats[A], 19, BLOCK_BYTES, false).nbytes > 0;
}

static void run_reserve_stuck(struct call *c)
{
    c->s->write_lease_us = OLD_LEASE_US;
    reserve_key(c, c->scene->written);
}

static bool d_wrote(struct world *w, struct scene *scene)
{
    (void)scene;
    return w->who[D].attached && !w->who[D].alive && written_by(w, D) >= 0;
}

static void run_reserve_dead(struct call *c) { reserve_key(c, c->scene->abandoned); }

static bool s_writes(struct world *w, struct scene *scene)
{
    scene->refs[0] = do_write(w, &w->seats[S], NEW_KEY, BLOCK_BYTES - 96, false);
    scene->refs_n = 1;
    return scene->refs[0].status == SC_OK && scene->refs[0].nbytes > 0;
}

static bool s_lost_a_write(struct world *w, struct scene *scene)
{
    if (!s_writes(w, scene))
        return false;
    w->seats[B].write_lease_us = OLD_LEASE_US;
    return do_put(w, &w->seats[B], NEW_KEY, BLOCK_BYTES, 2) == SC_OK;
}

void run_publish(struct call *c)
{
    c->out->rc = sc_publish(c->s, c->scene->refs, c->scene->refs_n, 0, c->out->status);
}

void run_publish_grants(struct call *c)
{
    c->out->rc = sc_publish(c->s, c->scene->refs, c->scene->refs_n, RANKS, c->out->status);
}

static void run_finish(struct call *c)
{
    c->out->rc = sc_finish_write(c->s, keys[NEW_KEY], KEY_BYTES, NULL, 1, 0, c->out->status);
}

static void run_finish_grants(struct call *c)
{
    c->out->rc = sc_finish_write(c->s, keys[NEW_KEY], KEY_BYTES, NULL, 1, RANKS, c->out->status);
}

void run_abort_refs(struct call *c)
{
    c->out->rc = sc_abort_refs(c->s, c->scene->refs, c->scene->refs_n, c->out->status);
}

static void run_abort(struct call *c)
{
    c->out->rc = sc_abort_write(c->s, keys[NEW_KEY], KEY_BYTES, NULL, 1, c->out->status);
}

/* Writes by several lanes: 17 and 18 are the keys of the states that have some. */

enum { BEGUN_KEY = 17, DONE_KEY = 18 };

static void together_as(struct call *c, uint32_t key, uint64_t nbytes)
{
    c->out->rc = do_reserve(c->s, keys[key], 1, nbytes, false, 2, c->out->refs);
    c->out->refs_n = 1;
}

static void run_together(struct call *c) { together_as(c, NEW_KEY, BLOCK_BYTES); }
static void run_together_join(struct call *c) { together_as(c, BEGUN_KEY, BLOCK_BYTES); }
static void run_together_unlike(struct call *c) { together_as(c, BEGUN_KEY, 2 * BLOCK_BYTES); }

static bool s_joins(struct world *w, struct scene *scene, uint32_t key)
{
    scene->refs[0] = do_write_together(w, &w->seats[S], key, 2);
    scene->refs_n = 1;
    return scene->refs[0].status == SC_OK && scene->refs[0].nbytes > 0;
}

/* S and A have a part each: neither is done, or A's is. */
static bool s_has_the_first_part(struct world *w, struct scene *scene) { return s_joins(w, scene, BEGUN_KEY); }
static bool s_has_the_last_part(struct world *w, struct scene *scene) { return s_joins(w, scene, DONE_KEY); }

static bool both(struct world *w, struct scene *scene)
{
    scene->refs_n = 1;
    scene->refs[0] = do_write_together(w, &w->seats[S], NEW_KEY, 2);
    return scene->refs[0].status == SC_OK && scene->refs[0].nbytes && do_write_together(w, &w->seats[A], NEW_KEY, 2).nbytes;
}

/* A gave its part up, so that S fills what nobody will publish. */
static bool s_has_a_lost_part(struct world *w, struct scene *scene)
{
    int8_t status = SC_LOST;
    if (!both(w, scene))
        return false;
    sc_abort_write(&w->seats[A], keys[NEW_KEY], KEY_BYTES, NULL, 1, &status);
    return status == SC_OK;
}

static void run_put(struct call *c) { c->out->rc = do_put(c->w, c->s, NEW_KEY, 512, 1); }

/* Reading. */

static void run_reserve_read(struct call *c)
{
    c->out->rc = sc_reserve_read(c->s, c->scene->readable, KEY_BYTES, NULL, 1, RANKS, c->out->status);
}

static void run_reserve_read_batch(struct call *c)
{
    c->out->rc = sc_reserve_read(c->s, keys[0], KEY_BYTES, NULL, 4, 2, c->out->status);
}

static bool reserved_for_s(struct world *w, struct scene *scene)
{
    int k = ready_key(w, 0, false);
    (void)scene;
    return k >= 0 && do_grant(&w->seats[B], (uint32_t)k, RANKS) == SC_OK;
}

static void read_keys(struct call *c, const char *from, uint32_t n, int flags)
{
    c->out->rc = sc_read(c->s, from, KEY_BYTES, NULL, n, flags, c->out->refs);
    c->out->refs_n = n;
    c->out->reads = true;
}

static void run_read(struct call *c) { read_keys(c, c->scene->readable, 1, 0); }
static void run_read_fresh(struct call *c) { read_keys(c, c->scene->readable, 1, SC_READ_FRESH); }
static void run_read_batch(struct call *c) { read_keys(c, keys[0], 4, SC_PREFIX); }

static bool s_reads(struct world *w, struct scene *scene)
{
    int first = ready_key(w, 0, false), second = ready_key(w, 1, false);
    if (first < 0 || do_read(&w->seats[S], (uint32_t)first, SC_READ_FRESH, &scene->refs[0]) != SC_OK)
        return false;
    scene->refs_n = 1;
    if (second >= 0 && do_read(&w->seats[S], (uint32_t)second, SC_READ_FRESH, &scene->refs[1]) == SC_OK)
        scene->refs_n = 2;
    return true;
}

void run_release(struct call *c)
{
    c->out->rc = sc_release(c->s, c->scene->refs, c->scene->refs_n);
    c->out->releases = true;
}

static void run_finish_read(struct call *c)
{
    c->out->rc = sc_finish_read(c->s, c->scene->readable, KEY_BYTES, NULL, 1, c->out->status);
}

static void run_cancel_read(struct call *c)
{
    c->out->rc = sc_cancel_read(c->s, c->scene->readable, KEY_BYTES, NULL, 1, RANKS, c->out->status);
}

/* A temporary object of which only S has a share: held, or reserved. */
static bool s_has_a_temporary(struct world *w, struct scene *scene)
{
    struct sc_ref ref = do_write(w, &w->seats[B], NEW_KEY, BLOCK_BYTES, true);
    (void)scene;
    return ref.status == SC_OK && ref.nbytes && do_publish(&w->seats[B], &ref, 1) == SC_OK;
}

static bool s_reads_a_temporary(struct world *w, struct scene *scene)
{
    scene->refs_n = 1;
    return s_has_a_temporary(w, scene) && do_read(&w->seats[S], NEW_KEY, 0, &scene->refs[0]) == SC_OK;
}

static void run_finish_temporary(struct call *c)
{
    c->out->rc = sc_finish_read(c->s, keys[NEW_KEY], KEY_BYTES, NULL, 1, c->out->status);
}

static void run_cancel_temporary(struct call *c)
{
    c->out->rc = sc_cancel_read(c->s, keys[NEW_KEY], KEY_BYTES, NULL, 1, RANKS, c->out->status);
}

static void run_touch(struct call *c) { c->out->rc = sc_touch_keys(c->s, keys[0], KEY_BYTES, NULL, 4, c->out->status); }

/* Removing. */

static void run_delete(struct call *c)
{
    c->out->rc = sc_delete(c->s, c->scene->free, KEY_BYTES, NULL, 1, false, c->out->status);
}

static void run_delete_batch(struct call *c)
{
    c->out->rc = sc_delete(c->s, keys[0], KEY_BYTES, NULL, 4, false, c->out->status);
}

static void run_delete_force(struct call *c)
{
    c->out->rc = sc_delete(c->s, keys[0], KEY_BYTES, NULL, 5, true, c->out->status);
}

static void run_delete_last(struct call *c)
{
    c->out->rc = sc_delete(c->s, keys[KEY_ANCHOR], KEY_BYTES, NULL, 1, false, c->out->status);
}

static void run_evict_one(struct call *c) { c->out->rc = sc_evict(c->s, 0, 1); }
static void run_evict_all(struct call *c) { c->out->rc = sc_evict(c->s, 0, BLOCKS * BLOCK_BYTES); }
static void run_clear(struct call *c) { c->out->rc = sc_clear(c->s); }

/* The whole. */

static void run_reap(struct call *c)
{
    struct sc_reaped r = {0};
    c->out->rc = sc_reap(c->s, true, &r);
    c->out->status[0] = (int8_t)(r.lanes + r.lock);
}

static void run_verify(struct call *c)
{
    static char text[2000];
    c->out->rc = sc_verify(c->s, text, sizeof text);
}

static void run_layout(struct call *c) { c->out->rc = sc_layout_number(c->s, "a layout", 8, 4096); }

bool s_has_all(struct world *w, struct scene *scene)
{
    bool reads = s_reads(w, scene), writes = s_writes(w, scene);
    return reads || writes;
}

void run_close(struct call *c) { c->out->rc = sc_close(c->s); }

static bool s_is_private(struct world *w, struct scene *scene)
{
    sc_close(&w->seats[S]);
    scene->member = (struct member){"", 0, 1, 0};
    return seat_join(w, S, "", 0, 1) == 0 && s_has_all(w, scene);
}

static void destroy(struct call *c, bool force)
{
    uint32_t pid;
    c->out->rc = sc_retire(c->s, force, &pid);
    if (c->out->rc == 0)
        sc_door_close(c->s);
}

static void run_destroy(struct call *c) { destroy(c, false); }
static void run_destroy_force(struct call *c) { destroy(c, true); }

/* Coming. S is not there yet. */

static bool becomes(struct world *w, struct scene *scene, const char *group, int rank, uint32_t world_size)
{
    world_leave(w, S);
    scene->member = (struct member){group, rank, world_size, 0};
    return true;
}

static bool leaves_first(struct world *w)
{
    return sc_close(&w->seats[S]) == 0;
}

static bool as_private(struct world *w, struct scene *scene) { return leaves_first(w) && becomes(w, scene, "", 0, 1); }
static bool as_controller(struct world *w, struct scene *scene)
{
    return leaves_first(w) && becomes(w, scene, "g", -1, RANKS);
}
static bool as_first_of_group(struct world *w, struct scene *scene)
{
    return leaves_first(w) && becomes(w, scene, "h", 0, 2);
}
static bool as_its_own_heir(struct world *w, struct scene *scene)
{
    return leaves_first(w) && becomes(w, scene, "g", 0, RANKS);
}
static bool as_successor(struct world *w, struct scene *scene)
{
    return s_has_all(w, scene) && becomes(w, scene, "g", 0, RANKS);
}
static bool as_expected(struct world *w, struct scene *scene)
{
    int k = ready_key(w, 0, false);
    if (k >= 0)
        do_grant(&w->seats[A], (uint32_t)k, RANKS);
    return leaves_first(w) && becomes(w, scene, "g", RANKS - 1, RANKS);
}

/* A group h of two is dead, with shares: one of another world size comes. */
static bool as_other_world(struct world *w, struct scene *scene)
{
    int k = ready_key(w, 0, false);
    struct sc_ref ref;
    if (w->who[N1].alive || !leaves_first(w) || seat_join(w, N1, "h", 0, 2) != 0)
        return false;
    if (k >= 0) {
        do_grant(&w->seats[N1], (uint32_t)k, 2);
        do_read(&w->seats[N1], (uint32_t)k, SC_READ_FRESH, &ref);
    }
    do_write(w, &w->seats[N1], 18, BLOCK_BYTES, false);
    world_leave(w, N1);
    return becomes(w, scene, "h", 0, 1);
}

/* Every lane is taken or kept for a rank; those of a group that is dead are had. */
static bool as_squatter(struct world *w, struct scene *scene)
{
    if (w->who[D].attached || seat_join(w, N1, "h", 0, 3) != 0 || seat_join(w, N2, "", 0, 1) != 0)
        return false;
    world_leave(w, N1);
    return becomes(w, scene, "", 0, 1);
}

/* There is no lane for the last rank of its group. */
static bool as_one_too_many(struct world *w, struct scene *scene)
{
    return !w->who[D].attached && becomes(w, scene, "h", 0, 5);
}

static void run_join(struct call *c)
{
    uint32_t pid;
    const struct member *m = &c->scene->member;
    c->out->rc = sc_join(c->s, m->group, (uint32_t)strlen(m->group), m->rank, m->world_size, &pid);
}

const struct op ops[] = {
    {"reserve", OP_THERE_TOO, NULL, run_reserve},
    {"reserve_run", OP_THERE_TOO, NULL, run_reserve_run},
    {"reserve_all", 0, NULL, run_reserve_all},
    {"reserve_batch", 0, NULL, run_reserve_batch},
    {"reserve_temporary", 0, NULL, run_reserve_temporary},
    {"reserve_stuck", 0, a_writes, run_reserve_stuck},
    {"reserve_dead", 0, d_wrote, run_reserve_dead},
    {"publish", 0, s_writes, run_publish},
    {"publish_grants", OP_GRANTS, s_writes, run_publish_grants},
    {"publish_lost", 0, s_lost_a_write, run_publish},
    {"finish_write", 0, s_writes, run_finish},
    {"finish_write_grants", OP_GRANTS, s_writes, run_finish_grants},
    {"finish_write_lost", 0, s_lost_a_write, run_finish},
    {"abort_refs", 0, s_writes, run_abort_refs},
    {"abort_refs_lost", 0, s_lost_a_write, run_abort_refs},
    {"abort_write", 0, s_writes, run_abort},
    {"abort_write_lost", 0, s_lost_a_write, run_abort},
    {"together", 0, NULL, run_together},
    {"together_join", 0, NULL, run_together_join},
    {"together_unlike", 0, NULL, run_together_unlike},
    {"part", OP_GRANTS, both, run_publish_grants},
    {"part_key", OP_GRANTS, s_has_the_first_part, run_publish_grants},
    {"part_last", OP_GRANTS, s_has_the_last_part, run_publish_grants},
    {"part_lost", 0, s_has_a_lost_part, run_publish},
    {"part_abort", 0, both, run_abort_refs},
    {"part_abort_last", 0, s_has_the_last_part, run_abort_refs},
    {"part_abort_lost", 0, s_has_a_lost_part, run_abort_refs},
    {"part_close", OP_LOCKS, s_has_the_first_part, run_close},
    {"part_close_last", OP_LOCKS, s_has_the_last_part, run_close},
    {"put", OP_FILLS, NULL, run_put},
    {"reserve_read", OP_GRANTS, NULL, run_reserve_read},
    {"reserve_read_batch", OP_GRANTS | OP_THERE_TOO, NULL, run_reserve_read_batch},
    {"claim", 0, reserved_for_s, run_read},
    {"read_fresh", 0, reserved_for_s, run_read_fresh},
    {"read_batch", OP_THERE_TOO, NULL, run_read_batch},
    {"release", OP_THERE_TOO, s_reads, run_release},
    {"finish_read", 0, reserved_for_s, run_finish_read},
    {"cancel_read", 0, reserved_for_s, run_cancel_read},
    {"release_temporary", 0, s_reads_a_temporary, run_release},
    {"finish_temporary", 0, s_has_a_temporary, run_finish_temporary},
    {"cancel_temporary", 0, s_has_a_temporary, run_cancel_temporary},
    {"touch", 0, NULL, run_touch},
    {"delete", 0, NULL, run_delete},
    {"delete_batch", OP_THERE_TOO, NULL, run_delete_batch},
    {"delete_force", 0, NULL, run_delete_force},
    {"delete_last", 0, NULL, run_delete_last},
    {"evict_one", 0, NULL, run_evict_one},
    {"evict_all", OP_THERE_TOO, NULL, run_evict_all},
    {"clear", OP_THERE_TOO, NULL, run_clear},
    {"reap", OP_THERE_TOO, NULL, run_reap},
    {"verify", OP_THERE_TOO, NULL, run_verify},
    {"layout", 0, NULL, run_layout},
    {"close", OP_LOCKS | OP_THERE_TOO, s_has_all, run_close},
    {"close_private", OP_LOCKS, s_is_private, run_close},
    {"destroy", OP_LOCKS, NULL, run_destroy},
    {"destroy_force", OP_LOCKS, NULL, run_destroy_force},
    {"join_private", OP_LOCKS | OP_JOINS | OP_THERE_TOO, as_private, run_join},
    {"join_controller", OP_LOCKS | OP_JOINS, as_controller, run_join},
    {"join_first", OP_LOCKS | OP_JOINS, as_first_of_group, run_join},
    {"join_again", OP_LOCKS | OP_JOINS, as_its_own_heir, run_join},
    {"join_takeover", OP_LOCKS | OP_JOINS | OP_THERE_TOO, as_successor, run_join},
    {"join_expected", OP_LOCKS | OP_JOINS, as_expected, run_join},
    {"join_other_world", OP_LOCKS | OP_JOINS, as_other_world, run_join},
    {"join_squatter", OP_LOCKS | OP_JOINS, as_squatter, run_join},
    {"join_one_too_many", OP_LOCKS | OP_JOINS, as_one_too_many, run_join},
    {"region_add", OP_REGIONS, NULL, run_region_add},
    {"region_give_up", OP_REGIONS, s_owns, run_region_give_up},
    {"region_close", OP_REGIONS | OP_LOCKS, s_owns, run_close},
    {"region_open", OP_REGIONS, one_lives, run_region_open},
    {"region_open_lost", OP_REGIONS, one_is_lost, run_region_open},
    {"region_shut", OP_REGIONS, s_opened, run_region_shut},
    {"region_shut_lost", OP_REGIONS, s_opened_what_is_lost, run_region_shut},
    {"region_reserve", OP_REGIONS, one_lives, run_region_reserve},
    {"region_reserve_run", OP_REGIONS, one_lives, run_region_reserve_run},
    {"region_reserve_lost", OP_REGIONS, one_is_lost, run_region_reserve},
    {"region_publish", OP_REGIONS, s_writes_there, run_publish},
    {"region_publish_grants", OP_REGIONS | OP_GRANTS, s_writes_there, run_publish_grants},
    {"region_publish_lost", OP_REGIONS, s_writes_what_is_lost, run_publish_grants},
    {"region_publish_dead", OP_REGIONS, s_writes_to_the_dead, run_publish_grants},
    {"region_abort", OP_REGIONS, s_writes_there, run_abort_refs},
    {"region_abort_lost", OP_REGIONS, s_writes_what_is_lost, run_abort_refs},
    {"region_read", OP_REGIONS, s_may_read_there, run_region_read_fresh},
    {"region_claim", OP_REGIONS, s_may_read_there, run_region_read},
    {"region_release", OP_REGIONS, s_reads_there, run_release},
    {"region_release_last", OP_REGIONS, s_reads_what_is_lost, run_release},
    {"region_claim_lost", OP_REGIONS, s_may_read_what_is_lost, run_region_read},
    {"region_finish_lost", OP_REGIONS, s_may_read_what_is_lost, run_region_finish_read},
    {"region_cancel_lost", OP_REGIONS, s_may_read_what_is_lost, run_region_cancel_read},
    {"region_evict", OP_REGIONS, one_lives, run_region_evict},
    {"region_overwrite", OP_REGIONS, one_object_is_lost, run_region_overwrite},
    {"region_delete", OP_REGIONS, one_object_is_lost, run_region_delete},
};
const uint32_t ops_n = sizeof ops / sizeof ops[0];

bool scene_make(struct world *w, const struct state *state, const struct op *op, struct scene *scene)
{
    memset(scene, 0, sizeof *scene);
    if (state->regions ? !(op->flags & (OP_REGIONS | OP_THERE_TOO)) : op->flags & OP_REGIONS)
        return false;
    scene->member = (struct member){"g", 0, RANKS, 0};
    for (int i = 0; i < SEATS; i++)
        seat_empty(w, (enum seat)i);
    state->build(w);
    if (op->prepare && !op->prepare(w, scene))
        return false;
    int k[] = {ready_key(w, 0, false), ready_key(w, 0, true), written_by(w, A), written_by(w, D), written_by(w, S)};
    const char **names[] = {&scene->readable, &scene->free, &scene->written, &scene->abandoned, &scene->own};
    for (int i = 0; i < 5; i++)
        *names[i] = keys[k[i] < 0 ? NEW_KEY : k[i]];
    scene->start = snapshot_new(&w->g);
    world_snapshot(w, scene->start);
    return true;
}

void scene_free(struct scene *scene) { snapshot_free(scene->start); }
