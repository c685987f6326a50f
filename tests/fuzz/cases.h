/* cases.h - what scripted cases are made of; handle 0 is in no group, handle 1 is a rank of "engine". */
#ifndef FUZZ_CASES_H
#define FUZZ_CASES_H

#include "fuzz.h"

enum { A, B, C, D, E }; /* keys */
enum { BYTES = 2 * BLOCK, REGION_BYTES = 8 * BLOCK };

static inline uint64_t field(const struct world *w, uint32_t slot, uint64_t offset)
{
    return w->g.slot_table + slot * sizeof(struct sc_slot) + offset;
}
#define FIELD(slot, name) field(w, slot, offsetof(struct sc_slot, name))
#define HEADER(name) offsetof(struct sc_header, name)

static inline void set32(struct world *w, uint64_t offset, uint32_t value) { sc_poke32((sc_half *)(w->map + offset), value); }
static inline void set(struct world *w, uint64_t offset, uint64_t value) { sc_poke((sc_word *)(w->map + offset), value); }

/* What fails but must not, or does not and must, ends the program. */
void expect(struct world *w, int h, uint32_t key, enum sc_status status);
int64_t try_reserve(struct world *w, int h, uint32_t key, uint32_t region, uint32_t writers, struct sc_ref *ref);
void reserve_in(struct world *w, int h, uint32_t key, struct batch *b, bool fills, uint32_t region, uint32_t writers);
void reserve(struct world *w, int h, uint32_t key, struct batch *b, bool fills);
void publish(struct world *w, struct batch *b);
/* After it nothing contradicts itself. */
void rebuild(struct world *w, int h);

/* region_cases.c */
void region_larger_than_it_is(struct world *w);
void region_of_endless_blocks(struct world *w);
void object_of_another_region(struct world *w);
void object_of_no_region(struct world *w);
void region_of_no_kind(struct world *w);
void region_of_an_owner_that_cannot_be(struct world *w);
void region_said_to_live_again(struct world *w);
void object_of_an_earlier_region(struct world *w);
void region_opened_by_all(struct world *w);
void region_with_false_counts(struct world *w);

#endif
