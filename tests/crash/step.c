#define _GNU_SOURCE
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_INSTRUCTIONS = 2000000 };

extern const char __executable_start;

static void watch(struct stepper *t, uint64_t at, uint64_t bytes)
{
    t->watched[t->watched_n++] = (struct part){at, bytes};
}

static void watch_all(struct stepper *t, bool payload)
{
    const struct sc_geometry *g = &t->w->g;
    t->watched_n = 0;
    watch(t, 0, sizeof(struct sc_header));
    watch(t, g->lane_table, g->lanes * sizeof(struct sc_lane));
    watch(t, g->layout_table, 4 * sizeof(struct sc_layout));
    watch(t, g->region_table, g->regions * sizeof(struct sc_region));
    watch(t, g->slot_table, g->slots * sizeof(struct sc_slot));
    watch(t, g->scores, g->slots * sizeof(sc_word));
    watch(t, g->ghosts, g->ghost_lines * UINT64_C(64));
    watch(t, g->shares, g->lanes * g->share_stride);
    watch(t, g->since, g->lanes * g->since_stride);
    watch(t, g->index, sizeof(sc_word) << g->index_bits);
    watch(t, g->slot_map, 8);
    watch(t, g->block_map, 8);
    watch(t, g->owners, ALL_BLOCKS * sizeof(sc_half));
    watch(t, g->backed, 8);
    if (payload)
        watch(t, g->payload, g->capacity);
}

void step_make(struct stepper *t, struct world *w)
{
    memset(t, 0, sizeof *t);
    t->w = w;
    t->out = mmap(NULL, sizeof *t->out, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    t->copy = malloc(w->g.segment_bytes);
    if (t->out == MAP_FAILED || !t->copy)
        die("step_make");
}

static void child_main(struct stepper *t)
{
    static struct sc_segment s;
    struct call c = {t->w, &s, t->scene, t->out};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (sc_segment_open(t->w->fd, true, &s) < 0)
        _exit(1);
    s.lock_timeout_us = 0;
    if (t->scene->start->who[S].alive)
        seat_adopt(&s, &t->scene->start->who[S]);
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
        _exit(2);
    raise(SIGSTOP);
    t->out->phase = 1;
    t->op->run(&c);
    t->out->phase = 2;
    for (;;)
        pause();
}

static uint64_t locks_of(const struct stepper *t)
{
    const struct sc_segment *s = &t->w->seats[S]; /* has no lock of its own: S sits in the child */
    uint64_t bits = 0;
    for (uint32_t lane = 0; lane <= LANES; lane++) {
        struct flock f = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
        f.l_start = lane < LANES ? (off_t)(s->g.lane_table + lane * sizeof(struct sc_lane))
                                 : (off_t)offsetof(struct sc_header, door_pid);
        if (fcntl(s->lock_fd, F_OFD_GETLK, &f) == 0 && f.l_type != F_UNLCK)
            bits |= UINT64_C(1) << (lane < LANES ? lane : 63);
    }
    return bits;
}

/* Waits for the child's next stop by SIGTRAP or SIGSTOP; false: it died, or something else stopped it. */
static bool wait_for(struct stepper *t, int wanted)
{
    int status;
    while (waitpid(t->child, &status, __WALL) < 0)
        if (errno != EINTR)
            die("waitpid");
    if (WIFSTOPPED(status) && WSTOPSIG(status) == wanted)
        return true;
    snprintf(t->failure, sizeof t->failure, "the stepped process %s %d",
             WIFEXITED(status) ? "ended with" : WIFSIGNALED(status) ? "was killed by signal" : "got signal",
             WIFEXITED(status) ? WEXITSTATUS(status) : WIFSIGNALED(status) ? WTERMSIG(status) : WSTOPSIG(status));
    if (!WIFSTOPPED(status))
        t->child = 0;
    return false;
}

bool step_begin(struct stepper *t, const struct scene *scene, const struct op *op)
{
    t->scene = scene;
    t->op = op;
    t->failure[0] = 0;
    t->instructions = t->stops = 0;
    memset(t->out, 0, sizeof *t->out);
    world_restore(t->w, scene->start, S);
    watch_all(t, op->flags & OP_FILLS);
    memcpy(t->copy, t->w->map, t->w->g.segment_bytes);
    t->child = fork();
    if (t->child < 0)
        die("fork");
    if (t->child == 0)
        child_main(t);
    if (!wait_for(t, SIGSTOP)) {
        step_end(t);
        return false;
    }
    if (ptrace(PTRACE_SETOPTIONS, t->child, NULL, (void *)PTRACE_O_EXITKILL) < 0)
        die("PTRACE_SETOPTIONS");
    t->locks = locks_of(t);
    return true;
}

uint64_t step_difference(const struct stepper *t, uint64_t from)
{
    for (uint32_t i = 0; i < t->watched_n; i++) {
        uint64_t at = t->watched[i].at, end = at + t->watched[i].bytes;
        if (from >= end)
            continue;
        if (at < from)
            at = from;
        if (memcmp(t->copy + at, t->w->map + at, end - at) == 0)
            continue;
        while (t->copy[at] == t->w->map[at])
            at++;
        return at;
    }
    return SIZE_MAX;
}

static bool changed(struct stepper *t)
{
    uint64_t locks = t->op->flags & OP_LOCKS ? locks_of(t) : t->locks;
    bool any = locks != t->locks || step_difference(t, 0) != SIZE_MAX;
    t->locks = locks;
    return any;
}

/* What is not watched may not have changed, either. */
static void check_unwatched(struct stepper *t)
{
    if (memcmp(t->copy, t->w->map, t->w->g.segment_bytes) == 0)
        return;
    uint64_t at = 0;
    while (t->copy[at] == t->w->map[at])
        at++;
    snprintf(t->failure, sizeof t->failure, "byte %llu changed, which is not watched", (unsigned long long)at);
}

bool step_next(struct stepper *t)
{
    struct user_regs_struct regs;
    for (;;) {
        int before = t->out->phase;
        if (before == 2) {
            check_unwatched(t);
            return false;
        }
        if (ptrace(PTRACE_SINGLESTEP, t->child, NULL, NULL) < 0)
            die("PTRACE_SINGLESTEP");
        if (!wait_for(t, SIGTRAP))
            return false;
        t->instructions += before == 1;
        if (t->instructions > MAX_INSTRUCTIONS) {
            snprintf(t->failure, sizeof t->failure, "no end after %d instructions", MAX_INSTRUCTIONS);
            return false;
        }
        if (!changed(t))
            continue;
        t->stops++;
        if (ptrace(PTRACE_GETREGS, t->child, NULL, &regs) < 0)
            die("PTRACE_GETREGS");
        t->address = regs.rip - (uint64_t)(uintptr_t)&__executable_start;
        return true;
    }
}

void step_accept(struct stepper *t)
{
    for (uint32_t i = 0; i < t->watched_n; i++)
        memcpy(t->copy + t->watched[i].at, t->w->map + t->watched[i].at, t->watched[i].bytes);
    t->locks = locks_of(t);
}

void step_accept_all(struct stepper *t)
{
    memcpy(t->copy, t->w->map, t->w->g.slot_table);
    memcpy(t->copy + t->w->g.payload, t->w->map + t->w->g.payload, t->w->g.capacity);
    step_accept(t);
}

void step_end(struct stepper *t)
{
    int status;
    if (t->child > 0) {
        kill(t->child, SIGKILL);
        while (waitpid(t->child, &status, __WALL) > 0 && !WIFEXITED(status) && !WIFSIGNALED(status))
            ;
    }
    t->child = 0;
}
