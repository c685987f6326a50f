#include "ghost.h"

enum { GHOSTS = 16, EPOCHS = 64, LIFE = 8 };
#define TAG_MASK UINT32_C(0xffffff00)

/* The line and the tag take other bits of the hash. */
static sc_half *line_of(const struct sc_segment *s, uint64_t hash)
{
    return sc_ghost_table(s) + ((hash & UINT32_MAX) * s->g.ghost_lines >> 32) * GHOSTS;
}
static uint32_t tag_of(uint64_t hash) { return (uint32_t)(hash >> 32) & TAG_MASK; }

static uint32_t epoch(const struct sc_segment *s) { return (uint32_t)(sc_peek(&sc_header(s)->ghosts) / s->g.slots) % EPOCHS; }

/* In epochs; of none EPOCHS, more than any has. */
static uint32_t age(uint32_t ghost, uint32_t now) { return ghost ? (now - (ghost >> 2)) % EPOCHS : EPOCHS; }

/* The key's ghost, also one that is over, or else the oldest of its line. */
static sc_half *find(const struct sc_segment *s, uint64_t hash)
{
    sc_half *line = line_of(s, hash), *oldest = line;
    uint32_t now = epoch(s);
    for (sc_half *ghost = line; ghost < line + GHOSTS; ghost++) {
        uint32_t word = sc_peek32(ghost);
        if (word && (word & TAG_MASK) == tag_of(hash))
            return ghost;
        if (age(word, now) > age(sc_peek32(oldest), now))
            oldest = ghost;
    }
    return oldest;
}

uint32_t sc_ghost_count(const struct sc_segment *s, uint64_t hash)
{
    uint32_t word = sc_peek32(find(s, hash));
    return (word & TAG_MASK) == tag_of(hash) && age(word, epoch(s)) <= LIFE ? word & 3 : 0;
}

void sc_ghost_remember(struct sc_segment *s, uint64_t hash, uint32_t count)
{
    sc_word *ghosts = &sc_header(s)->ghosts;
    sc_poke32(find(s, hash), tag_of(hash) | epoch(s) << 2 | (count & 3));
    sc_poke(ghosts, sc_peek(ghosts) + 1);
}
