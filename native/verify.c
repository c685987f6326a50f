/* verify.c - a walk of the whole arena, under its lock, that checks every invariant that bytes can show.
 *
 * Readers and publishers go on meanwhile; only what they cannot change is held against the arena.
 */
#include "arena.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct report { char *text; uint64_t bytes, used; int64_t findings; };

/* A finding that does not fit into the text counts, but is not told in part. */
static void __attribute__((format(printf, 2, 3))) find(struct report *p, const char *format, ...)
{
    va_list args;
    p->findings++;
    va_start(args, format);
    int n = vsnprintf(p->text + p->used, p->bytes - p->used, format, args);
    va_end(args);
    if (n > 0 && (uint64_t)n < p->bytes - p->used)
        p->used += (uint64_t)n;
    p->text[p->used] = 0;
}

/* Owners of blocks (slot + 1) as the slots tell them, beside what the map says. */
static void check_run(struct sc_segment *s, uint32_t slot, const struct sc_object *o, uint32_t *owners, struct report *p)
{
    for (uint64_t b = o->block; b < o->block + o->blocks; b++) {
        if (owners[b])
            find(p, "block %u belongs to slots %u and %u\n", (unsigned)b, owners[b] - 1, slot);
        owners[b] = slot + 1;
        if (!sc_block_used(s, (uint32_t)b))
            find(p, "block %u of slot %u counts as free\n", (unsigned)b, slot);
        else if (sc_block_owner(s, (uint32_t)b) != slot)
            find(p, "block %u of slot %u is listed as slot %u's\n", (unsigned)b, slot, sc_block_owner(s, (uint32_t)b));
    }
}

static void check_key(struct sc_segment *s, uint32_t slot, uint64_t state, struct report *p)
{
    const struct sc_slot *r = sc_slot(s, slot);
    uint32_t bytes = sc_key_bytes(sc_peek32(&r->about)), found;
    uint64_t seen;
    struct sc_key k;
    if (bytes == 0 || bytes > SC_MAX_KEY) {
        find(p, "slot %u has a key of %u bytes\n", slot, bytes);
        return;
    }
    sc_key_load(&k, (const void *)r->key, bytes, s->seed);
    if (k.hash != sc_peek(&r->hash))
        find(p, "slot %u has another hash than its key\n", slot);
    found = sc_index_find(s, &k, &seen);
    if (state & SC_DETACHED ? found == slot : found != slot)
        find(p, "slot %u is %s the index\n", slot, found == slot ? "detached but in" : "not what its key finds in");
}

static void check_slot(struct sc_segment *s, uint32_t slot, uint32_t *owners, struct report *p)
{
    uint64_t state = sc_load(&sc_slot(s, slot)->state);
    struct sc_object o;
    bool used = sc_state_of(state) != SC_FREE;
    if (used != sc_slot_used(s, slot))
        find(p, "slot %u is %s but counts as %s\n", slot, used ? "in use" : "free", used ? "free" : "used");
    if (!used)
        return;
    if (sc_state_of(state) > SC_READY)
        find(p, "slot %u is in state %d while nobody evicts\n", slot, (int)sc_state_of(state));
    if (sc_owner_of(state) >= s->g.lanes)
        find(p, "slot %u names lane %u as its owner\n", slot, sc_owner_of(state));
    if ((sc_peek32(&sc_slot(s, slot)->writers) > 1) != sc_collective(s, slot))
        find(p, "slot %u is filled by %u lanes\n", slot, sc_peek32(&sc_slot(s, slot)->writers));
    if (!sc_slot_describe(s, slot, state, sc_peek(&sc_slot(s, slot)->hash), &o)) {
        find(p, "slot %u has a broken seal or lies outside the payload\n", slot);
        return;
    }
    if (o.layout > sc_load32(&sc_header(s)->layouts))
        find(p, "slot %u names layout %u of %u\n", slot, o.layout, sc_load32(&sc_header(s)->layouts));
    check_run(s, slot, &o, owners, p);
    check_key(s, slot, state, p);
}

