/* deaths.h - one operation, one arena, a death at every instruction that changes shared memory. */
#ifndef CRASH_DEATHS_H
#define CRASH_DEATHS_H

#include "step.h"

/* The arena that is stepped in, another one for copies, and what is found. */
struct bench {
    struct world live, copy;
    struct stepper stepper;
    uint64_t seed;
};

struct result {
    const char *op, *state;
    uint64_t instructions, stops, distinct, checks;
    uint64_t index_rebuilds;              /* ... while the operation ran undisturbed; effects: what the core counted */
    uint64_t effects[SC_COUNTER_COUNT];
    int64_t rc;
    struct report report;
};

/* The operation done in private: what it gives, and what is there after it. */
void rehearse(struct bench *b, const struct scene *scene, const struct op *op, struct facts *after, struct result *r);

/* Each distinct image is handed to `each`, too, where one is given. */
typedef void (*each_image)(const struct bench *b, const struct scene *scene, const uint8_t *bytes, void *arg);
void run_deaths(struct bench *b, struct scene *scene, const struct op *op, each_image each, void *arg, struct result *r);

void print_result(const char *mode, const struct result *r);

/* A set of 64-bit hashes. */
struct seen { uint64_t *at; uint64_t mask, n; };
bool seen_before(struct seen *seen, uint64_t hash);
uint64_t hash_bytes(const uint8_t *bytes, uint64_t n);

#endif
