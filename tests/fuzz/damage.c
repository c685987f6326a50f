/* damage.c - what may happen to a segment: single words, ranges, lies that fit the structures, a forged header, a file
 * that is cut or longer.
 *
 * Left out, since nobody could notice it without a checksum over all bytes at each read:
 *   - the payload itself;
 *   - a second damage that undoes a first one. While a slot's state was a lie its memory may have become another's, so
 *     no word of the slot table is damaged twice (touched);
 *   - a slot of which both state and seal are wiped: it begins again, and reaches a generation that an old writer's or
 *     reader's record names (was_erased in world.c: that writer gives up);
 *   - block_map and owners telling the same lie about a block (unsure): they are each other's witness;
 *   - memory of a region whose entry was damaged: another region may have its number (regions_lie);
 *   - a share that was damaged away, or a lane that a lane_limit above 0 does not count any more, protects nothing
 *     (shares_lie);
 *   - another header under live processes, which never look at it again. A forged header is for those who come.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

uint64_t word_at(const struct world *w, uint64_t offset) { return sc_peek((const sc_word *)(w->map + offset)); }

void damage_word(struct world *w, uint64_t offset, uint64_t value)
{
    if (offset >= w->g.slot_table && offset < w->g.slot_table + w->g.slots * sizeof(struct sc_slot)) {
        uint64_t i = (offset - w->g.slot_table) / 8;
        if (w->calm || w->touched[i] || word_at(w, offset) == value)
            return;
        w->touched[i] = 1;
    }
    if ((offset >= w->g.slot_table && offset < w->g.scores) || (offset >= w->g.shares && offset < w->g.since))
        w->shares_lie = true;
    if (offset >= w->g.region_table && offset < w->g.slot_table)
        w->regions_lie = true;
    /* A limit that is too low is noticed by who knew a higher one; between what it knew and the truth nobody notices. */
    if (offset == offsetof(struct sc_header, lane_limit) && (uint32_t)value)
        w->shares_lie = true;
    if (word_at(w, offset) != value && (offset < w->g.layout_table || offset >= w->g.slot_table))
        tell("  damage at %llu: %016llx -> %016llx", (unsigned long long)offset, (unsigned long long)word_at(w, offset),
             (unsigned long long)value);
    sc_store((sc_word *)(w->map + offset), value);
}

struct part { uint64_t at, bytes; };

enum { LOCK, INDEX_SEQ, LIMITS, COUNTS, LANE_TABLE, LAYOUT_TABLE, REGION_TABLE, SLOT_TABLE, SCORES, GHOSTS, SHARES, SINCE, INDEX, SLOT_MAP,
       BLOCK_MAP, OWNERS, BACKED, PARTS };

static uint64_t all_blocks(const struct sc_geometry *g) { return (uint64_t)g->blocks * (1 + g->regions); }

/* What of each part is in use. */
static struct part part_of(const struct world *w, uint32_t part)
{
    const struct sc_geometry *g = &w->g;
    const struct part parts[PARTS] = {
        [LOCK] = {offsetof(struct sc_header, lock), 8},
        [INDEX_SEQ] = {offsetof(struct sc_header, index_seq), 8},
        [LIMITS] = {offsetof(struct sc_header, lane_limit), 16},
        [COUNTS] = {offsetof(struct sc_header, layouts), 40},
        [LANE_TABLE] = {g->lane_table, g->lanes * sizeof(struct sc_lane)},
        [LAYOUT_TABLE] = {g->layout_table, 4 * sizeof(struct sc_layout)},
        /* A word of it where there are no regions; it is padding. */
        [REGION_TABLE] = {g->regions ? g->region_table : g->region_table - 8, g->regions ? g->regions * sizeof(struct sc_region) : 8},
        [SLOT_TABLE] = {g->slot_table, g->slots * sizeof(struct sc_slot)},
        [SCORES] = {g->scores, g->slots * sizeof(sc_word)},
        [GHOSTS] = {g->ghosts, g->ghost_lines * UINT64_C(64)},
        [SHARES] = {g->shares, g->lanes * g->share_stride},
        [SINCE] = {g->since, g->lanes * g->since_stride},
        [INDEX] = {g->index, sizeof(sc_word) << g->index_bits},
        [SLOT_MAP] = {g->slot_map, (g->slots + 63) / 64 * 8},
        [BLOCK_MAP] = {g->block_map, (all_blocks(g) + 63) / 64 * 8},
        [OWNERS] = {g->owners, (all_blocks(g) * sizeof(sc_half) + 7) / 8 * 8},
        [BACKED] = {g->backed, (g->blocks + 63) / 64 * 8},
    };
    return parts[part];
}

