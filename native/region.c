#include "arena.h"
#include "guard.h"

#include <errno.h>

static bool within_arena(const struct sc_segment *s, uint32_t region) { return region >= 1 && region <= s->g.regions; }

static uint64_t owner_of(uint64_t word) { return word >> 16 & 0xffff; }

static uint64_t seal_of(const struct sc_segment *s, uint32_t region, uint64_t state)
{
    const struct sc_region *r = sc_region(s, region);
    uint64_t about[] = {s->checksum ^ region, state >> 16, sc_peek32(&r->incarnation), sc_peek32(&r->blocks),
                        sc_peek32(&r->block_shift), sc_peek32(&r->device), sc_peek(&r->nbytes)};
    uint64_t h = sc_fnv(UINT64_C(0xcbf29ce484222325), about, sizeof about);
    for (uint32_t i = 0; i < 2 + 8; i++) {
        uint64_t word = sc_peek(i < 2 ? &r->uuid[i] : &r->handle[i - 2]);
        h = sc_fnv(h, &word, sizeof word);
    }
    return h | 1; /* never 0, which an entry without a region has */
}

bool sc_region_sound(const struct sc_segment *s, uint32_t region)
{
    const struct sc_region *r = sc_region(s, region);
    return sc_peek(&r->seal) == seal_of(s, region, sc_load(&r->state));
}

struct sc_extent sc_device_extent(const struct sc_segment *s, uint32_t region)
{
    struct sc_extent e = {sc_first_block(s, region), 0, s->g.block_size, 0};
    if (!within_arena(s, region))
        return e;
    const struct sc_region *r = sc_region(s, region);
    uint32_t blocks = sc_peek32(&r->blocks), shift = sc_peek32(&r->block_shift);
    if (shift > 50 || e.block_size > UINT64_C(1) << 50 >> shift || blocks > s->g.blocks)
        return e;
    e.blocks = blocks;
    e.block_size <<= shift;
    e.tie = sc_mix(sc_peek(&r->seal) ^ UINT64_C(0x9e3779b97f4a7c15), (uint64_t)blocks << 32 | shift);
    return e;
}

static bool owner_lives(const struct sc_segment *s, uint32_t region, uint64_t state)
{
    uint32_t owner = (uint32_t)owner_of(state), incarnation = sc_peek32(&sc_region(s, region)->incarnation);
    return owner < s->g.lanes && sc_load32(&sc_lane(s, owner)->incarnation) == incarnation && sc_lane_held(s, owner);
}

bool sc_region_lives(const struct sc_segment *s, uint32_t region)
{
    if (!sc_region_stays(s, region))
        return false;
    if (!region || sc_known_to_live >> region & 1)
        return true;
    uint64_t state = sc_load(&sc_region(s, region)->state);
    bool sound = sc_region_sound(s, region);
    if (!sound && sc_load(&sc_region(s, region)->state) == state) /* else it is another one meanwhile */
        sc_poke32((sc_half *)&s->suspect, 1);
    bool lives = sound && owner_lives(s, region, state);
    sc_known_to_live |= (uint32_t)lives << region;
    return lives;
}

/* Which lanes of living processes have it open. */
static bool opened_by(const struct sc_segment *s, uint32_t region, uint64_t *lanes)
{
    bool any = false;
    for (uint32_t lane = 0; lane < s->g.lanes; lane++) {
        uint64_t own = UINT64_C(1) << (lane % 64);
        if (sc_load(&sc_region(s, region)->opened[lane / 64]) & own && sc_lane_held(s, lane)) {
            lanes[lane / 64] |= own;
            any = true;
        }
    }
    return any;
}

void sc_region_settle(struct sc_segment *s, uint32_t region)
{
    if (!within_arena(s, region))
        return; /* of a slot that is damaged */
    struct sc_region *r = sc_region(s, region);
    uint64_t state = sc_load(&r->state), lanes[SC_MAX_LANES / 64] = {0};
    if (sc_kind_of(state) != SC_REGION_LOST || sc_peek32(&r->free_blocks) != sc_device_extent(s, region).blocks ||
        opened_by(s, region, lanes))
        return;
    sc_store(&r->state, sc_region_word((uint32_t)(state >> 32), 0, SC_REGION_NONE));
    sc_poke(&r->seal, 0); /* a flipped bit brings none back */
}

