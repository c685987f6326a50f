/* limits.c - what a key costs at least, whoever keeps it: the loops that no core of this design can beat.
 *
 * A table as the core has one (slots of 128 bytes, an index of four words or more a slot, a row of share words), in this
 * process's own memory, and over it, for batches of keys, nothing but what cannot be left out: hash the key, find its
 * index word, compare the key; change the share word by a sequentially consistent compare-and-swap and look at the
 * state word afterwards. No leases, recency, statistics, checks, statuses, locks or damage. Memory is fetched ahead as the
 * core does. cost_limits.py compiles this file with cffi's declarations and calls it.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { WORDS = 4, BATCH = 256, PAGE = 4096 }; /* 32 bytes a key */

struct slot { _Atomic uint64_t state; uint64_t key[WORDS], rest[11]; };
_Static_assert(sizeof(struct slot) == 128, "two cache lines, as in the core");

struct limit { uint64_t mask; struct slot *slots; uint64_t *index; _Atomic uint64_t *shares; };

static uint64_t mix(uint64_t a, uint64_t b)
{
    __uint128_t p = (__uint128_t)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

static uint64_t hash_of(const uint64_t *key)
{
    uint64_t h = mix(key[0] ^ UINT64_C(0xa0761d6478bd642f), key[1]);
    return mix(key[2] ^ UINT64_C(0xe7037ed1a0b428db), key[3] ^ h);
}

/* The low half of the hash is the position, the high half goes with the slot's number into the index word. */
static uint64_t word_of(uint64_t hash, uint32_t slot) { return (hash & ~UINT64_C(0xffffffff)) | (slot + 1); }

static uint32_t find(const struct limit *t, const uint64_t *key, uint64_t hash)
{
    for (uint64_t at = hash & t->mask; t->index[at]; at = (at + 1) & t->mask) {
        uint32_t slot = (uint32_t)t->index[at] - 1;
        if (!((t->index[at] ^ hash) >> 32) && !memcmp(t->slots[slot].key, key, sizeof t->slots[slot].key))
            return slot;
    }
    return UINT32_MAX;
}

void limit_close(struct limit *t)
{
    if (!t)
        return;
    free(t->slots);
    free(t->index);
    free(t->shares);
    free(t);
}

/* A table of n different keys in random order; NULL without memory for it. */
struct limit *limit_open(const char *keys, uint32_t n)
{
    struct limit *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    for (t->mask = 1; t->mask < 4 * (uint64_t)n; t->mask *= 2)
        ;
    t->slots = aligned_alloc(sizeof *t->slots, n * sizeof *t->slots);
    t->index = calloc(t->mask, sizeof *t->index);
    t->shares = calloc(n, sizeof *t->shares);
    if (!t->slots || !t->index || !t->shares) {
        limit_close(t);
        return NULL;
    }
    t->mask--;
    memset(t->slots, 0, n * sizeof *t->slots);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(t->slots[i].key, keys + i * sizeof t->slots[i].key, sizeof t->slots[i].key);
        atomic_store(&t->shares[i], 1); /* touched */
        uint64_t hash = hash_of(t->slots[i].key), at = hash & t->mask;
        while (t->index[at])
            at = (at + 1) & t->mask;
        t->index[at] = word_of(hash, i);
    }
    return t;
}

/* The slots of a batch of keys; how many there are. */
static uint32_t find_batch(const struct limit *t, const char *keys, uint32_t n, bool shares, uint32_t *slots)
{
    uint64_t key[BATCH][WORDS], hash[BATCH];
    uint32_t found = 0;
    memcpy(key, keys, n * sizeof key[0]);
    for (uint32_t i = 0; i < n; i++) {
        hash[i] = hash_of(key[i]);
        __builtin_prefetch(&t->index[hash[i] & t->mask]);
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = (uint32_t)t->index[hash[i] & t->mask] - 1;
        __builtin_prefetch(&t->slots[slot]);
        if (shares)
            __builtin_prefetch(&t->shares[slot], 1);
    }
    for (uint32_t i = 0; i < n; i++) {
        slots[i] = find(t, key[i], hash[i]);
        found += slots[i] != UINT32_MAX;
    }
    return found;
}

/* Adds to the share words of slots, and looks at their state words; how many of those are 0, as all are. */
static uint32_t add(struct limit *t, const uint32_t *slots, uint32_t n, uint64_t count)
{
    uint32_t there = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t seen = atomic_load_explicit(&t->shares[slots[i]], memory_order_relaxed);
        while (!atomic_compare_exchange_strong(&t->shares[slots[i]], &seen, seen + count))
            ;
        there += atomic_load(&t->slots[slots[i]].state) == 0;
    }
    return there;
}

/* Each gives how many keys it has served, for which all n must be in the table. */

uint64_t limit_lookup(struct limit *t, const char *keys, uint32_t n)
{
    uint32_t slots[BATCH];
    uint64_t found = 0;
    for (uint32_t from = 0; from < n; from += BATCH)
        found += find_batch(t, keys + (size_t)from * 32, n - from < BATCH ? n - from : BATCH, false, slots);
    return found;
}

/* Grants a share by key, a batch at a time; gives it back by slot, or by key. */
uint64_t limit_share(struct limit *t, const char *keys, uint32_t n, bool back_by_key)
{
    uint32_t slots[BATCH];
    uint64_t there = 0;
    for (uint32_t from = 0; from < n; from += BATCH) {
        const char *first = keys + (size_t)from * 32;
        uint32_t m = n - from < BATCH ? n - from : BATCH;
        if (find_batch(t, first, m, true, slots) < m)
            return 0;
        there += add(t, slots, m, 1);
        if (back_by_key && find_batch(t, first, m, true, slots) < m)
            return 0;
        add(t, slots, m, (uint64_t)-1);
    }
    return there;
}

/* The same by slots that are known: the atomics alone. */
uint64_t limit_words(struct limit *t, const uint32_t *slots, uint32_t n)
{
    uint64_t there = 0;
    for (uint32_t from = 0; from < n; from += BATCH) {
        uint32_t m = n - from < BATCH ? n - from : BATCH;
        for (uint32_t i = 0; i < m; i++) {
            __builtin_prefetch(&t->shares[slots[from + i]], 1);
            __builtin_prefetch(&t->slots[slots[from + i]]);
        }
        there += add(t, slots + from, m, 1);
        add(t, slots + from, m, (uint64_t)-1);
    }
    return there;
}

/* Nothing, with the arguments of a batch: what it costs to get here from Python. */
int64_t limit_call(struct limit *t, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n)
{
    (void)t, (void)keys, (void)width, (void)ends;
    return n;
}

/* Into one of many places, whose addresses lie side by side. */
void limit_copy(char **targets, uint32_t at, const char *source, uint64_t bytes)
{
    memcpy(targets[at], source, bytes);
}

/* New private memory; huge: in pages as large as the kernel gives. NULL: there is none. */
char *limit_map(uint64_t bytes, bool huge)
{
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return p;
}

void limit_unmap(char *p, uint64_t bytes) { munmap(p, bytes); }

void limit_touch(char *p, uint64_t bytes)
{
#ifdef MADV_POPULATE_WRITE
    if (madvise(p, bytes, MADV_POPULATE_WRITE) == 0)
        return;
#endif
    for (uint64_t at = 0; at < bytes; at += PAGE)
        ((volatile char *)p)[at] = 0;
}
