#include "facts.h"

#include <stdarg.h>

void found(struct report *r, const char *format, ...)
{
    va_list args;
    r->findings++;
    if (r->used + 2 >= sizeof r->text)
        return;
    va_start(args, format);
    int n = vsnprintf(r->text + r->used, sizeof r->text - r->used - 1, format, args);
    va_end(args);
    r->used += n > 0 ? (uint32_t)n : 0;
    if (r->used > sizeof r->text - 2)
        r->used = sizeof r->text - 2;
    r->text[r->used++] = '\n';
    r->text[r->used] = 0;
}

static int key_in(const struct sc_slot *r)
{
    for (int k = 0; k < KEYS && sc_key_bytes(sc_peek32(&r->about)) == KEY_BYTES; k++)
        if (memcmp((const void *)r->key, keys[k], KEY_BYTES) == 0)
            return k;
    return -1;
}

static void read_slot(const struct sc_geometry *g, const uint8_t *base, uint32_t slot, struct facts *f)
{
    const struct sc_slot *r = (const struct sc_slot *)(base + g->slot_table) + slot;
    struct object *o = &f->slots[slot];
    *o = (struct object){.state = sc_peek(&r->state), .key = -1, .version = -1};
    if (sc_state_of(o->state) == SC_FREE)
        return;
    o->key = key_in(r);
    o->block = sc_peek32(&r->block);
    o->region = o->block / BLOCKS <= REGIONS ? (uint32_t)(o->block / BLOCKS) : 0;
    o->nbytes = sc_peek(&r->nbytes);
    o->writers = sc_peek32(&r->writers);
    o->lease_until_us = sc_peek(&r->lease_until_us);
    bool fits = o->block * BLOCK_BYTES + o->nbytes <= BLOCKS * BLOCK_BYTES && o->nbytes >= 16;
    if (o->key >= 0 && o->region)
        o->version = device_version(o->block, o->nbytes, sc_generation(o->state));
    else if (o->key >= 0 && fits)
        o->version = content_version(base + g->payload + o->block * BLOCK_BYTES, (uint32_t)o->key, o->nbytes);
    if (o->key >= 0 && !(o->state & SC_DETACHED))
        f->slot_of[o->key] = (int)slot;
}

void facts_read(const struct world *w, struct facts *f) { facts_read_at(w, w->map, f); }

void facts_without(struct facts *f, const struct identity *who, enum seat but)
{
    f->regions[0].lives = true;
    for (uint32_t region = 1; region <= REGIONS; region++) {
        struct region *r = &f->regions[region];
        r->lives = false;
        for (int i = 0; i < SEATS; i++)
            r->lives = r->lives || (sc_kind_of(r->state) == SC_REGION_LIVE && who[i].alive && i != (int)but &&
                                    who[i].lane == (r->state >> 16 & 0xffff) && who[i].incarnation == r->incarnation);
    }
}

static void read_region(const struct sc_geometry *g, const uint8_t *base, uint32_t region, struct facts *f)
{
    const struct sc_region *r = (const struct sc_region *)(base + g->region_table) + (region - 1);
    f->regions[region] = (struct region){.state = sc_peek(&r->state), .seal = sc_peek(&r->seal), .opened = sc_peek(&r->opened[0]),
                                         .incarnation = sc_peek32(&r->incarnation), .free_blocks = sc_peek32(&r->free_blocks)};
}