static uint64_t some_word(const struct world *w, struct input *in, uint32_t part)
{
    struct part p = part_of(w, part);
    uint64_t words = p.bytes / 8, i = choose(in, (uint32_t)words);
    if (part == LANE_TABLE && choose(in, 4)) /* mostly who the lane is, seldom its statistics */
        i = i / 256 * 256 + i % 16;
    return p.at + i * 8;
}

static uint64_t other_value(const struct world *w, struct input *in, uint32_t part, uint64_t old)
{
    switch (choose(in, 14)) {
    case 0: return 0;
    case 1: return UINT64_MAX;
    case 2: return choose(in, 16);
    case 3: return UINT64_C(1) << choose(in, 64);
    case 4: return choose_word(in);
    case 5: return word_at(w, some_word(w, in, part));
    case 6: return word_at(w, some_word(w, in, choose(in, PARTS)));
    case 7: return old + 1;
    case 8: return old - 1;
    case 9: return old << 32 | old >> 32;
    case 10: return (old & ~UINT64_C(0xffffffff)) | choose(in, 32);
    case 11: return (old & UINT64_C(0xffffffff)) | (uint64_t)choose(in, 32) << 32;
    case 12: return (old & ~(UINT64_C(0xff) << 8 * choose(in, 8))) | (uint64_t)choose(in, 256) << 8 * choose(in, 8);
    default: return old ^ UINT64_C(1) << choose(in, 64);
    }
}

static void damage_one(struct world *w, struct input *in, uint32_t part)
{
    uint64_t at = some_word(w, in, part);
    damage_word(w, at, other_value(w, in, part, word_at(w, at)));
}

static void damage_range(struct world *w, struct input *in)
{
    uint64_t from = choose(in, (uint32_t)(w->g.metadata / 8)), n = choose(in, 512) + 1;
    if (choose(in, 4)) {
        uint32_t part = choose(in, PARTS);
        from = some_word(w, in, part) / 8;
        n = choose(in, (uint32_t)(part_of(w, part).bytes / 8)) + 1;
    }
    uint32_t kind = choose(in, 4);
    uint64_t source = choose(in, (uint32_t)(w->g.metadata / 8)), x = choose_word(in);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t at = (from + i) * 8, whence = (source + i) * 8;
        /* The constant part of the header is for forge. */
        if (at < offsetof(struct sc_header, lock) || at >= w->g.metadata || whence >= w->g.metadata)
            continue;
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407;
        damage_word(w, at, kind == 0 ? 0 : kind == 1 ? UINT64_MAX : kind == 2 ? x : word_at(w, whence));
    }
}

static uint64_t slot_word(const struct world *w, uint32_t slot, uint64_t field)
{
    return w->g.slot_table + slot * sizeof(struct sc_slot) + field;
}

static uint32_t used_slot(const struct world *w, struct input *in)
{
    uint32_t slot = choose(in, w->g.slots);
    for (uint32_t i = 0; i < w->g.slots; i++, slot = (slot + 1) % w->g.slots)
        if (sc_state_of(word_at(w, slot_word(w, slot, 0))) != SC_FREE)
            return slot;
    return slot;
}

