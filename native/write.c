/* write.c - everything that changes the table: reserve, publish, abort, delete, evict. Publishing takes no lock. */
#include "arena.h"
#include "guard.h"

#include <errno.h>

enum { SC_HOLD = 1024 }; /* keys a hold of the arena lock */

static uint32_t hold_of(uint32_t from, uint32_t n) { return n - from < SC_HOLD ? n - from : SC_HOLD; }

struct demand { struct sc_terms terms; uint64_t now_us; };

/* Takes back what the dead among the writers of a slot left. */
static bool reap_writers(struct sc_segment *s, uint32_t slot, uint64_t state)
{
    struct sc_reaped r = {0};
    bool any = false;
    for (uint32_t lane = 0; lane < sc_lane_limit(s); lane++)
        any = (sc_has_part(s, slot, state, lane) && sc_reap_if_dead(s, lane, &r)) || any;
    return any;
}

/* An object that is in the way unless it is lost and nobody has a share, or damaged, so that nobody can read it. */
static enum sc_status served(struct sc_segment *s, const struct sc_key *k, uint32_t slot, uint64_t state)
{
    struct sc_object o;
    struct sc_reaped r = {0};
    if (sc_slot_describe(s, slot, state, k->hash, &o)) {
        if (sc_region_lives(s, o.region))
            return SC_EXISTS;
        return sc_remove(s, slot, false) ? SC_OK : SC_LOST;
    }
    sc_recover(s, &r);
    return sc_index_find(s, k, &state) == SC_NO_SLOT ? SC_OK : SC_EXISTS;
}

/* What stands in the way of writing this key; SC_OK: nothing, nothing any more, or *stuck, a writer beyond its lease. */
static enum sc_status clear_the_way(struct sc_segment *s, const struct sc_key *k, uint64_t now_us, uint32_t *stuck)
{
    uint64_t state;
    uint32_t slot = sc_index_find(s, k, &state);
    *stuck = SC_NO_SLOT;
    if (slot != SC_NO_SLOT && sc_state_of(state) == SC_WRITING && reap_writers(s, slot, state))
        slot = sc_index_find(s, k, &state);
    if (slot == SC_NO_SLOT)
        return SC_OK;
    if (sc_state_of(state) != SC_WRITING)
        return served(s, k, slot, state);
    if (sc_owner_of(state) >= s->g.lanes)
        return SC_IN_FLIGHT; /* damaged; a rebuild frees it */
    if (now_us <= sc_peek(&sc_slot(s, slot)->reserved_us) + s->write_lease_us &&
        !sc_overdue(s, slot, state, SC_NO_SLOT, now_us))
        return SC_IN_FLIGHT;
    *stuck = slot;
    return SC_OK;
}

static bool find_room(struct sc_segment *s, uint32_t region, uint32_t blocks, uint32_t *block, uint32_t *slot)
{
    struct sc_reaped r = {0};
    for (int tries = 0; tries < 2; tries++) {
        *block = sc_make_run(s, region, blocks);
        *slot = *block == SC_NO_SLOT ? SC_NO_SLOT : sc_make_slot(s, region);
        if (*slot == SC_NO_SLOT)
            return false;
        if (sc_state_of(sc_load(&sc_slot(s, *slot)->state)) == SC_FREE && sc_block_unowned(s, *block, blocks))
            return true;
        sc_recover(s, &r); /* the maps lie */
    }
    return false;
}

/* state: what the slot's is about to be. */
static void fill(struct sc_segment *s, uint64_t state, const struct sc_key *k, const struct sc_object *o, uint32_t writers,
                 uint64_t now_us)
{
    struct sc_slot *r = sc_slot(s, o->slot);
    uint32_t about = sc_about(k->bytes, o->layout, writers > 1);
    sc_fence_release(); /* the new generation before the new fields; pairs with the fence in index.c */
    sc_poke32(&r->about, about);
    sc_poke(&r->seal, sc_seal(s, o, about, state, false));
    for (uint32_t i = 0; i < SC_MAX_KEY / 8; i++)
        sc_poke(&r->key[i], i < (k->bytes + 7) / 8 ? k->words[i] : 0);
    sc_poke(&r->hash, k->hash);
    sc_poke32(&r->block, (uint32_t)o->block);
    sc_poke(&r->nbytes, o->nbytes);
    sc_poke(&r->lease_until_us, 0);
    sc_poke(&r->reserved_us, now_us);
    sc_poke32(&r->writers, writers);
    sc_poke32(&r->group, s->group);
}