static void check_region(struct sc_segment *s, uint32_t region, const uint32_t *owners, struct report *p)
{
    struct sc_extent e = sc_extent_of(s, region);
    uint32_t free_blocks = 0, counted = sc_load32(sc_free_blocks(s, region));
    for (uint32_t b = (uint32_t)e.first; b < e.first + e.blocks; b++) {
        free_blocks += !sc_block_used(s, b);
        if (!owners[b] && (sc_block_used(s, b) || sc_block_owner(s, b) != SC_NO_SLOT))
            find(p, "block %u counts as used but belongs to no object\n", b);
    }
    if (free_blocks != counted)
        find(p, "%u blocks of region %u are free, %u are counted\n", free_blocks, region, counted);
}

static void check_regions(struct sc_segment *s, const uint32_t *owners, struct report *p)
{
    check_region(s, 0, owners, p);
    for (uint32_t region = 1; region <= s->g.regions; region++) {
        uint64_t state = sc_load(&sc_region(s, region)->state);
        if (sc_kind_of(state) == SC_REGION_NONE)
            continue;
        if (sc_kind_of(state) > SC_REGION_LOST || !sc_region_sound(s, region))
            find(p, "region %u has a broken seal\n", region);
        else
            check_region(s, region, owners, p);
    }
}

static void check_maps(struct sc_segment *s, const uint32_t *owners, struct report *p)
{
    uint32_t free_slots = 0;
    check_regions(s, owners, p);
    for (uint32_t slot = 0; slot < s->g.slots; slot++)
        free_slots += !sc_slot_used(s, slot);
    if (free_slots != sc_load32(&sc_header(s)->free_slots))
        find(p, "%u slots are free, %u are counted\n", free_slots, sc_load32(&sc_header(s)->free_slots));
}

static void check_index(struct sc_segment *s, struct report *p)
{
    if (sc_load(&sc_header(s)->index_seq) & 1)
        find(p, "the index is half rebuilt\n");
    for (uint64_t at = 0; at < UINT64_C(1) << s->g.index_bits; at++) {
        uint64_t e = sc_index_entry(s, at);
        if (e == 0)
            continue;
        uint32_t slot = sc_index_slot(e);
        if (slot >= s->g.slots || sc_state_of(sc_load(&sc_slot(s, slot)->state)) == SC_FREE)
            find(p, "index entry %llu names slot %u, which holds nothing\n", (unsigned long long)at, slot);
    }
}

static void check_shares(struct sc_segment *s, struct report *p)
{
    for (uint32_t lane = 0; lane < s->g.lanes; lane++) {
        bool nobody = lane >= sc_lane_limit(s);
        for (uint32_t slot = 0; slot < s->g.slots; slot++) {
            uint64_t word = sc_load(sc_share(s, lane, slot));
            if (nobody && word)
                find(p, "lane %u was never taken but has a share word of slot %u\n", lane, slot);
        }
    }
}

int64_t sc_verify(struct sc_segment *s, char *text, uint64_t bytes)
{
    struct report p = {text, bytes, 0, 0};
    struct sc_reaped r = {0};
    int rc = sc_enter(s);
    if (rc < 0)
        return rc;
    text[0] = 0;
    uint32_t *owners = calloc(sc_all_blocks(s), sizeof *owners);
    rc = owners ? sc_begin(s, s->lock_timeout_us, &r) : SC_E_MEMORY;
    if (rc == 0) {
        for (uint32_t slot = 0; slot < s->g.slots; slot++)
            check_slot(s, slot, owners, &p);
        check_maps(s, owners, &p);
        check_index(s, &p);
        check_shares(s, &p);
        sc_end(s);
    }
    free(owners);
    return sc_leave(s, rc < 0 ? rc : p.findings);
}
