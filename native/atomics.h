/* atomics.h - the only file that names C11 atomics and memory orders.
 *
 * Every word that two processes may touch at once is an sc_word (64 bits) or an sc_half (32 bits).
 * Both must be lock-free: a compiler's fallback lock would live in one process and guard nothing.
 */
#ifndef SC_ATOMICS_H
#define SC_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if ATOMIC_LLONG_LOCK_FREE != 2 || ATOMIC_INT_LOCK_FREE != 2
#error "shmcache needs lock-free 64-bit and 32-bit atomics"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shmcache needs a little-endian machine (the futex is the low half of a 64-bit word)"
#endif

typedef _Atomic uint64_t sc_word;
typedef _Atomic uint32_t sc_half;
_Static_assert(sizeof(sc_word) == 8 && sizeof(sc_half) == 4, "atomics have no padding");

/* Relaxed: a hint, a statistic, or a word that a later fence or a re-read of the state word orders. */
static inline uint64_t sc_peek(const sc_word *w) { return atomic_load_explicit(w, memory_order_relaxed); }
static inline uint32_t sc_peek32(const sc_half *w) { return atomic_load_explicit(w, memory_order_relaxed); }
static inline void sc_poke(sc_word *w, uint64_t v) { atomic_store_explicit(w, v, memory_order_relaxed); }
static inline void sc_poke32(sc_half *w, uint32_t v) { atomic_store_explicit(w, v, memory_order_relaxed); }
static inline void sc_count(sc_word *w, uint64_t n) { atomic_fetch_add_explicit(w, n, memory_order_relaxed); }

/* Acquire and release: each use names its partner where it stands. */
static inline uint64_t sc_load_acquire(const sc_word *w) { return atomic_load_explicit(w, memory_order_acquire); }
static inline uint32_t sc_load_acquire32(const sc_half *w) { return atomic_load_explicit(w, memory_order_acquire); }
static inline void sc_store_release(sc_word *w, uint64_t v) { atomic_store_explicit(w, v, memory_order_release); }
static inline void sc_store_release32(sc_half *w, uint32_t v) { atomic_store_explicit(w, v, memory_order_release); }

/* Sequentially consistent: "mark, then look" on both sides (state word against share word). */
static inline uint64_t sc_load(const sc_word *w) { return atomic_load_explicit(w, memory_order_seq_cst); }
static inline void sc_store(sc_word *w, uint64_t v) { atomic_store_explicit(w, v, memory_order_seq_cst); }
static inline uint64_t sc_swap(sc_word *w, uint64_t v) { return atomic_exchange_explicit(w, v, memory_order_seq_cst); }
static inline uint64_t sc_or(sc_word *w, uint64_t v) { return atomic_fetch_or_explicit(w, v, memory_order_seq_cst); }
static inline uint64_t sc_and(sc_word *w, uint64_t v) { return atomic_fetch_and_explicit(w, v, memory_order_seq_cst); }
static inline uint32_t sc_load32(const sc_half *w) { return atomic_load_explicit(w, memory_order_seq_cst); }
static inline void sc_store32(sc_half *w, uint32_t v) { atomic_store_explicit(w, v, memory_order_seq_cst); }

/* Both give what the word held before. */
static inline uint32_t sc_add32(sc_half *w, uint32_t n) { return atomic_fetch_add_explicit(w, n, memory_order_seq_cst); }
static inline uint32_t sc_sub32(sc_half *w, uint32_t n) { return atomic_fetch_sub_explicit(w, n, memory_order_seq_cst); }

/* On failure *seen is what the word held. */
static inline bool sc_cas(sc_word *w, uint64_t *seen, uint64_t v)
{
    return atomic_compare_exchange_strong_explicit(w, seen, v, memory_order_seq_cst, memory_order_seq_cst);
}

/* Never lowers the word. */
static inline void sc_raise(sc_word *w, uint64_t v)
{
    uint64_t seen = sc_peek(w);
    while (seen < v && !sc_cas(w, &seen, v))
        ;
}

/* Text in words, relaxed: a reader may see parts of two texts, and bears it. */
static inline void sc_poke_text(sc_word *to, uint32_t words, const char *from, uint32_t bytes)
{
    for (uint32_t i = 0; i < words; i++) {
        uint64_t word = 0;
        if (8 * i < bytes)
            memcpy(&word, from + 8 * i, bytes - 8 * i < 8 ? bytes - 8 * i : 8);
        sc_poke(to + i, word);
    }
}
static inline void sc_peek_text(const sc_word *from, uint32_t words, char *to)
{
    for (uint32_t i = 0; i < words; i++) {
        uint64_t word = sc_peek(from + i);
        memcpy(to + 8 * i, &word, 8);
    }
}

static inline void sc_fence_acquire(void) { atomic_thread_fence(memory_order_acquire); }
static inline void sc_fence_release(void) { atomic_thread_fence(memory_order_release); }

static inline void sc_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

static inline void sc_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#endif
