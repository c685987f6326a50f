#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_US UINT64_C(1000000000000000) /* as config.py allows */
#define LONGEST_WINDOW_US UINT64_C(10000000000000) /* the same: a score has room for three */

static uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static uint64_t place(uint64_t *end, uint64_t bytes)
{
    uint64_t at = *end;
    *end = align_up(at + bytes, 4096);
    return at;
}

int sc_plan(uint64_t capacity, uint64_t block_size, uint32_t slots, uint32_t lanes, uint32_t regions, struct sc_geometry *g)
{
    memset(g, 0, sizeof *g);
    if (block_size < 4096 || block_size > (UINT64_C(1) << 40) || (block_size & (block_size - 1)))
        return SC_E_DAMAGED;
    if (capacity == 0 || capacity % block_size || capacity / block_size > SC_MAX_BLOCKS)
        return SC_E_DAMAGED;
    if (regions > SC_MAX_REGIONS || capacity / block_size * (1 + regions) > SC_NO_SLOT)
        return SC_E_DAMAGED;
    if (slots == 0 || slots > SC_MAX_SLOTS || lanes == 0 || lanes > SC_MAX_LANES)
        return SC_E_DAMAGED;
    if (capacity > UINT64_C(1) << 50)
        return SC_E_DAMAGED;
    g->capacity = capacity;
    g->block_size = block_size;
    g->slots = slots;
    g->lanes = lanes;
    g->regions = regions;
    g->blocks = (uint32_t)(capacity / block_size);
    g->index_bits = 4;
    while ((UINT64_C(1) << g->index_bits) < 4 * (uint64_t)slots)
        g->index_bits++;
    uint64_t end = sizeof(struct sc_header);
    g->lane_table = place(&end, lanes * sizeof(struct sc_lane));
    g->layout_table = place(&end, SC_MAX_LAYOUTS * sizeof(struct sc_layout));
    g->region_table = place(&end, regions * sizeof(struct sc_region));
    g->slot_table = place(&end, slots * sizeof(struct sc_slot));
    g->scores = place(&end, slots * sizeof(sc_word));
    g->ghost_lines = 2 * slots; /* at eight ghosts a slot a quarter of it is in use */
    g->ghosts = place(&end, g->ghost_lines * UINT64_C(64));
    g->share_stride = align_up(slots * sizeof(sc_word), 128);
    g->shares = place(&end, lanes * g->share_stride);
    g->since_stride = align_up(slots * sizeof(sc_half), 128);
    g->since = place(&end, lanes * g->since_stride);
    g->index = place(&end, sizeof(sc_word) << g->index_bits);
    g->slot_map = place(&end, align_up(slots, 64) / 8);
    uint64_t blocks = (uint64_t)g->blocks * (1 + regions);
    g->block_map = place(&end, align_up(blocks, 64) / 8);
    g->owners = place(&end, blocks * sizeof(sc_half));
    g->backed = place(&end, align_up(g->blocks, 64) / 8);
    g->metadata = end;
    g->payload = align_up(end, SC_PAYLOAD_ALIGN);
    g->segment_bytes = g->payload + capacity;
    return 0;
}

uint64_t sc_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

uint64_t sc_checksum(const struct sc_header *h)
{
    uint64_t sum = sc_fnv(UINT64_C(0xcbf29ce484222325), h, offsetof(struct sc_header, checksum));
    return sc_fnv(sum, &h->fingerprint_bytes, sizeof h->fingerprint_bytes + sizeof h->reserved1 + SC_MAX_FINGERPRINT);
}

/* Copies the constant part out first, so that what is checked is what is used. */
static int check(int fd, struct sc_segment *s)
{
    struct sc_header h;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return SC_E_SYSTEM;
    if (!S_ISREG(st.st_mode) || pread(fd, &h, sizeof h, 0) != (ssize_t)sizeof h || h.magic != SC_MAGIC)
        return SC_E_DAMAGED;
    if (h.format != SC_FORMAT)
        return SC_E_VERSION;
    if (h.checksum != sc_checksum(&h) || h.fingerprint_bytes > SC_MAX_FINGERPRINT)
        return SC_E_DAMAGED;
    if (sc_plan(h.capacity, h.block_size, h.slots, h.lanes, h.regions, &s->g) < 0)
        return SC_E_DAMAGED;
    if (h.read_lease_us > LONGEST_US || h.write_lease_us > LONGEST_US || h.lock_timeout_us > LONGEST_US)
        return SC_E_DAMAGED;
    if (h.eviction_window_us > LONGEST_WINDOW_US)
        return SC_E_DAMAGED;
    if ((uint64_t)st.st_size != s->g.segment_bytes)
        return SC_E_DAMAGED;
    s->read_lease_us = h.read_lease_us;
    s->write_lease_us = h.write_lease_us;
    s->lock_timeout_us = h.lock_timeout_us;
    s->eviction_window_us = h.eviction_window_us;
    s->epoch_us = h.epoch_us;
    s->seed = h.seed;
    s->checksum = h.checksum;
    return 0;
}