/* A part in the write of a key that is in flight. */
static enum sc_status join(struct sc_segment *s, const struct sc_key *k, const struct sc_terms *terms, struct sc_ref *ref)
{
    uint64_t state;
    struct sc_object o;
    uint32_t slot = sc_index_find(s, k, &state);
    if (slot == SC_NO_SLOT || sc_state_of(state) != SC_WRITING || !sc_slot_describe(s, slot, state, k->hash, &o))
        return SC_IN_FLIGHT; /* damaged, or published at this moment */
    enum sc_status st = sc_join_write(s, slot, state, terms);
    if (st == SC_OK)
        sc_ref_fill(s, &o, terms->temporary, ref);
    return st;
}

/* A writer that is stuck loses the key, unless it publishes at this moment, or was found gone meanwhile. */
static bool take_key(struct sc_segment *s, const struct sc_key *k, uint32_t stuck)
{
    uint64_t state;
    uint32_t slot = sc_index_find(s, k, &state);
    if (slot == SC_NO_SLOT)
        return true;
    bool taken = slot == stuck && sc_detach(s, slot);
    sc_tally(s, SC_writes_detached, taken);
    return taken;
}

/* Makes a FREE slot and a free run this lane's write. */
static void begin_write(struct sc_segment *s, const struct sc_key *k, const struct demand *d, uint32_t depth,
                        struct sc_object *o)
{
    sc_word *w = &sc_slot(s, o->slot)->state;
    uint64_t state = sc_load(w);
    if (sc_peek(&sc_slot(s, o->slot)->seal)) { /* made FREE by a stray store: its last object has the same generation */
        state = sc_freed_far(state);
        sc_store(w, state);
    }
    state = sc_writing(state, s->lane, d->terms.temporary ? SC_TEMPORARY : 0);
    o->generation = sc_generation(state);
    fill(s, state, k, o, d->terms.writers, d->now_us);
    sc_block_use(s, (uint32_t)o->block, o->blocks, o->slot);
    sc_slot_use(s, o->slot);
    sc_poke(sc_score(s, o->slot), sc_score_first(s, d->now_us, k->hash, depth));
    sc_store(w, state); /* releases the fields */
    if (d->terms.writers > 1)
        sc_first_part(s, o->slot, o->generation);
    sc_index_insert(s, k->hash, o->slot);
}

static enum sc_status reserve(struct sc_segment *s, const struct sc_key *k, const struct demand *d, uint32_t depth,
                              bool *reaped, struct sc_ref *ref)
{
    const struct sc_terms *terms = &d->terms;
    struct sc_extent e = sc_extent_of(s, terms->region);
    uint64_t blocks = sc_blocks_for(&e, terms->nbytes);
    uint32_t block, slot, stuck;
    enum sc_status st = clear_the_way(s, k, d->now_us, &stuck);
    struct sc_reaped r = {0};
    if (st == SC_IN_FLIGHT && terms->writers > 1)
        return join(s, k, terms, ref);
    if (st != SC_OK)
        return st;
    if (!sc_region_lives(s, terms->region))
        return SC_LOST;
    if (blocks > e.blocks)
        return SC_NO_SPACE;
    bool found = find_room(s, terms->region, (uint32_t)blocks, &block, &slot);
    if (!found && !*reaped) {
        *reaped = true; /* once a batch: what dead lanes still hold may be the room that is missing */
        found = sc_reap_dead(s, &r) && find_room(s, terms->region, (uint32_t)blocks, &block, &slot);
    }
    /* Who was reaped for room may have been the region's owner: what lies in it now is lost, and its number soon another's. */
    if (!sc_region_stays(s, terms->region))
        return SC_LOST;
    if (!found)
        return SC_NO_SPACE;
    if (stuck != SC_NO_SLOT && !take_key(s, k, stuck))
        return SC_EXISTS;
    struct sc_object o = {slot, 0, terms->layout, (uint32_t)blocks, block, terms->nbytes, k->hash, terms->region};
    begin_write(s, k, d, depth, &o);
    sc_ref_fill(s, &o, terms->temporary, ref);
    return SC_OK;
}

