#include "region_ops.h"

enum { THERE_KEY = 15, HELD_KEY = 14 }; /* an object of S's, and one that keeps its region */

/* The first region that lives, or that there is and that does not; 0: none. */
static uint32_t find_region(const struct world *w, bool lives)
{
    struct facts f;
    facts_read(w, &f);
    for (uint32_t region = 1; region <= REGIONS; region++)
        if (sc_kind_of(f.regions[region].state) != SC_REGION_NONE && f.regions[region].lives == lives)
            return region;
    return 0;
}

static bool about(struct scene *scene, uint32_t region)
{
    scene->region = region;
    return region != 0;
}

bool one_lives(struct world *w, struct scene *scene) { return about(scene, find_region(w, true)); }
bool one_is_lost(struct world *w, struct scene *scene) { return about(scene, find_region(w, false)); }

bool one_object_is_lost(struct world *w, struct scene *scene)
{
    struct facts f;
    facts_read(w, &f);
    for (int k = KEYS; k-- > 0;)
        if (lost(&f, k)) {
            scene->key = (uint32_t)k;
            return true;
        }
    return false;
}

static enum seat owner_of(const struct world *w, uint32_t region)
{
    struct facts f;
    facts_read(w, &f);
    for (int i = 0; i < SEATS; i++)
        if (w->who[i].alive && f.regions[region].lives && w->who[i].lane == (f.regions[region].state >> 16 & 0xffff))
            return (enum seat)i;
    return SEATS;
}

static bool lose(struct world *w, uint32_t region)
{
    enum seat owner = owner_of(w, region);
    return owner != SEATS && owner != S && sc_region_give_up(&w->seats[owner], region) == SC_OK;
}

static bool write_there(struct world *w, struct scene *scene)
{
    scene->refs_n = 1;
    scene->refs[0] = do_write_in(&w->seats[S], scene->region, THERE_KEY, BLOCK_BYTES);
    return scene->refs[0].status == SC_OK;
}

/* S publishes an object in the region, with shares. */
static bool object_there(struct world *w, struct scene *scene, uint32_t ranks)
{
    scene->key = THERE_KEY;
    return one_lives(w, scene) && write_there(w, scene) && do_publish(&w->seats[S], &scene->refs[0], ranks) == SC_OK;
}

bool s_owns(struct world *w, struct scene *scene)
{
    struct sc_ref ref;
    uint32_t own = 0;
    for (uint32_t region = 1; region <= REGIONS && !own; region++)
        own = owner_of(w, region) == S ? region : 0;
    if (own)
        return about(scene, own);
    int64_t region = do_add_region(&w->seats[S]);
    if (region < 0)
        return false;
    ref = do_write_in(&w->seats[S], (uint32_t)region, HELD_KEY, BLOCK_BYTES);
    return about(scene, (uint32_t)region) && ref.status == SC_OK && do_publish(&w->seats[S], &ref, 0) == SC_OK &&
           do_read(&w->seats[A], HELD_KEY, SC_READ_FRESH, &ref) == SC_OK && s_has_all(w, scene);
}

static uint32_t generation_of(const struct world *w, uint32_t region)
{
    const struct sc_region *r = (const struct sc_region *)(w->map + w->g.region_table) + (region - 1);
    return (uint32_t)(sc_load(&r->state) >> 32);
}

bool s_opened(struct world *w, struct scene *scene)
{
    return one_lives(w, scene) && owner_of(w, scene->region) != S &&
           sc_region_opened(&w->seats[S], scene->region, generation_of(w, scene->region), true) == SC_OK;
}

bool s_opened_what_is_lost(struct world *w, struct scene *scene) { return s_opened(w, scene) && lose(w, scene->region); }
bool s_writes_there(struct world *w, struct scene *scene) { return one_lives(w, scene) && write_there(w, scene); }
bool s_writes_what_is_lost(struct world *w, struct scene *scene) { return s_writes_there(w, scene) && lose(w, scene->region); }

bool s_writes_to_the_dead(struct world *w, struct scene *scene)
{
    if (w->who[D].attached || seat_join(w, D, "", 0, 1) != 0)
        return false;
    int64_t region = do_add_region(&w->seats[D]);
    bool writes = region > 0 && about(scene, (uint32_t)region) && write_there(w, scene);
    world_leave(w, D);
    return writes;
}

bool s_may_read_there(struct world *w, struct scene *scene) { return object_there(w, scene, RANKS); }
bool s_may_read_what_is_lost(struct world *w, struct scene *scene)
{
    return object_there(w, scene, 1) && lose(w, scene->region);
}

bool s_reads_there(struct world *w, struct scene *scene)
{
    return object_there(w, scene, 0) && do_read(&w->seats[S], THERE_KEY, SC_READ_FRESH, &scene->refs[0]) == SC_OK;
}

bool s_reads_what_is_lost(struct world *w, struct scene *scene) { return s_reads_there(w, scene) && lose(w, scene->region); }

void run_region_add(struct call *c) { c->out->rc = do_add_region(c->s); }
void run_region_give_up(struct call *c) { c->out->rc = sc_region_give_up(c->s, c->scene->region); }

static void say_open(struct call *c, bool open)
{
    c->out->rc = sc_region_opened(c->s, c->scene->region, generation_of(c->w, c->scene->region), open);
}

void run_region_open(struct call *c) { say_open(c, true); }
void run_region_shut(struct call *c) { say_open(c, false); }

static void reserve_there(struct call *c, uint32_t blocks)
{
    c->out->refs_n = 1;
    c->out->rc = do_reserve_in(c->s, c->scene->region, keys[THERE_KEY], 1, blocks * BLOCK_BYTES, false, 1, c->out->refs);
}

void run_region_reserve(struct call *c) { reserve_there(c, 1); }
void run_region_reserve_run(struct call *c) { reserve_there(c, 2); }

static void read_it(struct call *c, int flags)
{
    c->out->rc = sc_read(c->s, keys[c->scene->key], KEY_BYTES, NULL, 1, flags, c->out->refs);
    c->out->refs_n = 1;
    c->out->reads = true;
}

void run_region_read(struct call *c) { read_it(c, 0); }
void run_region_read_fresh(struct call *c) { read_it(c, SC_READ_FRESH); }

void run_region_finish_read(struct call *c)
{
    c->out->rc = sc_finish_read(c->s, keys[c->scene->key], KEY_BYTES, NULL, 1, c->out->status);
}

void run_region_cancel_read(struct call *c)
{
    c->out->rc = sc_cancel_read(c->s, keys[c->scene->key], KEY_BYTES, NULL, 1, RANKS, c->out->status);
}

void run_region_evict(struct call *c) { c->out->rc = sc_evict(c->s, c->scene->region, 1); }

void run_region_overwrite(struct call *c)
{
    c->out->refs_n = 1;
    c->out->rc = do_reserve(c->s, keys[c->scene->key], 1, BLOCK_BYTES, false, 1, c->out->refs);
}

void run_region_delete(struct call *c)
{
    c->out->rc = sc_delete(c->s, keys[c->scene->key], KEY_BYTES, NULL, 1, false, c->out->status);
}