/* Fields of one object that are another's, or whole slots that change places. */
static void damage_slots(struct world *w, struct input *in)
{
    uint32_t a = used_slot(w, in), b = used_slot(w, in);
    enum { STATE = offsetof(struct sc_slot, state), RUN = offsetof(struct sc_slot, about) };
    enum { KEY = offsetof(struct sc_slot, key) };
    uint64_t state = word_at(w, slot_word(w, a, STATE)), other;
    uint32_t owner = choose(in, 4) ? choose(in, w->g.lanes + 1) : 0xffff;
    switch (choose(in, 8)) {
    case 0: /* another's memory */
        damage_word(w, slot_word(w, a, RUN), word_at(w, slot_word(w, b, RUN)));
        break;
    case 1: /* another's memory and length */
        damage_word(w, slot_word(w, a, RUN), word_at(w, slot_word(w, b, RUN)));
        damage_word(w, slot_word(w, a, RUN + 8), word_at(w, slot_word(w, b, RUN + 8)));
        break;
    case 2: /* another's key */
        damage_word(w, slot_word(w, a, RUN), (word_at(w, slot_word(w, a, RUN)) & ~UINT64_C(0xff)) |
                                                 (word_at(w, slot_word(w, b, RUN)) & 0xff));
        for (uint64_t i = 0; i < SC_MAX_KEY; i += 8)
            damage_word(w, slot_word(w, a, KEY + i), word_at(w, slot_word(w, b, KEY + i)));
        if (choose(in, 2))
            damage_word(w, slot_word(w, a, KEY + SC_MAX_KEY), word_at(w, slot_word(w, b, KEY + SC_MAX_KEY)));
        break;
    case 3: /* they change places */
        for (uint64_t i = 0; i < sizeof(struct sc_slot); i += 8) {
            other = word_at(w, slot_word(w, b, i));
            damage_word(w, slot_word(w, b, i), word_at(w, slot_word(w, a, i)));
            damage_word(w, slot_word(w, a, i), other);
        }
        break;
    case 4: /* two of one */
        for (uint64_t i = 0; i < sizeof(struct sc_slot); i += 8)
            damage_word(w, slot_word(w, b, i), word_at(w, slot_word(w, a, i)));
        break;
    case 5: damage_word(w, slot_word(w, a, STATE), sc_with_state(state, (enum sc_state)choose(in, 8))); break;
    case 6: /* another owner, or none that can be */
        damage_word(w, slot_word(w, a, STATE), (state & ~UINT64_C(0xffff0000)) | (uint64_t)owner << 16);
        break;
    default: /* an earlier or later object */
        damage_word(w, slot_word(w, a, STATE), state + (((uint64_t)choose(in, 3) - 1) << 32));
    }
}

/* Entries that name other slots, a table without an end, a table without an entry. */
static void damage_index(struct world *w, struct input *in)
{
    struct part p = part_of(w, INDEX);
    uint64_t entry = word_at(w, some_word(w, in, INDEX)), kind = choose(in, 4);
    uint64_t hash = word_at(w, slot_word(w, used_slot(w, in), offsetof(struct sc_slot, hash))) & ~UINT64_C(0xffffff);
    uint32_t slot = choose(in, 4) ? choose(in, w->g.slots + 2) : 0xfffffd; /* the last that an entry can name */
    for (uint64_t i = 0; i < p.bytes; i += 8) {
        uint64_t old = word_at(w, p.at + i);
        if (kind == 0 && old > 1)
            damage_word(w, p.at + i, (old & ~UINT64_C(0xffffff)) | (slot + 2));
        else if (kind == 1 && old <= 1)
            damage_word(w, p.at + i, entry > 1 ? entry : 1);
        else if (kind == 2 && old <= 1)
            damage_word(w, p.at + i, hash | (slot + 2));
        else if (kind == 3)
            damage_word(w, p.at + i, old > 1);
    }
}

