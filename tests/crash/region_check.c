#include "region_check.h"

static bool keeps(const struct object *o, uint64_t word)
{
    return sc_held(word) || (sc_reserved(word) && o->lease_until_us > sc_now_us());
}

/* Objects of a region that does not live stay as long as somebody who does has a share, and no longer. */
static void check_objects(const struct death *d, const struct facts *left, const struct facts *now, struct report *r)
{
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        const struct object *was = &left->slots[slot], *is = &now->slots[slot];
        if (!has_object(was) || left->regions[was->region].lives)
            continue;
        bool kept = false, stays = has_object(is) && sc_generation(was->state) == sc_generation(is->state);
        for (uint32_t lane = 0; lane < LANES; lane++)
            kept = kept || (d->e->survives[lane] && keeps(was, left->words[lane][slot]));
        if (kept != stays)
            found(r, "slot %u, in region %u, which is lost, %s after recovery", slot, was->region,
                  stays ? "is there for nobody" : "is gone, and a survivor has a share");
    }
}

static bool opened_by_the_living(const struct world *w, const struct region *region)
{
    bool any = false;
    for (int i = 0; i < SEATS; i++)
        any = any || (w->who[i].alive && region->opened >> w->who[i].lane & 1);
    return any;
}

static bool used(const struct facts *f, uint32_t region)
{
    bool any = false;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        any = any || (sc_state_of(f->slots[slot].state) != SC_FREE && f->slots[slot].region == region);
    return any;
}

static void check_region(const struct world *w, const struct facts *left, const struct facts *now, uint32_t region,
                         struct report *r)
{
    const struct region *was = &left->regions[region], *is = &now->regions[region];
    enum sc_region_kind kind = sc_kind_of(is->state);
    bool needed = used(now, region) || opened_by_the_living(w, is);
    if (was->lives ? was->state != is->state || was->seal != is->seal || was->incarnation != is->incarnation || !is->lives
                   : kind != (needed ? SC_REGION_LOST : SC_REGION_NONE))
        found(r, "region %u: %llx -> %llx, %s, %s", region, (unsigned long long)was->state, (unsigned long long)is->state,
              was->lives ? "its owner lives" : "its owner does not live", needed ? "in use" : "not in use");
    for (int i = 0; i < SEATS; i++)
        if (w->who[i].alive && i != C && (was->opened ^ is->opened) >> w->who[i].lane & 1)
            found(r, "region %u: opened by %llx, and then by %llx", region, (unsigned long long)was->opened,
                  (unsigned long long)is->opened);
}

void check_regions(const struct world *w, const struct death *d, const struct facts *left, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    check_objects(d, left, &now, r);
    for (uint32_t region = 1; region <= REGIONS; region++)
        check_region(w, left, &now, region, r);
}

void check_nothing_stays(const struct world *w, const char *when, struct report *r)
{
    struct facts now;
    facts_read(w, &now);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        const struct object *o = &now.slots[slot];
        bool given_up = o->region && sc_kind_of(now.regions[o->region].state) != SC_REGION_LIVE, shared = false;
        for (uint32_t lane = 0; lane < LANES; lane++)
            shared = shared || now.words[lane][slot];
        if (given_up && has_object(o) && !shared)
            found(r, "slot %u, in region %u, which was given up, is there for nobody %s", slot, o->region, when);
    }
}

void fill_regions(struct world *w, struct sc_segment *s, struct report *r)
{
    for (uint32_t region = 1; region <= REGIONS; region++) {
        int64_t number = do_add_region(s);
        struct sc_ref ref = do_write_in(s, region, region, REGION_BLOCKS * BLOCK_BYTES), read;
        int status = ref.status == SC_OK ? do_publish(s, &ref, 0) : ref.status;
        if (number != region || status != SC_OK || ref.region != region || ref.offset != 0)
            found(r, "filling region %u: its number is %lld, status %d", region, (long long)number, status);
        else if (do_read(s, region, 0, &read) != SC_OK || version_at(w, region, &read) != version_at(w, region, &ref))
            found(r, "filling region %u: the object is not there", region);
        else if (sc_release(s, &read, 1) != 1 || do_write_in(s, region, 0, (REGION_BLOCKS + 1) * BLOCK_BYTES).status != SC_NO_SPACE)
            found(r, "filling region %u: there is room for more", region);
    }
    int64_t more = do_add_region(s);
    if (more != SC_E_REGIONS)
        found(r, "one region more than there can be: %lld", (long long)more);
}
