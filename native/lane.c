#define _GNU_SOURCE
#include "lane.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static struct flock byte_of(const struct sc_segment *s, uint32_t lane, short type)
{
    struct flock f = {.l_type = type, .l_whence = SEEK_SET, .l_len = 1};
    f.l_start = (off_t)(s->g.lane_table + lane * sizeof(struct sc_lane));
    return f;
}

static struct flock door_byte(short type)
{
    struct flock f = {.l_type = type, .l_whence = SEEK_SET, .l_len = 1};
    f.l_start = (off_t)offsetof(struct sc_header, door_pid);
    return f;
}

bool sc_lane_held(const struct sc_segment *s, uint32_t lane)
{
    if (lane == s->lane)
        return true;
    struct flock f = byte_of(s, lane, F_WRLCK);
    /* Where the kernel cannot say, nobody is declared dead. */
    return fcntl(s->lock_fd, F_OFD_GETLK, &f) < 0 || f.l_type != F_UNLCK;
}

void sc_lane_let_go(struct sc_segment *s)
{
    struct flock f = byte_of(s, s->lane, F_UNLCK);
    fcntl(s->lock_fd, F_OFD_SETLK, &f);
}

enum sc_lane_state sc_lane_state(const struct sc_segment *s, uint32_t lane)
{
    const struct sc_lane *l = sc_lane(s, lane);
    if (sc_lane_held(s, lane))
        return SC_LANE_ALIVE;
    if (sc_load32(&l->reaped) != sc_load32(&l->incarnation))
        return SC_LANE_DEAD;
    return sc_load32(&l->role) == SC_ROLE_NONE ? SC_LANE_FREE : SC_LANE_VACANT;
}

bool sc_lane_empty(const struct sc_segment *s, uint32_t lane)
{
    const struct sc_lane *l = sc_lane(s, lane);
    return sc_load32(&l->role) == SC_ROLE_NONE && sc_load32(&l->reaped) == sc_load32(&l->incarnation);
}

uint32_t sc_lane_group(const struct sc_segment *s, uint32_t lane)
{
    const struct sc_lane *l = sc_lane(s, lane);
    return sc_load32(&l->role) > SC_ROLE_PRIVATE ? sc_peek32(&l->group_hash) : 0;
}

int sc_door_open(struct sc_segment *s, uint64_t timeout_us)
{
    uint64_t deadline = sc_now_us() + timeout_us;
    struct timespec nap = {.tv_nsec = 200000};
    for (;;) {
        struct flock f = door_byte(F_WRLCK);
        if (fcntl(s->lock_fd, F_OFD_SETLK, &f) == 0)
            break;
        if (errno != EAGAIN && errno != EACCES && errno != EINTR)
            return SC_E_SYSTEM;
        if (sc_now_us() > deadline)
            return SC_E_BUSY;
        nanosleep(&nap, NULL);
    }
    sc_poke32(&sc_header(s)->door_pid, (uint32_t)getpid());
    return 0;
}

void sc_door_shut(struct sc_segment *s)
{
    sc_poke32(&sc_header(s)->door_pid, 0);
    struct flock f = door_byte(F_UNLCK);
    fcntl(s->lock_fd, F_OFD_SETLK, &f);
}

static bool same_group(const struct sc_lane *l, const struct sc_member *m)
{
    char group[SC_MAX_GROUP];
    sc_peek_text(l->group, SC_MAX_GROUP / 8, group);
    return sc_peek32(&l->group_bytes) == m->group_bytes && memcmp(group, m->group, m->group_bytes) == 0;
}

static bool group_lives(const struct sc_segment *s, const struct sc_lane *of)
{
    char group[SC_MAX_GROUP];
    struct sc_member m = {.group = group, .group_bytes = sc_peek32(&of->group_bytes)};
    if (m.group_bytes > SC_MAX_GROUP)
        return false;
    sc_peek_text(of->group, SC_MAX_GROUP / 8, group);
    for (uint32_t i = 0; i < sc_lane_limit(s); i++)
        if (sc_load32(&sc_lane(s, i)->role) > SC_ROLE_PRIVATE && same_group(sc_lane(s, i), &m) && sc_lane_held(s, i))
            return true;
    return false;
}

uint32_t sc_lane_of_rank(const struct sc_segment *s, const struct sc_member *m, uint32_t rank)
{
    for (uint32_t i = 0; i < sc_lane_limit(s); i++) {
        const struct sc_lane *l = sc_lane(s, i);
        if (sc_load32(&l->role) == SC_ROLE_RANK && sc_peek32(&l->rank) == rank && same_group(l, m))
            return i;
    }
    return SC_NO_SLOT;
}

uint32_t sc_lane_find(const struct sc_segment *s, const struct sc_member *m)
{
    /* The lowest first, since evictors look at every lane below the limit. */
    for (uint32_t i = 0; i < s->g.lanes; i++)
        if (sc_load32(&sc_lane(s, i)->role) != SC_ROLE_RANK && !sc_lane_held(s, i))
            return i;
    /* A rank's lane is kept for it as long as somebody of its group may still grant to it. */
    for (uint32_t i = 0; i < s->g.lanes; i++)
        if (!same_group(sc_lane(s, i), m) && !sc_lane_held(s, i) && !group_lives(s, sc_lane(s, i)))
            return i;
    return SC_NO_SLOT;
}

