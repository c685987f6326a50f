/* stats.c - what an arena says of itself to somebody who only looks (no lock, no lane, no store), and what a lane notes
 * about itself. */
#include "arena.h"
#include "guard.h"

#define X(name) #name,
static const char *const counter_names[] = {SC_COUNTERS(X)};
static const char *const gauge_names[] = {SC_GAUGES(X)};
static const char *const histogram_names[] = {SC_HISTOGRAMS(X)};
#undef X

const char *sc_statistic_name(enum sc_statistic kind, uint32_t i)
{
    if (kind == SC_COUNTER)
        return i < SC_COUNTER_COUNT ? counter_names[i] : NULL;
    if (kind == SC_GAUGE)
        return i < SC_GAUGE_COUNT ? gauge_names[i] : NULL;
    return i < SC_HISTOGRAM_COUNT ? histogram_names[i] : NULL;
}

static uint32_t at_most(uint32_t n, uint32_t most) { return n < most ? n : most; }

static void note_time(struct sc_histogram *h, uint64_t us)
{
    uint32_t b = 0;
    while (b < SC_BUCKETS - 1 && us > (uint64_t)SC_BUCKET_US << b)
        b++;
    sc_count(&h->sum_us, us);
    sc_count(&h->buckets[b], 1);
}

void sc_note(struct sc_segment *s, const struct sc_note *notes, uint32_t n)
{
    if (sc_enter(s) < 0)
        return;
    struct sc_lane *l = sc_lane(s, s->lane);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t value = (uint64_t)notes[i].value; /* of a gauge modulo 2^64: below zero is subtraction */
        if (notes[i].kind == SC_COUNTER && notes[i].number < SC_COUNTER_COUNT)
            sc_count(&l->counters[notes[i].number], value);
        else if (notes[i].kind == SC_GAUGE && notes[i].number < SC_GAUGE_COUNT)
            sc_count(&l->gauges[notes[i].number], value);
        else if (notes[i].kind == SC_HISTOGRAM && notes[i].number < SC_HISTOGRAM_COUNT)
            note_time(&l->histograms[notes[i].number], value);
    }
    sc_leave(s, 0);
}

uint32_t sc_own_lane(const struct sc_segment *s) { return s->lane; }

int sc_intact(const struct sc_segment *s) { return sc_load32(&s->damaged) ? SC_E_DAMAGED : 0; }

void sc_get_info(struct sc_segment *s, struct sc_info *info)
{
    memset(info, 0, sizeof *info);
    info->lock_lane = SC_NO_SLOT;
    if (sc_enter(s) < 0)
        return; /* closed meanwhile */
    const struct sc_header *h = sc_header(s);
    info->capacity = s->g.capacity;
    info->block_size = s->g.block_size;
    info->payload = s->g.payload;
    info->metadata = s->g.metadata;
    info->segment_bytes = s->g.segment_bytes;
    info->slots = s->g.slots;
    info->lanes = s->g.lanes;
    info->regions = s->g.regions;
    info->lane_limit = sc_lane_limit(s);
    info->layouts = sc_load32(&h->layouts);
    info->read_lease_us = s->read_lease_us;
    info->write_lease_us = s->write_lease_us;
    info->lock_timeout_us = s->lock_timeout_us;
    info->eviction_window_us = s->eviction_window_us;
    info->created_ns = h->created_ns;
    info->fingerprint_bytes = at_most(h->fingerprint_bytes, SC_MAX_FINGERPRINT);
    memcpy(info->fingerprint, h->fingerprint, info->fingerprint_bytes);
    memcpy(info->boot_id, h->boot_id, sizeof info->boot_id);
    info->lock_lane = sc_lock_holder(s, &info->lock_incarnation, &info->lock_alive);
    sc_leave(s, 0);
}

static void copy_statistics(const struct sc_lane *l, struct sc_lane_info *info)
{
    for (uint32_t i = 0; i < SC_COUNTER_COUNT; i++)
        info->counters[i] = sc_peek(&l->counters[i]);
    for (uint32_t i = 0; i < SC_GAUGE_COUNT; i++)
        info->gauges[i] = sc_peek(&l->gauges[i]);
    for (uint32_t i = 0; i < SC_HISTOGRAM_COUNT; i++) {
        info->histograms[i].sum_us = sc_peek(&l->histograms[i].sum_us);
        for (uint32_t b = 0; b < SC_BUCKETS; b++)
            info->histograms[i].buckets[b] = sc_peek(&l->histograms[i].buckets[b]);
    }
}

void sc_get_lane(struct sc_segment *s, uint32_t lane, struct sc_lane_info *info)
{
    memset(info, 0, sizeof *info);
    if (lane >= s->g.lanes || sc_enter(s) < 0)
        return;
    const struct sc_lane *l = sc_lane(s, lane);
    info->role = sc_load32(&l->role);
    info->state = sc_lane_state(s, lane);
    info->rank = sc_peek32(&l->rank);
    info->world_size = sc_peek32(&l->world_size);
    info->incarnation = sc_peek32(&l->incarnation);
    info->pid = sc_peek32(&l->pid);
    info->started_ns = sc_peek(&l->started_ns);
    sc_peek_text(l->command, SC_MAX_COMMAND / 8, info->command);
    info->group_bytes = at_most(sc_peek32(&l->group_bytes), SC_MAX_GROUP);
    sc_peek_text(l->group, SC_MAX_GROUP / 8, info->group);
    copy_statistics(l, info);
    sc_leave(s, 0);
}