static int abort_refs(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, int8_t *status);

/* Memory for what was reserved, without the lock. If the kernel has none, or a key is being written on other terms, all of
 * it is given back. */
static int back_all(struct sc_segment *s, const struct sc_ref *refs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (refs[i].status == SC_UNLIKE) {
            abort_refs(s, refs, n, NULL);
            return SC_E_UNLIKE;
        }
        uint64_t block = refs[i].offset / s->g.block_size;
        uint64_t blocks = (refs[i].nbytes + s->g.block_size - 1) / s->g.block_size;
        if (refs[i].status != SC_OK || refs[i].region || sc_back(s, block, blocks) == 0)
            continue;
        int error = errno;
        abort_refs(s, refs, n, NULL);
        errno = error;
        return SC_E_MEMORY;
    }
    return 0;
}

/* Runs f on every key under the arena lock, which is let go and taken again every SC_HOLD keys; f keeps and gives
 * the key's status. Where the lock cannot be had the first time that is the result; later, f gets no key for those
 * that are left, and they are SC_LOCKED. */
typedef enum sc_status (*sc_change)(struct sc_segment *s, const struct sc_key *k, uint32_t at, void *arg);

static int64_t under_lock(struct sc_segment *s, const struct sc_keys *keys, sc_change f, void *arg)
{
    struct sc_key k[SC_CHUNK];
    struct sc_reaped r = {0};
    int64_t ok = 0;
    int rc = 0;
    for (uint32_t from = 0; from < keys->n; from += SC_HOLD) {
        uint32_t end = from + hold_of(from, keys->n);
        if (rc == 0 && (rc = sc_begin(s, s->lock_timeout_us, &r)) == 0)
            sc_refresh_victims(s);
        for (uint32_t at = from; at < end; at++) {
            if (rc == 0 && (at - from) % SC_CHUNK == 0)
                sc_keys_load(s, keys, at, sc_chunk_of(at, end), SC_FETCH_SHARE, k);
            enum sc_status st = f(s, rc < 0 ? NULL : &k[(at - from) % SC_CHUNK], at, arg);
            ok += st == SC_OK;
        }
        if (rc < 0 && from == 0)
            return rc;
        if (rc == 0)
            sc_end(s);
    }
    return ok;
}

struct demands {
    uint64_t now_us; /* one time for all keys of a batch, so that of one chain the later goes first */
    const uint64_t *nbytes;
    const uint32_t *layouts;
    uint32_t region, writers;
    bool each, temporary, reaped;
    struct sc_ref *refs;
};

static enum sc_status visit_reserve(struct sc_segment *s, const struct sc_key *k, uint32_t at, void *arg)
{
    struct demands *all = arg;
    uint32_t i = all->each ? at : 0;
    struct demand d = {{all->nbytes[i], all->layouts[i], all->region, all->writers, all->temporary}, all->now_us};
    enum sc_status st = k ? reserve(s, k, &d, at, &all->reaped, &all->refs[at]) : SC_LOCKED;
    all->refs[at].status = (uint16_t)st;
    sc_tally(s, SC_no_space, st == SC_NO_SPACE);
    return st;
}

static void rebuild_index(struct sc_segment *s)
{
    struct sc_reaped r = {0};
    if (sc_begin(s, s->lock_timeout_us, &r) < 0)
        return; /* the next batch will */
    if (sc_index_crowded(s))
        sc_index_rebuild(s);
    sc_end(s);
}

int64_t sc_reserve_write(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n,
                         const uint64_t *nbytes, const uint32_t *layouts, bool each, uint32_t region, bool temporary,
                         uint32_t writers, struct sc_ref *refs)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    if (!sc_whole(s))
        return sc_leave(s, SC_E_DAMAGED);
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct demands d = {sc_now_us(), nbytes, layouts, region, writers, each, temporary, false, refs};
    int64_t ok = under_lock(s, &keys, visit_reserve, &d);
    if (ok >= 0) {
        sc_tally(s, SC_reservations, (uint64_t)ok);
        if (sc_index_crowded(s))
            rebuild_index(s);
        rc = back_all(s, refs, n);
    }
    return sc_leave(s, rc < 0 ? rc : ok);
}

