#include "neighbour_act.h"

static uint32_t owner_of(const struct region *r) { return (uint32_t)(r->state >> 16 & 0xffff); }

static bool own(const struct act *a, uint32_t region)
{
    const struct region *r = &a->before->regions[region];
    return sc_kind_of(r->state) == SC_REGION_LIVE && owner_of(r) == a->n->s->lane;
}

bool owns_region(const struct act *a)
{
    bool any = false;
    for (uint32_t region = 1; region <= REGIONS; region++)
        any = any || own(a, region);
    return any;
}

static uint32_t some_region(struct act *a, bool (*fits)(const struct act *, uint32_t))
{
    uint32_t from = (uint32_t)(random_of(&a->n->seed) % REGIONS);
    for (uint32_t i = 0; fits && i < REGIONS; i++)
        if (fits(a, 1 + (from + i) % REGIONS))
            return 1 + (from + i) % REGIONS;
    return 1 + from;
}

void act_region_add(struct act *a)
{
    bool none = false;
    for (uint32_t region = 1; region <= REGIONS; region++)
        none = none || sc_kind_of(a->before->regions[region].state) == SC_REGION_NONE;
    a->may.added = 0;
    a->may.reaps = a->may.sweeps = true;
    a->n->rc = do_add_region(a->n->s);
    if (refused(a, a->lock_busy))
        return;
    facts_read(a->n->w, &a->after);
    want(a, a->n->rc > 0 || (a->n->rc == SC_E_REGIONS && !none), "there is a free number");
    want(a, a->n->rc < 0 || a->after.regions[a->n->rc].lives, "it does not live");
}

void act_region_give_up(struct act *a)
{
    uint32_t region = some_region(a, own);
    bool owned = own(a, region);
    a->may.given_up = owned ? (int)region : -1;
    a->may.sweeps = true;
    a->n->rc = sc_region_give_up(a->n->s, region);
    if (refused(a, a->lock_busy))
        return;
    want(a, a->n->rc == (owned ? SC_OK : SC_NOT_OWNER), "given up or not, against its owner");
    facts_read(a->n->w, &a->after);
    for (int slot = 0; owned && slot < SLOTS; slot++) {
        const struct object *o = &a->after.slots[slot];
        want(a, !has_object(o) || o->region != region || protected(a, slot), "an object stays for nobody in what was given up");
    }
}

void act_region_opened(struct act *a)
{
    uint32_t region = some_region(a, NULL);
    const struct region *r = &a->before->regions[region];
    uint32_t generation = (uint32_t)(r->state >> 32) - (random_of(&a->n->seed) % 4 == 0);
    bool open = random_of(&a->n->seed) % 2, same = r->state >> 32 == generation;
    bool was = r->opened >> a->n->s->lane & 1, is = open ? was || (same && r->lives) : was && !same;
    a->may.opened = (int)region;
    a->n->rc = sc_region_opened(a->n->s, region, generation, open);
    facts_read(a->n->w, &a->after);
    want(a, a->n->rc == (same && r->lives ? SC_OK : SC_LOST), "open or lost, against its state");
    want(a, (a->after.regions[region].opened >> a->n->s->lane & 1) == is, "said to be open or not, against what was said");
}

void act_region_check(struct act *a)
{
    uint32_t region = some_region(a, NULL);
    const struct region *r = &a->before->regions[region];
    struct sc_region_info info;
    a->n->rc = sc_region_check(a->n->s, region);
    want(a, a->n->rc == (r->lives ? SC_OK : SC_LOST), "lives or not, against its state");
    want(a, sc_get_region(a->n->s, region, &info) == 0, "it cannot be described");
    /* While one is written or goes, its state is what counts. */
    bool none = sc_kind_of(r->state) == SC_REGION_NONE;
    want(a, info.state == (none ? SC_REGION_NONE : r->lives ? SC_REGION_LIVE : SC_REGION_LOST), "described as it is not");
    want(a, none || (info.generation == r->state >> 32 && info.owner == owner_of(r) && info.blocks == REGION_BLOCKS &&
                     info.handle[63] == 0x48),
         "described as another");
}

static bool may_be_lost(const struct act *a, uint32_t region)
{
    const struct region *was = &a->before->regions[region];
    return a->may.given_up == (int)region || (a->may.reaps && !was->lives);
}

static bool region_may_change(const struct act *a, uint32_t region)
{
    const struct region *was = &a->before->regions[region], *is = &a->after.regions[region];
    enum sc_region_kind from = sc_kind_of(was->state), to = sc_kind_of(is->state);
    bool same = was->state >> 32 == is->state >> 32, swept = a->may.reaps || a->may.sweeps || a->may.settles;
    if (to == SC_REGION_LIVE) /* what was there may have gone before */
        return a->may.added == 0 && is->lives && owner_of(is) == a->n->s->lane && is->state >> 32 == (was->state >> 32) + 1 &&
               (from == SC_REGION_NONE || !was->lives);
    if (to == SC_REGION_LOST)
        return same && may_be_lost(a, region);
    return same && swept && (from == SC_REGION_LOST || may_be_lost(a, region));
}

static bool opened_may_change(const struct act *a, uint32_t region)
{
    const struct region *was = &a->before->regions[region], *is = &a->after.regions[region];
    bool good = true;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        bool own = lane == a->n->s->lane, of_the_dead = was->opened >> lane & 1 && !alive(a->n, lane) && a->may.reaps;
        bool forgotten = was->opened >> lane & 1 && a->may.added == 0 && sc_kind_of(was->state) == SC_REGION_NONE;
        if ((was->opened ^ is->opened) >> lane & 1)
            good = good && ((own && a->may.opened == (int)region) || of_the_dead || forgotten);
    }
    return good;
}

void check_regions_frame(struct act *a)
{
    for (uint32_t region = 1; region <= REGIONS; region++) {
        const struct region *was = &a->before->regions[region], *is = &a->after.regions[region];
        if ((was->state != is->state && !region_may_change(a, region)) || !opened_may_change(a, region))
            found(a->r, "neighbour in lane %u, %s: region %u %llx -> %llx, open in %llx -> %llx", a->n->s->lane, a->n->did, region,
                  (unsigned long long)was->state, (unsigned long long)is->state, (unsigned long long)was->opened,
                  (unsigned long long)is->opened);
    }
}