void facts_read_at(const struct world *w, const uint8_t *base, struct facts *f)
{
    const struct sc_geometry *g = &w->g;
    const struct sc_lane *lanes = (const struct sc_lane *)(base + g->lane_table);
    for (int k = 0; k < KEYS; k++)
        f->slot_of[k] = -1;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        read_slot(g, base, slot, f);
    for (uint32_t region = 1; region <= REGIONS; region++)
        read_region(g, base, region, f);
    facts_without(f, w->who, SEATS);
    const struct sc_header *h = (const struct sc_header *)base;
    f->retired = sc_peek32(&h->retired);
    f->index_seq = sc_peek(&h->index_seq);
    f->lock = sc_peek(&h->lock);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        const sc_word *row = (const sc_word *)(base + g->shares + lane * g->share_stride);
        f->incarnations[lane] = sc_peek32(&lanes[lane].incarnation);
        f->reaped[lane] = sc_peek32(&lanes[lane].reaped);
        f->unused[lane] = sc_peek32(&lanes[lane].role) == SC_ROLE_NONE && f->reaped[lane] == f->incarnations[lane];
        f->kept[lane] = sc_peek32(&lanes[lane].role) == SC_ROLE_RANK && (char)sc_peek(&lanes[lane].group[0]) == 'g';
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            uint64_t word = sc_peek(&row[slot]), state = f->slots[slot].state;
            bool counts = sc_state_of(state) != SC_FREE && sc_generation(state) == sc_generation(word);
            f->words[lane][slot] = counts && (uint32_t)word ? word : 0;
        }
    }
}

bool has_object(const struct object *o)
{
    return sc_state_of(o->state) == SC_READY || sc_state_of(o->state) == SC_EVICTING;
}

static bool there(const struct facts *f, int key, bool lives)
{
    const struct object *o = f->slot_of[key] < 0 ? NULL : &f->slots[f->slot_of[key]];
    return o && has_object(o) && f->regions[o->region].lives == lives;
}

bool readable(const struct facts *f, int key) { return there(f, key, true); }
bool lost(const struct facts *f, int key) { return there(f, key, false); }

bool together(const struct facts *f, uint32_t slot)
{
    uint64_t state = f->slots[slot].state;
    return sc_state_of(state) == SC_WRITING && f->slots[slot].writers > 1 && !(state & SC_SEALED);
}

bool fills(const struct facts *f, uint32_t slot, uint32_t lane)
{
    uint64_t state = f->slots[slot].state;
    if (sc_state_of(state) != SC_WRITING)
        return false;
    return together(f, slot) ? sc_stage(f->words[lane][slot]) == SC_STAGE_WRITING : sc_owner_of(state) == lane;
}

uint32_t parts_done(const struct facts *f, uint32_t slot)
{
    uint32_t n = 0;
    for (uint32_t lane = 0; lane < LANES; lane++)
        n += sc_stage(f->words[lane][slot]) == SC_STAGE_DONE;
    return n;
}

static int64_t version_of(const struct facts *f, int key)
{
    return readable(f, key) ? f->slots[f->slot_of[key]].version : -1;
}

static bool same_object(const struct facts *a, const struct facts *b, int key)
{
    int slot = a->slot_of[key];
    return slot == b->slot_of[key] && sc_generation(a->slots[slot].state) == sc_generation(b->slots[slot].state);
}

static uint64_t survivors_write(const struct facts *f, uint32_t slot, const bool *alive)
{
    uint64_t state = f->slots[slot].state;
    bool writing = sc_state_of(state) == SC_WRITING && sc_owner_of(state) < LANES && alive[sc_owner_of(state)] &&
                   f->slots[slot].writers == 1;
    return writing ? state : 0;
}

void expect(const struct facts *before, const struct facts *after, const struct identity *who, enum seat but,
            struct expectation *e)
{
    bool alive[LANES] = {false};
    memset(e, 0, sizeof *e);
    e->before = *before;
    e->after = *after;
    facts_without(&e->before, who, but);
    facts_without(&e->after, who, but);
    for (int i = 0; i < SEATS; i++)
        if (who[i].alive && i != (int)but)
            alive[who[i].lane] = true;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        bool vacant = before->incarnations[lane] == before->reaped[lane] && after->incarnations[lane] == before->incarnations[lane];
        e->survives[lane] = alive[lane] || (vacant && before->kept[lane]);
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        e->writes[slot][0] = survivors_write(before, slot, alive);
        e->writes[slot][1] = survivors_write(after, slot, alive);
    }
    for (int k = 0; k < KEYS; k++) {
        bool first = readable(&e->before, k), last = readable(&e->after, k);
        e->versions[k][0] = version_of(&e->before, k);
        e->versions[k][1] = version_of(&e->after, k);
        e->need[k] = first && last && same_object(before, after, k) ? MUST : first || last ? MAY : ABSENT;
    }
}
