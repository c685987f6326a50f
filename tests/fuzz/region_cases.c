/* region_cases.c - damage to regions of device memory: handle 0 owns regions 1 and 2, and A lies in the first. */
#include "cases.h"

static uint64_t region_at(const struct world *w, uint32_t region, uint64_t field)
{
    return w->g.region_table + (region - 1) * sizeof(struct sc_region) + field;
}
#define REGION(region, field) region_at(w, region, offsetof(struct sc_region, field))

static uint32_t two_regions(struct world *w)
{
    struct batch b;
    if (region_add(w, 0, REGION_BYTES) != 1 || region_add(w, 0, REGION_BYTES) != 2)
        fail("no regions");
    reserve_in(w, 0, A, &b, true, 1, 1);
    publish(w, &b);
    expect(w, 1, A, SC_OK);
    return b.refs[0].slot;
}

/* What was lost for damage can be had again once it is rebuilt. */
static void have_again(struct world *w, uint32_t region)
{
    rebuild(w, 0);
    if (region_add(w, 0, REGION_BYTES) != region)
        fail("region %u cannot be had again", region);
    rebuild(w, 0);
}

void region_larger_than_it_is(struct world *w)
{
    struct sc_ref ref = {0};
    two_regions(w);
    set32(w, REGION(1, block_shift), 3);
    if (try_reserve(w, 0, B, 1, 1, &ref) != 0 || ref.status != SC_LOST)
        fail("%llu bytes at %llu of a region that is none", (unsigned long long)ref.nbytes, (unsigned long long)ref.offset);
    have_again(w, 1);
}

void region_of_endless_blocks(struct world *w)
{
    struct sc_region_info info;
    two_regions(w);
    set32(w, REGION(1, blocks), UINT32_MAX);
    set32(w, REGION(1, block_shift), UINT32_MAX);
    if (sc_get_region(w->handles[1], 1, &info) != SC_E_DAMAGED || info.blocks)
        fail("%u blocks", info.blocks);
    expect(w, 1, A, SC_LOST);
    have_again(w, 1);
}

void object_of_another_region(struct world *w)
{
    uint32_t slot = two_regions(w);
    set32(w, FIELD(slot, block), (uint32_t)(word_at(w, FIELD(slot, about)) >> 32) + BLOCKS);
    expect(w, 1, A, SC_NOT_FOUND);
    rebuild(w, 0);
}

void object_of_no_region(struct world *w)
{
    static const uint32_t blocks[] = {3 * BLOCKS, 31 * BLOCKS, UINT32_MAX};
    for (uint32_t i = 0; i < 3; i++) {
        struct batch b;
        reserve(w, 0, B, &b, true);
        publish(w, &b);
        set32(w, FIELD(b.refs[0].slot, block), blocks[i]);
        expect(w, 1, B, SC_NOT_FOUND);
        rebuild(w, 0);
    }
}

void region_of_no_kind(struct world *w)
{
    two_regions(w);
    set(w, REGION(1, state), (word_at(w, REGION(1, state)) & ~UINT64_C(0xffff)) | 7);
    expect(w, 1, A, SC_LOST);
    have_again(w, 1);
}

void region_of_an_owner_that_cannot_be(struct world *w)
{
    struct sc_region_info info;
    two_regions(w);
    set(w, REGION(1, state), word_at(w, REGION(1, state)) | UINT64_C(0xffff0000));
    expect(w, 1, A, SC_LOST);
    sc_get_region(w->handles[1], 1, &info);
    if (sc_region_give_up(w->handles[0], 1) != SC_NOT_OWNER)
        fail("given up");
    have_again(w, 1);
}

/* Its memory is freed: one bit must not bring it back. */
void region_said_to_live_again(struct world *w)
{
    struct sc_ref ref = {0};
    struct sc_region_info info;
    two_regions(w);
    if (sc_region_give_up(w->handles[0], 1) != SC_OK || sc_kind_of(word_at(w, REGION(1, state))) != SC_REGION_NONE)
        fail("not given up");
    set(w, REGION(1, state), word_at(w, REGION(1, state)) | SC_REGION_LIVE);
    if (sc_get_region(w->handles[1], 1, &info) != SC_E_DAMAGED)
        fail("its handle is told");
    if (try_reserve(w, 0, B, 1, 1, &ref) != 0 || ref.status != SC_LOST)
        fail("status %d", ref.status);
    have_again(w, 1);
}

/* The number of its region is another region's by now, and the record has not changed. */
void object_of_an_earlier_region(struct world *w)
{
    two_regions(w);
    set(w, REGION(1, state), word_at(w, REGION(1, state)) & ~UINT64_C(0xffff));
    if (region_add(w, 0, REGION_BYTES) != 1)
        fail("its number is not free");
    expect(w, 1, A, SC_NOT_FOUND);
    rebuild(w, 0);
}

void region_opened_by_all(struct world *w)
{
    struct sc_region_info info;
    two_regions(w);
    for (uint64_t i = 0; i < 4; i++)
        set(w, REGION(1, opened) + 8 * i, UINT64_MAX);
    if (sc_get_region(w->handles[1], 1, &info) != 0 || info.opened[0] != 3 || info.opened[1] || info.opened[3])
        fail("open in lanes %llx", (unsigned long long)info.opened[0]);
}

void region_with_false_counts(struct world *w)
{
    static const uint32_t counts[] = {0, BLOCKS, UINT32_MAX};
    struct sc_ref ref = {0};
    two_regions(w);
    for (uint32_t i = 0; i < 3; i++) {
        set32(w, REGION(1, free_blocks), counts[i]);
        set32(w, REGION(1, block_cursor), counts[i]);
        if (try_reserve(w, 0, B + i, 1, 1, &ref) == 1)
            check_ref(w, w->handles[0], &ref);
        rebuild(w, 0);
    }
}