void sc_region_lose(struct sc_segment *s, uint32_t region)
{
    struct sc_region *r = sc_region(s, region);
    uint64_t state = sc_load(&r->state);
    sc_store(&r->state, (state & ~UINT64_C(0xffff)) | SC_REGION_LOST);
}

void sc_regions_lose(struct sc_segment *s, uint32_t lane)
{
    for (uint32_t region = 1; region <= s->g.regions; region++) {
        struct sc_region *r = sc_region(s, region);
        uint64_t state = sc_load(&r->state);
        sc_and(&r->opened[lane / 64], ~(UINT64_C(1) << (lane % 64)));
        if (sc_kind_of(state) == SC_REGION_LIVE && owner_of(state) == lane)
            sc_region_lose(s, region);
    }
}

bool sc_any_lost(const struct sc_segment *s)
{
    for (uint32_t region = 1; region <= s->g.regions; region++)
        if (sc_kind_of(sc_load(&sc_region(s, region)->state)) == SC_REGION_LOST)
            return true;
    return false;
}

bool sc_has_regions(struct sc_segment *s)
{
    bool any = false;
    if (sc_enter(s) < 0)
        return true; /* nobody can say */
    for (uint32_t region = 1; region <= s->g.regions && !any; region++)
        any = sc_kind_of(sc_peek(&sc_region(s, region)->state)) != SC_REGION_NONE;
    sc_leave(s, 0);
    return any;
}

uint64_t sc_region_block_size(const struct sc_segment *s, uint64_t nbytes)
{
    uint64_t block_size = s->g.block_size;
    while (nbytes / block_size > s->g.blocks)
        block_size *= 2;
    return block_size;
}

static uint32_t find_none(const struct sc_segment *s)
{
    for (uint32_t region = 1; region <= s->g.regions; region++)
        if (sc_kind_of(sc_load(&sc_region(s, region)->state)) == SC_REGION_NONE)
            return region;
    return 0;
}

/* Of a number that nothing has. A death before the state is stored leaves nothing. */
static void write_region(struct sc_segment *s, uint32_t region, const struct sc_region_spec *spec)
{
    struct sc_region *r = sc_region(s, region);
    uint64_t block_size = sc_region_block_size(s, spec->nbytes);
    uint32_t blocks = (uint32_t)(spec->nbytes / block_size);
    uint64_t state = sc_region_word((uint32_t)(sc_load(&r->state) >> 32) + 1, s->lane, SC_REGION_LIVE);
    sc_fence_release(); /* NONE before its new fields; pairs with the fence in sc_get_region */
    sc_poke32(&r->incarnation, s->incarnation);
    sc_poke32(&r->blocks, blocks);
    sc_poke32(&r->block_shift, (uint32_t)__builtin_ctzll(block_size / s->g.block_size));
    sc_poke32(&r->device, spec->device);
    sc_poke(&r->nbytes, spec->nbytes);
    sc_poke_text(r->uuid, 2, (const char *)spec->uuid, sizeof spec->uuid);
    sc_poke_text(r->handle, 8, (const char *)spec->handle, sizeof spec->handle);
    for (uint32_t i = 0; i < SC_MAX_LANES / 64; i++)
        sc_store(&r->opened[i], 0);
    sc_poke(&r->seal, seal_of(s, region, state));
    sc_region_blocks_clear(s, region);
    sc_store(&r->state, state);
}

int64_t sc_region_add(struct sc_segment *s, const struct sc_region_spec *spec)
{
    struct sc_reaped r = {0};
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    if ((rc = sc_begin(s, s->lock_timeout_us, &r)) < 0)
        return sc_leave(s, rc);
    uint32_t region = find_none(s);
    if (!region) {
        sc_reap_dead(s, &r);
        region = find_none(s);
    }
    if (region)
        write_region(s, region, spec);
    sc_end(s);
    return sc_leave(s, region ? (int64_t)region : SC_E_REGIONS);
}

