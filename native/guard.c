#define _GNU_SOURCE
#include "guard.h"

#include "lane.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

/* What this thread is inside of; read by the handler in the same thread. */
static SC_THREAD struct sc_segment *volatile inside;
static SC_THREAD uint32_t depth;
static SC_THREAD char *volatile payload;
static SC_THREAD uint64_t payload_bytes;

SC_THREAD uint32_t sc_known_to_live;

static struct sigaction before;

static bool zeros(void *at, uint64_t bytes)
{
    return mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

static bool within(const void *at, const void *from, uint64_t bytes)
{
    return from && (uintptr_t)at - (uintptr_t)from < bytes;
}

/* True: the fault was ours, and its instruction finds zeros now. */
static bool survived(struct sc_segment *s, char *at)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    char *from = at - (uintptr_t)at % page;
    bool metadata = within(at, s->base, s->base_bytes);
    if (metadata ? !zeros(s->base, s->base_bytes) : !within(at, payload, payload_bytes) || !zeros(from, page))
        return false;
    sc_store32(&s->damaged, 1);
    if (metadata)
        sc_store32(&s->blind, 1);
    return true;
}

static void chain(int number, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        struct sigaction plain = {.sa_handler = SIG_DFL};
        sigaction(number, &plain, NULL);
        if (info->si_code <= 0)
            raise(number); /* nothing will fault again */
    } else {
        before.sa_handler(number);
    }
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct sc_segment *s = inside;
    int error = errno;
    /* Python's faulthandler, where it was enabled after us, reports the fault, puts us back and raises the signal: to
     * return lets the instruction fault once more. */
    bool ours = s && (info->si_code > 0 ? survived(s, info->si_addr) : info->si_code == SI_TKILL && info->si_pid == getpid());
    if (!ours)
        chain(number, info, context);
    errno = error;
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGBUS, &action, &before);
}

void sc_guard_install(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
}

void sc_guard(struct sc_segment *s)
{
    if (depth++ == 0)
        sc_known_to_live = 0;
    inside = s;
}

int64_t sc_unguard(struct sc_segment *s, int64_t rc)
{
    if (--depth == 0)
        inside = NULL;
    /* The arena lock, if this lane has it, stays taken in the file: others must find its holder dead, and the cut. */
    if (sc_load32(&s->blind) && s->lane != SC_NO_SLOT)
        sc_lane_let_go(s);
    return sc_load32(&s->damaged) && rc != SC_E_CLOSED ? SC_E_DAMAGED : rc;
}

void sc_guard_payload(char *at, uint64_t bytes)
{
    payload_bytes = bytes;
    payload = at;
}

bool sc_whole(struct sc_segment *s)
{
    off_t end = lseek(s->lock_fd, 0, SEEK_END); /* half the price of fstat */
    if (end >= 0 && (uint64_t)end < s->g.segment_bytes)
        sc_store32(&s->damaged, 1);
    return !sc_load32(&s->damaged);
}
