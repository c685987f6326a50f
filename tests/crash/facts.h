/* facts.h - what the bytes of an arena say, read without the core; and what may be said after a death.
 *
 * An operation is rehearsed in private first. So before and after are known, and each death between them must leave:
 *
 *   READY before and after             readable, whole (a temporary object goes with its last share)
 *   READY before or after, not both    readable and whole, or not there
 *   a survivor's write                 still its own, as before or as after
 *   any other key                      not there
 *   in a region whose owner does not live                          lost: there as long as a survivor has a share
 *   a share word of a survivor, or of a rank that has not come     as before or as after
 *   a share word of the dead           no share
 */
#ifndef CRASH_FACTS_H
#define CRASH_FACTS_H

#include "world.h"

struct object {
    uint64_t state;        /* the state word */
    int key;               /* -1: none of ours */
    uint64_t block, nbytes, lease_until_us;
    int64_t version;       /* -1: not whole */
    uint32_t writers, region;
};

struct region {
    uint64_t state, seal, opened;
    uint32_t incarnation, free_blocks;
    bool lives;                       /* nobody has given it up, and its owner lives */
};

struct facts {
    struct object slots[SLOTS];
    struct region regions[REGIONS + 1]; /* 0: the host's */
    int slot_of[KEYS];                /* in any state but FREE or detached; -1: nowhere */
    uint64_t words[LANES][SLOTS];     /* share words of the slots' generations; 0: no share, no part in a write */
    uint64_t incarnations[LANES], reaped[LANES];
    bool kept[LANES];                 /* a rank's of g, which has live members: nobody else may have the lane */
    bool unused[LANES];               /* it has no role, and nothing is left to reap */
    bool retired;
    uint64_t index_seq, lock;
};

void facts_read(const struct world *w, struct facts *f);
void facts_read_at(const struct world *w, const uint8_t *base, struct facts *f);
/* Which regions live if `but` does not. */
void facts_without(struct facts *f, const struct identity *who, enum seat but);
/* EVICTING counts as READY: its evictor is dead, or lets a reader call it off. */
bool readable(const struct facts *f, int key);
/* It would be readable, but for its region. */
bool lost(const struct facts *f, int key);
bool has_object(const struct object *o);
/* Several lanes fill the slot together, and none of them has sealed it. */
bool together(const struct facts *f, uint32_t slot);
/* The lane has a part in the slot's write that is not done; or is the only writer. */
bool fills(const struct facts *f, uint32_t slot, uint32_t lane);
uint32_t parts_done(const struct facts *f, uint32_t slot);

enum need { ABSENT, MAY, MUST };

struct expectation {
    enum need need[KEYS];
    int64_t versions[KEYS][2];            /* of before and after; -1 */
    uint64_t writes[SLOTS][2];            /* an only writer that survives: the state word before, after; 0 */
    struct facts before, after;
    bool survives[LANES];                 /* its process lives, or it is set aside for a rank that has not come */
};

/* but: the seat that dies. */
void expect(const struct facts *before, const struct facts *after, const struct identity *who, enum seat but,
            struct expectation *e);

/* What was found wrong, in words. */
struct report { int findings; uint32_t used; char text[4000]; };
void found(struct report *r, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