/* The lock in the name of any lane, of this or another life. */
static void damage_lock(struct world *w, struct input *in)
{
    uint32_t lane = choose(in, w->g.lanes + 2);
    uint64_t incarnation = choose(in, 3);
    if (lane < w->g.lanes && choose(in, 2))
        incarnation = (uint32_t)word_at(w, w->g.lane_table + lane * sizeof(struct sc_lane));
    damage_word(w, offsetof(struct sc_header, lock), incarnation << 32 | (uint64_t)choose(in, 2) << 16 | (lane + 1));
}

/* Shares that nobody took. */
static void damage_shares(struct world *w, struct input *in)
{
    uint32_t slot = used_slot(w, in), lane = choose(in, w->g.lanes);
    uint32_t generation = sc_generation(word_at(w, slot_word(w, slot, 0))) + choose(in, 3) - 1;
    uint32_t reserved = choose(in, 2) ? SC_RESERVED_MAX : 1, held = choose(in, 2) ? SC_HELD_MAX : 1;
    uint64_t word = sc_share_word(generation, choose(in, 2) * reserved, choose(in, 2) * held);
    damage_word(w, w->g.shares + lane * w->g.share_stride + slot * 8,
                sc_with_stage(word, (enum sc_stage)choose(in, 4)));
}

/* A region of another kind, owner or life; of another size; an object that lies in another region, or in none. */
static void damage_regions(struct world *w, struct input *in)
{
    if (!w->g.regions)
        return;
    uint64_t at = w->g.region_table + choose(in, w->g.regions) * sizeof(struct sc_region), state = word_at(w, at);
    uint64_t sizes = at + offsetof(struct sc_region, incarnation), shift = sizes + 8;
    uint64_t run = slot_word(w, used_slot(w, in), offsetof(struct sc_slot, about));
    switch (choose(in, 6)) {
    case 0: damage_word(w, at, (state & ~UINT64_C(0xffff)) | choose(in, 5)); break;
    case 1: damage_word(w, at, (state & ~UINT64_C(0xffff0000)) | (uint64_t)choose(in, w->g.lanes + 2) << 16); break;
    case 2: damage_word(w, at, state + (((uint64_t)choose(in, 3) - 1) << 32)); break;
    case 3:
        damage_word(w, sizes, (word_at(w, sizes) & UINT64_C(0xffffffff)) | (uint64_t)choose(in, 2 * BLOCKS) << 32);
        break;
    case 4: damage_word(w, shift, (word_at(w, shift) & ~UINT64_C(0xffffffff)) | choose(in, 64)); break;
    default:
        damage_word(w, run, (word_at(w, run) & UINT64_C(0xffffffff)) |
                                (uint64_t)(word_at(w, run) >> 32 & 0xffff) % BLOCKS << 32 |
                                (uint64_t)choose(in, w->g.regions + 3) * BLOCKS << 32);
    }
}