void sc_lanes_remember(struct sc_segment *s)
{
    for (uint32_t lane = sc_peek32(&s->lane_limit); lane < s->g.lanes; lane++)
        if (sc_peek32(&sc_lane(s, lane)->incarnation) || sc_peek32(&sc_lane(s, lane)->role))
            sc_poke32(&s->lane_limit, lane + 1);
}

static void raise_limit(struct sc_segment *s, uint32_t lane)
{
    /* Before the lane's first share (both sequentially consistent): an evictor that marked a slot and then read
     * the old limit is seen by that share's look at the state word. */
    if (sc_load32(&sc_header(s)->lane_limit) < lane + 1)
        sc_store32(&sc_header(s)->lane_limit, lane + 1);
}

static void write_identity(struct sc_lane *l, const struct sc_member *m, enum sc_role role, uint32_t rank)
{
    /* Role last: a lane whose taker dies half-way has no role and is free. */
    sc_store32(&l->role, SC_ROLE_NONE);
    sc_poke32(&l->rank, rank);
    sc_poke32(&l->world_size, m->world_size);
    sc_poke32(&l->group_bytes, m->group_bytes);
    sc_poke_text(l->group, SC_MAX_GROUP / 8, m->group, m->group_bytes);
    sc_poke32(&l->group_hash, sc_group_hash(m->group, m->group_bytes));
    sc_store32(&l->role, role);
}

void sc_lane_assign(struct sc_segment *s, uint32_t lane, const struct sc_member *m, uint32_t rank)
{
    raise_limit(s, lane);
    sc_poke32(&sc_lane(s, lane)->pid, 0);
    write_identity(sc_lane(s, lane), m, SC_ROLE_RANK, rank);
}

static void write_process(struct sc_lane *l)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    sc_poke(&l->started_ns, (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec);
    sc_poke32(&l->pid, (uint32_t)getpid());
    char command[SC_MAX_COMMAND];
    int fd = open("/proc/self/comm", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, command, sizeof command - 1);
    if (fd >= 0)
        close(fd);
    if (n > 0 && command[n - 1] == '\n')
        n--;
    sc_poke_text(l->command, SC_MAX_COMMAND / 8, command, n > 0 ? (uint32_t)n : 0);
}

int sc_lane_take(struct sc_segment *s, const struct sc_member *m, uint32_t *pid)
{
    enum sc_role role = m->group_bytes == 0 ? SC_ROLE_PRIVATE : m->rank < 0 ? SC_ROLE_CONTROLLER : SC_ROLE_RANK;
    uint32_t lane = role == SC_ROLE_RANK ? sc_lane_of_rank(s, m, (uint32_t)m->rank) : SC_NO_SLOT;
    if (lane == SC_NO_SLOT)
        lane = sc_lane_find(s, m);
    if (lane == SC_NO_SLOT)
        return SC_E_NO_LANE;
    struct sc_lane *l = sc_lane(s, lane);
    struct flock f = byte_of(s, lane, F_WRLCK);
    if (fcntl(s->lock_fd, F_OFD_SETLK, &f) < 0) {
        *pid = sc_peek32(&l->pid);
        return errno == EAGAIN || errno == EACCES ? SC_E_LANE_IN_USE : SC_E_SYSTEM;
    }
    /* What was granted to a rank that has not come yet is its own; what a dead predecessor left is not. */
    bool expected = role == SC_ROLE_RANK && lane == sc_lane_of_rank(s, m, (uint32_t)m->rank) &&
                    sc_load32(&l->reaped) == sc_load32(&l->incarnation);
    bool empty = sc_lane_empty(s, lane);
    /* From here the predecessor's incarnation is dead for all: a lock word that names it can be stolen. */
    s->incarnation = sc_load32(&l->incarnation) + 1;
    s->incarnation += s->incarnation == 0;
    sc_store32(&l->incarnation, s->incarnation);
    raise_limit(s, lane);
    write_identity(l, m, role, role == SC_ROLE_RANK ? (uint32_t)m->rank : 0);
    write_process(l);
    for (uint32_t i = 0; i < SC_GAUGE_COUNT; i++)
        sc_poke(&l->gauges[i], 0); /* what its predecessor was at when it died */
    s->lane = lane;
    s->world_size = m->world_size;
    return expected || empty ? 1 : 0;
}

int sc_group_check(struct sc_segment *s, const struct sc_member *m)
{
    bool other = false, lives = false;
    for (uint32_t i = 0; m->group_bytes && i < sc_lane_limit(s); i++) {
        const struct sc_lane *l = sc_lane(s, i);
        if (sc_load32(&l->role) <= SC_ROLE_PRIVATE || !same_group(l, m))
            continue;
        other = other || sc_peek32(&l->world_size) != m->world_size;
        lives = lives || sc_lane_held(s, i);
    }
    if (other && lives)
        return SC_E_WORLD_SIZE;
    for (uint32_t i = 0; other && i < sc_lane_limit(s); i++) {
        struct sc_lane *l = sc_lane(s, i);
        if (sc_load32(&l->role) <= SC_ROLE_PRIVATE || !same_group(l, m))
            continue;
        /* A later incarnation makes it a dead lane: shares granted to ranks that never came are reaped. */
        sc_store32(&l->incarnation, sc_load32(&l->incarnation) + 1);
        sc_store32(&l->role, SC_ROLE_NONE);
    }
    return 0;
}
