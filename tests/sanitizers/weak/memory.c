#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "one_mapping.h"
#include "stdatomic.h"

enum { WORDS = 2048, HISTORY = 6, HASH = 4 * WORDS };

struct view { uint32_t oldest[WORDS]; };
struct value { uint64_t value; struct view view; };

/* Value number n of a word is in values[n % HISTORY]; the latest has number `latest`. */
struct word { uintptr_t at; uint32_t latest, kept, ordered; struct value values[HISTORY]; };

struct fiber {
    struct view now;       /* what it knows */
    struct view acquired;  /* what an acquire fence would add: the views of values that relaxed loads saw */
    struct view released;  /* what it knew at its last release fence */
};

static struct word words[WORDS];
static uint16_t places[HASH]; /* 1 + number of a word */
static uint32_t count;
static struct fiber fibers[WEAK_FIBERS], *self;
static struct view kernel[KERNEL_LOCKS];
static uint64_t randomness;

uint32_t weak_below(uint32_t n)
{
    randomness ^= randomness << 13;
    randomness ^= randomness >> 7;
    randomness ^= randomness << 17;
    return (uint32_t)(randomness >> 33) % n;
}

void weak_begin(uint64_t seed) { randomness = seed * 2 + 1; }

void weak_become(unsigned fiber) { self = &fibers[fiber]; }

static void join(struct view *to, const struct view *from)
{
    for (uint32_t i = 0; i < count; i++)
        to->oldest[i] = to->oldest[i] > from->oldest[i] ? to->oldest[i] : from->oldest[i];
}

static void copy(struct view *to, const struct view *from) { memcpy(to->oldest, from->oldest, count * sizeof *to->oldest); }

void weak_kernel_acquire(unsigned lock) { join(&self->now, &kernel[lock]); }
void weak_kernel_release(unsigned lock) { join(&kernel[lock], &self->now); }

static uint64_t plain_load(uintptr_t at, uint32_t bytes)
{
    uint64_t value = 0;
    memcpy(&value, (const void *)at, bytes);
    return value;
}

/* A word that nobody has stored to has no history: NULL, unless it is to begin now. */
static struct word *word_at(const void *at, uint32_t bytes, bool begin)
{
    uint32_t place = (uint32_t)((uintptr_t)at >> 2) * 2654435761u >> 7;
    for (place %= HASH; places[place]; place = (place + 1) % HASH)
        if (words[places[place] - 1].at == (uintptr_t)at)
            return &words[places[place] - 1];
    if (!begin)
        return NULL;
    if (count == WORDS) {
        fputs("memory.c: more words than WORDS\n", stderr);
        abort();
    }
    struct word *w = &words[count];
    places[place] = (uint16_t)++count;
    w->at = (uintptr_t)at;
    w->latest = w->kept = 1; /* what lay there before; every view begins with 0, which is not newer */
    w->values[1 % HISTORY].value = plain_load(w->at, bytes);
    return w;
}

static uint32_t number_of(const struct word *w) { return (uint32_t)(w - words); }
static struct value *value_of(struct word *w, uint32_t n) { return &w->values[n % HISTORY]; }
static bool acquires(memory_order o) { return o == memory_order_acquire || o >= memory_order_acq_rel; }
static bool releases(memory_order o) { return o >= memory_order_release; }

/* The oldest value that this fiber may see, which no view that it will ever have forbids. */
static uint32_t oldest(const struct word *w, memory_order order)
{
    uint32_t n = self->now.oldest[number_of(w)];
    if (order == memory_order_seq_cst && w->ordered > n)
        n = w->ordered;
    return n > w->kept ? n : w->kept;
}

static void see(struct word *w, uint32_t n, memory_order order)
{
    const struct value *v = value_of(w, n);
    uint32_t i = number_of(w);
    if (n > self->now.oldest[i])
        self->now.oldest[i] = n;
    if (order == memory_order_seq_cst && n > w->ordered)
        w->ordered = n;
    join(&self->acquired, &v->view);
    if (acquires(order))
        join(&self->now, &v->view);
}

/* Mostly the latest, at times an older one. */
static uint32_t choose(const struct word *w, memory_order order)
{
    uint32_t from = oldest(w, order);
    return from == w->latest || weak_below(2) ? w->latest : from + weak_below(w->latest - from + 1);
}

/* change: this value replaces the latest one in one step with a look at it, whose view it passes on. */
static void append(struct word *w, uint32_t bytes, uint64_t value, memory_order order, bool change)
{
    const struct value *before = value_of(w, w->latest);
    struct value *v = value_of(w, ++w->latest);
    uint32_t i = number_of(w);
    if (w->latest - w->kept >= HISTORY)
        w->kept = w->latest - HISTORY + 1;
    self->now.oldest[i] = w->latest;
    v->value = value;
    copy(&v->view, releases(order) ? &self->now : &self->released);
    if (change)
        join(&v->view, &before->view);
    v->view.oldest[i] = w->latest;
    if (order == memory_order_seq_cst)
        w->ordered = w->latest;
    memcpy((void *)w->at, &value, bytes); /* for plain reads under the arena lock, and for the kernel */
}

uint64_t weak_load(const void *at, uint32_t bytes, memory_order order)
{
    weak_step();
    struct word *w = word_at(at, bytes, false);
    if (!w)
        return plain_load((uintptr_t)at, bytes);
    uint32_t n = choose(w, order);
    see(w, n, order);
    return value_of(w, n)->value;
}

void weak_store(void *at, uint32_t bytes, uint64_t value, memory_order order)
{
    weak_step();
    append(word_at(at, bytes, true), bytes, value, order, false);
}

uint64_t weak_change(void *at, uint32_t bytes, enum weak_change how, uint64_t operand, memory_order order)
{
    weak_step();
    struct word *w = word_at(at, bytes, true);
    uint64_t old = value_of(w, w->latest)->value, new = operand;
    see(w, w->latest, order);
    if (how == WEAK_ADD)
        new = old + operand;
    if (how == WEAK_SUB)
        new = old - operand;
    if (how == WEAK_OR)
        new = old | operand;
    if (how == WEAK_AND)
        new = old & operand;
    append(w, bytes, bytes == 4 ? (uint32_t)new : new, order, true);
    return old;
}

bool weak_cas(void *at, uint64_t *seen, uint64_t value, memory_order order)
{
    weak_step();
    struct word *w = word_at(at, 8, true);
    uint32_t n = choose(w, order);
    if (value_of(w, n)->value == *seen)
        n = w->latest; /* an older one would have to fail, which a strong compare-and-swap may not */
    see(w, n, order);
    if (value_of(w, n)->value != *seen) {
        *seen = value_of(w, n)->value;
        return false;
    }
    append(w, 8, value, order, true);
    return true;
}

void weak_fence(memory_order order)
{
    weak_step();
    if (acquires(order))
        join(&self->now, &self->acquired);
    if (releases(order))
        copy(&self->released, &self->now);
}

void weak_cleared(void *at, size_t bytes)
{
    for (uint32_t i = 0; i < count; i++)
        if (words[i].at >= (uintptr_t)at && words[i].at < (uintptr_t)at + bytes)
            append(&words[i], 4, 0, memory_order_relaxed, false);
}