/* A header that is another arena's. Everybody leaves first; those who come see it. */
static void forge(struct world *w, struct input *in)
{
    enum { MOST = 1 << 24 };
    struct sc_header *h = (struct sc_header *)w->map;
    uint64_t *words = (uint64_t *)w->map, kind = choose(in, 8), checksum = h->checksum;
    w->forged = true; /* a second one might undo it */
    for (int i = 0; i < HANDLES; i++)
        world_detach(w, i, true);
    if (kind == 0)
        h->lanes += choose(in, 5) - 2;
    else if (kind == 1)
        h->slots += choose(in, 5) - 2;
    else if (kind == 2)
        h->capacity += ((uint64_t)choose(in, 9) - 4) * BLOCK;
    else if (kind == 3)
        h->block_size = choose(in, 2) ? h->block_size << 1 : h->block_size >> 1;
    else if (kind == 4)
        (&h->read_lease_us)[choose(in, 3)] = choose(in, 2) ? choose(in, LOCK_TIMEOUT_US) : UINT64_MAX - choose(in, 8);
    else if (kind == 5)
        h->regions += choose(in, 5) - 2;
    else
        words[choose(in, 64)] ^= UINT64_C(1) << choose(in, 64);
    if (h->lock_timeout_us > LOCK_TIMEOUT_US && h->lock_timeout_us < UINT64_MAX / 2)
        h->lock_timeout_us = LOCK_TIMEOUT_US; /* who asks to wait for long waits for long */
    if (choose(in, 4))
        h->checksum = sc_checksum(h);
    tell("  lanes %u slots %u regions %u capacity %llu block_size %llu checksum %d", h->lanes, h->slots, h->regions,
         (unsigned long long)h->capacity, (unsigned long long)h->block_size, h->checksum != checksum);
    if (h->checksum == checksum)
        return; /* nobody may come, or nothing that counts was changed */
    struct sc_geometry g;
    if (sc_plan(h->capacity, h->block_size, h->slots, h->lanes, h->regions, &g) < 0 || g.segment_bytes > MOST)
        return;
    if (g.segment_bytes != w->bytes && !choose(in, 4))
        return; /* a file of another size than it says */
    if (ftruncate(w->fd, (off_t)g.segment_bytes) < 0)
        fail("no room for a file");
    munmap(w->map, w->bytes);
    w->g = g;
    w->bytes = g.segment_bytes;
    w->map = mmap(NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, w->fd, 0);
    if (w->map == MAP_FAILED)
        fail("no mapping");
    w->calm = true;
    memset(w->touched, 0, sizeof w->touched);
    for (uint32_t v = 0; v < w->version_count; v++)
        w->versions[v] = (struct version){.key = KEYS};
}

/* The file is cut, or made longer, under everybody. Who looks at the payload, or writes into it, by himself dies of it, and
 * so nobody does from here on. */
static void cut(struct world *w, struct input *in)
{
    const uint64_t ends[] = {0, 1, 4096, w->g.layout_table, w->g.slot_table + 8, w->g.shares, w->g.index, w->g.owners,
                             w->g.metadata - 1, w->g.metadata, w->g.payload, w->g.payload + BLOCK, w->bytes - 1};
    uint64_t end = ends[choose(in, sizeof ends / sizeof *ends)];
    if (choose(in, 4) == 0)
        end = w->bytes + choose(in, 8192);
    tell("  the file ends at %llu", (unsigned long long)end);
    w->truncated = true;
    if (ftruncate(w->fd, (off_t)end) < 0)
        fail("cannot cut the file");
}

/* The two maps, each other's witness, say both that a block in use is free. */
static bool maps_conspire(const struct world *w)
{
    for (uint32_t slot = 0; slot < w->g.slots; slot++) {
        const struct sc_slot *r = (const struct sc_slot *)(w->map + slot_word(w, slot, 0));
        uint64_t block = sc_peek32(&r->block), blocks = (sc_peek(&r->nbytes) + w->g.block_size - 1) / w->g.block_size;
        for (uint64_t b = block; sc_state_of(sc_peek(&r->state)) && b < block + blocks && b < all_blocks(&w->g); b++)
            if (!(word_at(w, w->g.block_map + b / 64 * 8) >> b % 64 & 1) &&
                sc_peek32((const sc_half *)(w->map + w->g.owners) + b) == 0) /* nobody's */
                return true;
    }
    return false;
}

void damage(struct world *w, struct input *in)
{
    if (w->truncated)
        return;
    switch (choose(in, 13)) {
    case 0: case 1: damage_slots(w, in); break;
    case 2: damage_index(w, in); break;
    case 3: damage_lock(w, in); break;
    case 4: damage_shares(w, in); break;
    case 5: damage_range(w, in); break;
    case 6:
        if (!w->concurrent && !w->forged)
            forge(w, in);
        break;
    case 7:
        if (!w->concurrent && choose(in, 4) == 0)
            cut(w, in);
        break;
    case 8: damage_regions(w, in); break;
    default: damage_one(w, in, choose(in, PARTS));
    }
    w->unsure = w->unsure || (!w->truncated && maps_conspire(w));
}
