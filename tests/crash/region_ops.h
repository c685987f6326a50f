/* region_ops.h - operations that are about regions of device memory, and what S did before. */
#ifndef CRASH_REGION_OPS_H
#define CRASH_REGION_OPS_H

#include "ops.h"

/* Of ops.c. */
void run_publish(struct call *c);
void run_publish_grants(struct call *c);
void run_abort_refs(struct call *c);
void run_release(struct call *c);
void run_close(struct call *c);
bool s_has_all(struct world *w, struct scene *scene);

bool one_lives(struct world *w, struct scene *scene);
bool one_is_lost(struct world *w, struct scene *scene);
bool one_object_is_lost(struct world *w, struct scene *scene);
bool s_owns(struct world *w, struct scene *scene);
bool s_opened(struct world *w, struct scene *scene);
bool s_opened_what_is_lost(struct world *w, struct scene *scene);
bool s_writes_there(struct world *w, struct scene *scene);
bool s_writes_what_is_lost(struct world *w, struct scene *scene);
bool s_writes_to_the_dead(struct world *w, struct scene *scene);
bool s_may_read_there(struct world *w, struct scene *scene);
bool s_may_read_what_is_lost(struct world *w, struct scene *scene);
bool s_reads_there(struct world *w, struct scene *scene);
bool s_reads_what_is_lost(struct world *w, struct scene *scene);

void run_region_add(struct call *c);
void run_region_give_up(struct call *c);
void run_region_open(struct call *c);
void run_region_shut(struct call *c);
void run_region_reserve(struct call *c);
void run_region_reserve_run(struct call *c);
void run_region_read(struct call *c);
void run_region_read_fresh(struct call *c);
void run_region_finish_read(struct call *c);
void run_region_cancel_read(struct call *c);
void run_region_evict(struct call *c);
void run_region_overwrite(struct call *c);
void run_region_delete(struct call *c);

#endif
