/* guard.h - a segment that somebody truncates while it is mapped.
 *
 * Touching a page that the file no longer has raises SIGBUS. Inside a call of the core that is survived: the handler puts
 * zeros in the place of the whole mapping, private to this process, and marks the segment as damaged. The call goes on
 * over zeros, which it trusts as little as anything it reads, and gives SC_E_DAMAGED, as do all later ones but sc_close.
 * Faults elsewhere go to whoever handled SIGBUS before.
 */
#ifndef SC_GUARD_H
#define SC_GUARD_H

#include "segment.h"

/* Once a process, before the first mapping. */
void sc_guard_install(void);

#define SC_THREAD _Thread_local __attribute__((tls_model("initial-exec")))

/* The regions, a bit each, of which this call has found that their owners live. */
extern SC_THREAD uint32_t sc_known_to_live;

/* This thread is about to touch s's mapping; the calls nest, of one segment. */
void sc_guard(struct sc_segment *s);
/* No more. rc itself, or SC_E_DAMAGED where the segment was cut meanwhile. */
int64_t sc_unguard(struct sc_segment *s, int64_t rc);
/* Inside sc_guard: this run of the payload, which is Python's mapping, too. NULL ends it. */
void sc_guard_payload(char *at, uint64_t bytes);

/* False: the file is shorter than it was, so that payload which is about to be handed out may be gone. */
bool sc_whole(struct sc_segment *s);

#endif
