/* ops.h - what can be done to an arena, and the arenas it is done to. */
#ifndef CRASH_OPS_H
#define CRASH_OPS_H

#include "check.h"

/* The moment before an operation. */
struct scene {
    struct snapshot *start;
    struct member member;            /* of S */
    struct sc_ref refs[4];           /* what S has in hand */
    uint32_t refs_n;
    uint32_t region, key;            /* a region that it is about; the key of an object there */
    /* Keys that it is about: readable; readable and nobody's; A's write, D's, S's. One that nobody has, where there is none. */
    const char *readable, *free, *written, *abandoned, *own;
};

enum { MAX_STATUS = 8 };

/* What the operation said. phase: 1 while it runs, 2 after it. */
struct outcome {
    volatile int phase;
    int64_t rc;
    int8_t status[MAX_STATUS];
    struct sc_ref refs[MAX_STATUS];
    uint32_t refs_n;
    bool reads, releases;            /* refs are shares that it took; the scene's refs are what it gave back */
};

struct call {
    struct world *w;                 /* its map is for the payload */
    struct sc_segment *s;
    const struct scene *scene;
    struct outcome *out;
};

/* S joins itself; takes or leaves locks of the file; fills payload; grants. It is about regions; it is done where there are
 * regions, too. */
enum { OP_JOINS = 1, OP_LOCKS = 2, OP_FILLS = 4, OP_GRANTS = 8, OP_REGIONS = 16, OP_THERE_TOO = 32 };

struct op {
    const char *name;
    int flags;
    /* What S (and others) did before; false: the operation makes no sense in this state. */
    bool (*prepare)(struct world *w, struct scene *scene);
    void (*run)(struct call *c);
};

struct state {
    const char *name;
    void (*build)(struct world *w);
    bool regions;                    /* there are some */
};

extern const struct op ops[];
extern const uint32_t ops_n;
extern const struct state states[];
extern const uint32_t states_n;

/* The index-th key that can be read and, where free is set, that nobody has a share of; -1. */
int ready_key(const struct world *w, int index, bool free);

/* The operation's start in a state; false: it makes no sense there. */
bool scene_make(struct world *w, const struct state *state, const struct op *op, struct scene *scene);
void scene_free(struct scene *scene);

#endif