int sc_region_give_up(struct sc_segment *s, uint32_t region)
{
    struct sc_reaped r = {0};
    int rc = within_arena(s, region) ? sc_enter(s) : SC_E_REGIONS;
    if (rc < 0)
        return rc;
    if ((rc = sc_begin(s, s->lock_timeout_us, &r)) < 0)
        return (int)sc_leave(s, rc);
    uint64_t state = sc_load(&sc_region(s, region)->state);
    bool own = sc_kind_of(state) == SC_REGION_LIVE && owner_of(state) == s->lane;
    if (own) {
        sc_region_lose(s, region);
        sc_sweep_lost(s);
    }
    sc_end(s);
    return (int)sc_leave(s, own ? SC_OK : SC_NOT_OWNER);
}

static uint32_t state_now(const struct sc_segment *s, uint32_t region, uint64_t state)
{
    bool dead = sc_kind_of(state) == SC_REGION_LIVE && !owner_lives(s, region, state);
    return dead ? SC_REGION_LOST : sc_kind_of(state);
}

int sc_get_region(struct sc_segment *s, uint32_t region, struct sc_region_info *info)
{
    *info = (struct sc_region_info){0};
    int rc = within_arena(s, region) ? sc_enter(s) : SC_E_REGIONS;
    if (rc < 0)
        return rc;
    const struct sc_region *r = sc_region(s, region);
    uint64_t state = sc_load(&r->state); /* before all that is told of it */
    if (sc_kind_of(state) == SC_REGION_NONE)
        return (int)sc_leave(s, 0);
    struct sc_extent e = sc_device_extent(s, region);
    *info = (struct sc_region_info){
        .state = state_now(s, region, state),
        .generation = (uint32_t)(state >> 32),
        .owner = (uint32_t)owner_of(state),
        .incarnation = sc_peek32(&r->incarnation),
        .blocks = (uint32_t)e.blocks,
        .free_blocks = sc_peek32(&r->free_blocks),
        .device = sc_peek32(&r->device),
        .block_size = e.block_size,
        .nbytes = sc_peek(&r->nbytes),
    };
    sc_peek_text(r->uuid, 2, (char *)info->uuid);
    sc_peek_text(r->handle, 8, (char *)info->handle);
    opened_by(s, region, info->opened);
    bool sound = sc_kind_of(state) <= SC_REGION_LOST && sc_region_sound(s, region);
    sc_fence_acquire(); /* what was read is of this generation, or the state is another */
    uint64_t now = sc_load(&r->state);
    bool stays = now >> 32 == state >> 32 && sc_kind_of(now) != SC_REGION_NONE;
    if (!stays || !sound)
        *info = (struct sc_region_info){0};
    return (int)sc_leave(s, stays && !sound ? SC_E_DAMAGED : 0);
}

int sc_region_opened(struct sc_segment *s, uint32_t region, uint32_t generation, bool open)
{
    int rc = within_arena(s, region) ? sc_enter(s) : SC_E_REGIONS;
    if (rc < 0)
        return rc;
    struct sc_region *r = sc_region(s, region);
    sc_word *w = &r->opened[s->lane / 64];
    uint64_t own = UINT64_C(1) << (s->lane % 64);
    /* Said before the look at the state; the owner gives the region up before it looks at who has it open. What was said
     * before stays said, also of one that is lost. */
    bool known = open && sc_or(w, own) & own;
    bool same = sc_load(&r->state) >> 32 == generation;
    bool lives = same && sc_region_lives(s, region);
    if (open ? !lives && !known : same)
        sc_and(w, ~own);
    return (int)sc_leave(s, lives ? SC_OK : SC_LOST);
}

int sc_region_check(struct sc_segment *s, uint32_t region)
{
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    return (int)sc_leave(s, sc_region_lives(s, region) ? SC_OK : SC_LOST);
}