/* Why a slot that was this lane's cannot be published or aborted as such. */
static enum sc_status not_writing(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t generation)
{
    if (sc_generation(state) != generation || sc_state_of(state) == SC_FREE)
        return SC_NOT_FOUND;
    if (sc_state_of(state) != SC_WRITING)
        return SC_EXISTS;
    return sc_fills(s, slot, state, s->lane) && !(state & SC_DETACHED) ? SC_OK : SC_NOT_OWNER;
}

/* Gives a write back under the lock, detached or not. */
static int abort_one(struct sc_segment *s, uint32_t slot, uint32_t generation)
{
    struct sc_reaped r = {0};
    int rc = sc_begin(s, s->lock_timeout_us, &r);
    if (rc < 0)
        return rc;
    if (sc_generation(sc_load(&sc_slot(s, slot)->state)) == generation)
        sc_abandon(s, slot, s->lane);
    sc_end(s);
    return 0;
}

static bool own_and_detached(const struct sc_segment *s, uint32_t slot, uint64_t state, uint32_t generation)
{
    return sc_generation(state) == generation && sc_state_of(state) == SC_WRITING && state & SC_DETACHED &&
           sc_has_part(s, slot, state, s->lane);
}

/* False: the slot is damaged. */
static bool seal_ready(struct sc_segment *s, uint32_t slot, uint64_t state)
{
    struct sc_slot *r = sc_slot(s, slot);
    struct sc_object o;
    bool sound = sc_slot_describe(s, slot, state, sc_peek(&r->hash), &o);
    uint32_t about = sc_peek32(&r->about);
    uint64_t seal = sc_seal(s, &o, about, state, false), ready = sc_seal(s, &o, about, state, true);
    /* By compare-and-swap: a thread of this lane that aborts meanwhile may let the slot become another's. */
    if (sound && (sc_cas(&r->seal, &seal, ready) || seal == ready))
        return true;
    sc_poke32(&s->suspect, 1);
    return false;
}

/* An object has become READY. Who lost its region meanwhile may have looked for objects before: it must not stay. */
static enum sc_status published(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t region, uint32_t granted)
{
    if (!sc_region_stays(s, region)) {
        sc_ungrant(s, slot, generation, granted);
        sc_drop(s, slot, generation);
        return SC_LOST;
    }
    sc_tally(s, SC_publishes, 1);
    sc_tally(s, SC_published_bytes, sc_peek(&sc_slot(s, slot)->nbytes));
    sc_tally(s, SC_grants, granted);
    return SC_OK;
}

/* WRITING -> READY, after ranks reserved shares. No lock: nobody but the owner publishes, and who detaches the slot
 * meanwhile does so by compare-and-swap. SC_PART: of several writers this was not the last. */
static enum sc_status publish(struct sc_segment *s, uint32_t slot, uint32_t generation, uint32_t ranks)
{
    sc_word *w = &sc_slot(s, slot)->state;
    uint64_t state = sc_load(w);
    enum sc_status st = not_writing(s, slot, state, generation);
    if (st == SC_OK && sc_lost(s, slot))
        return abort_one(s, slot, generation) < 0 ? SC_LOCKED : SC_LOST;
    if (st == SC_OK && sc_collective(s, slot)) {
        st = sc_finish_part(s, slot, &state, ranks);
        ranks = sc_asked(state) < s->world_size ? sc_asked(state) : s->world_size;
    }
    if (st == SC_OK && !seal_ready(s, slot, state))
        st = SC_NOT_FOUND;
    if (st == SC_OK) {
        /* Grants before READY: no evictor can come between. A new object's words cannot be full. */
        bool granted = ranks && sc_grant(s, slot, generation, ranks, sc_lease_end(s));
        /* Releases the payload; pairs with the reader's look at the state word. */
        uint32_t region = sc_region_of(s, sc_peek32(&sc_slot(s, slot)->block));
        if (sc_cas(w, &state, sc_published(state)))
            return published(s, slot, generation, region, granted ? ranks : 0);
        if (granted)
            sc_ungrant(s, slot, generation, ranks);
        st = SC_NOT_OWNER;
    }
    if (own_and_detached(s, slot, state, generation))
        abort_one(s, slot, generation);
    return st;
}

