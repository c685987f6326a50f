#define _GNU_SOURCE
#include "block.h"

#include <errno.h>
#include <fcntl.h>

static bool bit(const sc_word *map, uint64_t i) { return sc_peek(map + i / 64) >> (i % 64) & 1; }

static void set_bits(sc_word *map, uint64_t at, uint64_t n, bool on)
{
    for (uint64_t i = at; i < at + n;) {
        uint64_t upto = (i / 64 + 1) * 64 < at + n ? (i / 64 + 1) * 64 : at + n, width = upto - i;
        uint64_t mask = (width == 64 ? ~UINT64_C(0) : (UINT64_C(1) << width) - 1) << (i % 64);
        uint64_t old = sc_peek(map + i / 64);
        sc_poke(map + i / 64, on ? old | mask : old & ~mask);
        i = upto;
    }
}

/* The first bit at or after i that is `on`, else end. */
static uint64_t next_bit(const sc_word *map, uint64_t i, uint64_t end, bool on)
{
    while (i < end) {
        uint64_t word = sc_peek(map + i / 64);
        word = (on ? word : ~word) >> (i % 64);
        if (word) {
            i += (uint64_t)__builtin_ctzll(word);
            return i < end ? i : end;
        }
        i = (i / 64 + 1) * 64;
    }
    return end;
}

static uint64_t find_run(const sc_word *map, uint64_t from, uint64_t end, uint64_t n)
{
    for (uint64_t i = from; (i = next_bit(map, i, end, false)) + n <= end;) {
        uint64_t used = next_bit(map, i, i + n, true);
        if (used == i + n)
            return i;
        i = used;
    }
    return SC_NO_SLOT;
}

/* Among the bits first .. end - 1. */
static uint32_t find(const sc_word *map, uint64_t first, uint64_t end, sc_half *cursor, uint32_t n)
{
    uint64_t from = sc_peek32(cursor), at;
    if (from < first || from >= end)
        from = first;
    at = find_run(map, from, end, n);
    if (at == SC_NO_SLOT)
        at = find_run(map, first, from + n - 1 < end ? from + n - 1 : end, n);
    if (at != SC_NO_SLOT)
        sc_poke32(cursor, (uint32_t)(at + n));
    return (uint32_t)at;
}

uint32_t sc_block_find(struct sc_segment *s, uint32_t region, uint32_t n)
{
    if (sc_peek32(sc_free_blocks(s, region)) < n)
        return SC_NO_SLOT;
    struct sc_extent e = sc_extent_of(s, region);
    return find(sc_block_map(s), e.first, e.first + e.blocks, sc_block_cursor(s, region), n);
}

uint32_t sc_block_grow(const struct sc_segment *s, uint32_t block, uint32_t blocks, uint32_t n)
{
    struct sc_extent e = sc_extent_of(s, sc_region_of(s, block));
    uint64_t first = block, end = (uint64_t)block + blocks;
    while (end - first < n && end < e.first + e.blocks && !sc_block_used(s, (uint32_t)end))
        end++;
    while (end - first < n && first > e.first && !sc_block_used(s, (uint32_t)first - 1))
        first--;
    return end - first >= n ? (uint32_t)first : SC_NO_SLOT;
}

static void set_owner(struct sc_segment *s, uint32_t block, uint32_t n, uint32_t slot)
{
    for (uint32_t b = block; b < block + n; b++)
        sc_poke32(sc_owner(s, b), slot + 1); /* of SC_NO_SLOT: 0 */
}

uint32_t sc_block_owner(const struct sc_segment *s, uint32_t block) { return sc_peek32(sc_owner(s, block)) - 1; }

bool sc_block_unowned(const struct sc_segment *s, uint32_t block, uint32_t n)
{
    for (uint32_t b = block; b < block + n; b++)
        if (sc_block_owner(s, b) != SC_NO_SLOT)
            return false;
    return true;
}