/* A forked child must neither keep its parent's lane alive nor use it. The parent's lane byte is locked
 * through lock_fd's open file description; the child closes its descriptor before it runs anything else. */
static struct sc_segment *registry;
static pthread_mutex_t registry_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t registry_once = PTHREAD_ONCE_INIT;

static void before_fork(void) { pthread_mutex_lock(&registry_mutex); }
static void after_fork_parent(void) { pthread_mutex_unlock(&registry_mutex); }
static void after_fork_child(void)
{
    for (struct sc_segment *s = registry; s; s = s->next) {
        if (s->lock_fd >= 0)
            close(s->lock_fd);
        s->lock_fd = -1;
        sc_store32(&s->closed, 2);
    }
    pthread_mutex_unlock(&registry_mutex);
}
static void registry_init(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* Another open file description of the same file, known to after_fork_child from its first moment on. */
static int open_locks(struct sc_segment *s, int fd, bool writable)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    pthread_once(&registry_once, registry_init);
    pthread_mutex_lock(&registry_mutex);
    s->lock_fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    s->next = registry;
    if (registry)
        registry->prev = s;
    registry = s;
    s->registered = true;
    pthread_mutex_unlock(&registry_mutex);
    return s->lock_fd < 0 ? SC_E_SYSTEM : 0;
}

/* In one turn with leaving the registry, so that no child is born between the two and keeps the descriptor. */
static void close_locks(struct sc_segment *s)
{
    pthread_mutex_lock(&registry_mutex);
    if (s->lock_fd >= 0)
        close(s->lock_fd);
    s->lock_fd = -1;
    if (s->registered && s->prev)
        s->prev->next = s->next;
    else if (s->registered)
        registry = s->next;
    if (s->registered && s->next)
        s->next->prev = s->prev;
    s->registered = false;
    pthread_mutex_unlock(&registry_mutex);
}

int sc_segment_open(int fd, bool writable, struct sc_segment *s)
{
    s->lock_fd = -1;
    sc_guard_install();
    int rc = check(fd, s);
    if (rc < 0)
        return rc;
    s->lane = SC_NO_SLOT;
    pthread_mutex_init(&s->mutex, NULL);
    s->base_bytes = s->g.metadata;
    s->base = mmap(NULL, s->base_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (s->base == MAP_FAILED) {
        s->base = NULL;
        rc = SC_E_MEMORY;
    }
    int locks = open_locks(s, fd, writable);
    if (rc == 0)
        rc = locks;
    if (rc < 0)
        sc_segment_shut(s);
    return rc;
}

void sc_segment_shut(struct sc_segment *s)
{
    if (!sc_load32(&s->closed))
        sc_store32(&s->closed, 1);
    close_locks(s);
    if (s->base)
        munmap(s->base, s->base_bytes);
    s->base = NULL;
    free(s->costs);
    s->costs = NULL;
    for (uint32_t region = 0; region <= SC_MAX_REGIONS; region++) {
        free(s->victims[region]);
        s->victims[region] = NULL;
    }
}

int sc_enter(struct sc_segment *s)
{
    /* Counted before the look at closed; sc_close stores closed before it looks at users. */
    sc_add32(&s->users, 1);
    sc_guard(s);
    int rc = 0;
    if (sc_load32(&s->closed))
        rc = SC_E_CLOSED;
    else if (sc_load32(&s->damaged))
        rc = SC_E_DAMAGED;
    else if (s->lane != SC_NO_SLOT && sc_peek32(&sc_lane(s, s->lane)->incarnation) != s->incarnation)
        rc = sc_whole(s) ? SC_E_FENCED : SC_E_DAMAGED; /* zeros, where the file was cut within the row's page */
    return rc < 0 ? (int)sc_leave(s, rc) : 0;
}

int64_t sc_leave(struct sc_segment *s, int64_t rc)
{
    rc = sc_unguard(s, rc);
    sc_sub32(&s->users, 1);
    return rc;
}