static bool finished(int8_t status) { return status == SC_OK || status == SC_PART; }

int64_t sc_publish(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, uint32_t ranks, int8_t *status)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    int64_t ok = 0;
    for (uint32_t i = 0; i < n; i++) {
        status[i] = (int8_t)refs[i].status;
        if (status[i] != SC_OK || refs[i].slot >= s->g.slots)
            continue;
        status[i] = (int8_t)publish(s, refs[i].slot, refs[i].generation, ranks);
        ok += finished(status[i]);
    }
    return sc_leave(s, ok);
}

static int abort_refs(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, int8_t *status)
{
    int aborted = 0;
    struct sc_reaped r = {0};
    int rc = sc_begin(s, s->lock_timeout_us, &r);
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < n; i++) {
        enum sc_status st = (enum sc_status)refs[i].status;
        if (st == SC_OK && refs[i].nbytes && refs[i].slot < s->g.slots) {
            uint32_t slot = refs[i].slot;
            uint64_t state = sc_load(&sc_slot(s, slot)->state);
            st = not_writing(s, slot, state, refs[i].generation);
            if (st == SC_OK || own_and_detached(s, slot, state, refs[i].generation))
                sc_abandon(s, slot, s->lane);
            aborted += st == SC_OK;
        }
        if (status)
            status[i] = (int8_t)st;
    }
    sc_end(s);
    sc_tally(s, SC_aborts, (uint64_t)aborted);
    return aborted;
}

int64_t sc_abort_refs(struct sc_segment *s, const struct sc_ref *refs, uint32_t n, int8_t *status)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    rc = abort_refs(s, refs, n, status);
    return sc_leave(s, rc);
}

/* A write of this lane that lost its key to the write lease is no more in the index. */
static uint32_t find_detached(struct sc_segment *s, const struct sc_key *k)
{
    if (sc_peek32(&sc_header(s)->detached) == 0)
        return SC_NO_SLOT;
    for (uint32_t slot = 0; slot < s->g.slots; slot++) {
        uint64_t state = sc_load(&sc_slot(s, slot)->state);
        if (own_and_detached(s, slot, state, sc_generation(state)) && sc_key_is(sc_slot(s, slot), k))
            return slot;
    }
    return SC_NO_SLOT;
}

/* Finds the slot that this lane writes under a key, and does `finish` (publish) or its opposite with it. */
static enum sc_status finish_key(struct sc_segment *s, const struct sc_key *k, bool keep, uint32_t ranks)
{
    uint64_t state;
    uint32_t slot = sc_index_find(s, k, &state);
    bool own = slot != SC_NO_SLOT && sc_state_of(state) == SC_WRITING && sc_fills(s, slot, state, s->lane);
    uint32_t lost = own ? SC_NO_SLOT : find_detached(s, k);
    if (lost != SC_NO_SLOT) {
        abort_one(s, lost, sc_generation(sc_load(&sc_slot(s, lost)->state)));
        return SC_NOT_OWNER;
    }
    if (slot == SC_NO_SLOT)
        return SC_NOT_FOUND;
    if (keep)
        return publish(s, slot, sc_generation(state), ranks);
    enum sc_status st = not_writing(s, slot, state, sc_generation(state));
    if (st != SC_OK)
        return st;
    sc_tally(s, SC_aborts, 1);
    return abort_one(s, slot, sc_generation(state)) < 0 ? SC_LOCKED : SC_OK;
}

static int64_t finish_keys(struct sc_segment *s, const struct sc_keys *keys, bool keep, uint32_t ranks, int8_t *status)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_key k[SC_CHUNK];
    int64_t ok = 0;
    for (uint32_t from = 0; from < keys->n; from += SC_CHUNK) {
        uint32_t m = sc_chunk_of(from, keys->n);
        sc_keys_load(s, keys, from, m, SC_FETCH_SHARE, k);
        for (uint32_t i = 0; i < m; i++) {
            status[from + i] = (int8_t)finish_key(s, &k[i], keep, ranks);
            ok += finished(status[from + i]);
        }
    }
    return sc_leave(s, ok);
}