void sc_block_use(struct sc_segment *s, uint32_t block, uint32_t n, uint32_t slot)
{
    set_bits(sc_block_map(s), block, n, true);
    set_owner(s, block, n, slot);
    sc_half *count = sc_free_blocks(s, sc_region_of(s, block));
    sc_poke32(count, sc_peek32(count) - n);
}

void sc_block_free(struct sc_segment *s, uint32_t block, uint32_t n)
{
    set_owner(s, block, n, SC_NO_SLOT);
    set_bits(sc_block_map(s), block, n, false);
    uint32_t region = sc_region_of(s, block);
    sc_half *count = sc_free_blocks(s, region);
    if (sc_peek32(count) == 0) /* the only free ones: no search past the used */
        sc_poke32(sc_block_cursor(s, region), block);
    sc_poke32(count, sc_peek32(count) + n);
}

bool sc_block_used(const struct sc_segment *s, uint32_t block) { return bit(sc_block_map(s), block); }

uint32_t sc_slot_find(struct sc_segment *s)
{
    if (sc_peek32(&sc_header(s)->free_slots) == 0)
        return SC_NO_SLOT;
    return find(sc_slot_map(s), 0, s->g.slots, &sc_header(s)->slot_cursor, 1);
}

void sc_slot_use(struct sc_segment *s, uint32_t slot)
{
    set_bits(sc_slot_map(s), slot, 1, true);
    sc_half *count = &sc_header(s)->free_slots;
    sc_poke32(count, sc_peek32(count) - 1);
}

void sc_slot_free(struct sc_segment *s, uint32_t slot)
{
    set_bits(sc_slot_map(s), slot, 1, false);
    sc_half *count = &sc_header(s)->free_slots;
    if (sc_peek32(count) == 0)
        sc_poke32(&sc_header(s)->slot_cursor, slot);
    sc_poke32(count, sc_peek32(count) + 1);
}

bool sc_slot_used(const struct sc_segment *s, uint32_t slot) { return bit(sc_slot_map(s), slot); }

void sc_region_blocks_clear(struct sc_segment *s, uint32_t region)
{
    struct sc_extent e = sc_extent_of(s, region);
    set_bits(sc_block_map(s), e.first, e.blocks, false);
    set_owner(s, (uint32_t)e.first, (uint32_t)e.blocks, SC_NO_SLOT);
    sc_poke32(sc_free_blocks(s, region), (uint32_t)e.blocks);
    sc_poke32(sc_block_cursor(s, region), (uint32_t)e.first);
}

void sc_maps_clear(struct sc_segment *s)
{
    set_bits(sc_slot_map(s), 0, s->g.slots, false);
    sc_poke32(&sc_header(s)->free_slots, s->g.slots);
    sc_poke32(&sc_header(s)->slot_cursor, 0);
    for (uint32_t region = 0; region <= s->g.regions; region++)
        if (!region || sc_kind_of(sc_load(&sc_region(s, region)->state)) != SC_REGION_NONE)
            sc_region_blocks_clear(s, region);
}

static int allocate(struct sc_segment *s, uint64_t block, uint64_t n)
{
    off_t at = (off_t)(s->g.payload + block * s->g.block_size);
    while (fallocate(s->lock_fd, 0, at, (off_t)(n * s->g.block_size)) < 0)
        if (errno != EINTR)
            return SC_E_MEMORY;
    /* Several lanes may set bits of one word: or. A bit lost with its lane costs one more fallocate. */
    for (uint64_t b = block; b < block + n; b++)
        if (!bit(sc_backed(s), b))
            sc_or(sc_backed(s) + b / 64, UINT64_C(1) << (b % 64));
    return 0;
}

int sc_back(struct sc_segment *s, uint64_t block, uint64_t n)
{
    uint64_t end = block + n;
    while ((block = next_bit(sc_backed(s), block, end, false)) < end) {
        uint64_t upto = next_bit(sc_backed(s), block, end, true);
        /* None, where another writer of the same object was quicker between the two looks. */
        int rc = upto > block ? allocate(s, block, upto - block) : 0;
        if (rc < 0)
            return rc;
        block = upto;
    }
    return 0;
}
