/* stdatomic.h - in the compiler's place: the core's atomics become calls to a simulated memory (memory.c), with the orders
 * that native/atomics.h gives them. */
#ifndef WEAK_STDATOMIC_H
#define WEAK_STDATOMIC_H

#include <stdbool.h>
#include <stdint.h>

#define ATOMIC_LLONG_LOCK_FREE 2
#define ATOMIC_INT_LOCK_FREE 2
#define _Atomic

typedef enum {
    memory_order_relaxed,
    memory_order_acquire,
    memory_order_release,
    memory_order_acq_rel,
    memory_order_seq_cst
} memory_order;

enum weak_change { WEAK_SET, WEAK_ADD, WEAK_SUB, WEAK_OR, WEAK_AND };

uint64_t weak_load(const void *at, uint32_t bytes, memory_order order);
void weak_store(void *at, uint32_t bytes, uint64_t value, memory_order order);
uint64_t weak_change(void *at, uint32_t bytes, enum weak_change how, uint64_t operand, memory_order order);
bool weak_cas(void *at, uint64_t *seen, uint64_t value, memory_order order);
void weak_fence(memory_order order);

#define atomic_load_explicit(w, order) weak_load((w), sizeof *(w), (order))
#define atomic_store_explicit(w, v, order) weak_store((w), sizeof *(w), (v), (order))
#define atomic_exchange_explicit(w, v, order) weak_change((w), sizeof *(w), WEAK_SET, (v), (order))
#define atomic_fetch_add_explicit(w, v, order) weak_change((w), sizeof *(w), WEAK_ADD, (v), (order))
#define atomic_fetch_sub_explicit(w, v, order) weak_change((w), sizeof *(w), WEAK_SUB, (v), (order))
#define atomic_fetch_or_explicit(w, v, order) weak_change((w), sizeof *(w), WEAK_OR, (v), (order))
#define atomic_fetch_and_explicit(w, v, order) weak_change((w), sizeof *(w), WEAK_AND, (v), (order))
/* 64-bit words only; the order of a failure counts as that of success without its release. */
#define atomic_compare_exchange_strong_explicit(w, seen, v, order, failed)                                         \
    ((void)(failed), weak_cas((w) + 0 * sizeof(char[sizeof *(w) == 8 ? 1 : -1]), (seen), (v), (order)))
#define atomic_thread_fence(order) weak_fence(order)

#endif