int64_t sc_finish_write(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n,
                        uint32_t ranks, int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    return finish_keys(s, &keys, true, ranks, status);
}

int64_t sc_abort_write(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n,
                       int8_t *status)
{
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    return finish_keys(s, &keys, false, 0, status);
}

int64_t sc_put(struct sc_segment *s, const char *key, uint32_t width, char *payload, const char *data, uint64_t nbytes,
               int8_t *status)
{
    /* Inside for the whole of the copy, so that a close waits for it. */
    int64_t rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_ref ref = {0};
    uint32_t plain = 0;
    rc = sc_reserve_write(s, key, width, NULL, 1, &nbytes, &plain, false, 0, false, 1, &ref);
    *status = (int8_t)ref.status;
    if (rc > 0) {
        sc_guard_payload(payload + ref.offset, nbytes);
        memcpy(payload + ref.offset, data, nbytes);
        sc_guard_payload(NULL, 0);
        rc = sc_publish(s, &ref, 1, 0, status);
    }
    return sc_leave(s, rc);
}

struct deletion { bool force, reaped; int8_t *status; };

static enum sc_status delete_key(struct sc_segment *s, const struct sc_key *k, struct deletion *d)
{
    struct sc_reaped r = {0};
    uint64_t state;
    for (;;) {
        uint32_t slot = sc_index_find(s, k, &state);
        if (slot == SC_NO_SLOT)
            return SC_NOT_FOUND;
        if (sc_state_of(state) != SC_WRITING && sc_remove(s, slot, d->force))
            return SC_OK;
        if (d->reaped)
            return SC_LOCKED;
        d->reaped = true; /* once a batch: a dead lane's shares lock nothing */
        sc_reap_dead(s, &r);
    }
}

static enum sc_status visit_delete(struct sc_segment *s, const struct sc_key *k, uint32_t at, void *arg)
{
    struct deletion *d = arg;
    enum sc_status st = k ? delete_key(s, k, d) : SC_LOCKED;
    d->status[at] = (int8_t)st;
    return st;
}

int64_t sc_delete(struct sc_segment *s, const char *data, uint32_t width, const uint32_t *ends, uint32_t n, bool force,
                  int8_t *status)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_keys keys = sc_keys_of(data, width, ends, n);
    struct deletion d = {force, false, status};
    int64_t ok = under_lock(s, &keys, visit_delete, &d);
    sc_tally(s, SC_deletes, ok > 0 ? (uint64_t)ok : 0);
    return sc_leave(s, ok);
}

int64_t sc_evict(struct sc_segment *s, uint32_t region, uint64_t nbytes)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    if (region > s->g.regions)
        return sc_leave(s, 0);
    struct sc_reaped r = {0};
    uint64_t freed = 0, one = 1;
    bool reaped = false;
    while (freed < nbytes && one && (rc = sc_begin(s, s->lock_timeout_us, &r)) == 0) {
        sc_refresh_victims(s);
        for (int i = 0; i < SC_HOLD && freed < nbytes && (one = sc_evict_one(s, region)); i++)
            freed += one;
        if (!one && !reaped) {
            reaped = true;
            one = sc_reap_dead(s, &r);
        }
        sc_end(s);
    }
    return sc_leave(s, rc < 0 ? rc : (int64_t)freed);
}

int64_t sc_clear(struct sc_segment *s)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    struct sc_reaped r = {0};
    int64_t cleared = 0;
    for (uint32_t slot = 0; slot < s->g.slots && rc == 0;) {
        rc = sc_begin(s, s->lock_timeout_us, &r);
        if (rc < 0)
            break;
        if (slot == 0)
            sc_reap_dead(s, &r);
        for (uint32_t end = slot + 4096; slot < s->g.slots && slot < end; slot++)
            cleared += sc_state_of(sc_load(&sc_slot(s, slot)->state)) == SC_READY && sc_remove(s, slot, false);
        sc_end(s);
    }
    sc_tally(s, SC_deletes, (uint64_t)cleared);
    return sc_leave(s, rc < 0 ? rc : cleared);
}
