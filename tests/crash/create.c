#define _GNU_SOURCE
#include "extras.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

struct file { int fd; struct stat st; uint8_t head[4096]; };

static void look(struct file *f)
{
    memset(f->head, 0, sizeof f->head);
    if (fstat(f->fd, &f->st) < 0 || pread(f->fd, f->head, sizeof f->head, 0) < 0)
        die("look");
}

static void child_main(int fd, const struct sc_config *config, volatile int *done)
{
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
        _exit(2);
    raise(SIGSTOP);
    *done = sc_format(fd, config) == 0 ? 1 : -1;
    for (;;)
        pause();
}

/* What the maker left, in a file of its own. */
static void check(const struct file *left, bool whole, struct result *r)
{
    struct sc_segment s = {0};
    uint32_t pid;
    char text[500];
    int fd = memfd_create("copy", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, left->st.st_size) < 0 ||
        pwrite(fd, left->head, left->st.st_size < 4096 ? (size_t)left->st.st_size : 4096, 0) < 0)
        die("copy");
    int rc = sc_segment_open(fd, true, &s);
    if (whole != (rc == 0) || (rc < 0 && rc != SC_E_DAMAGED))
        found(&r->report, "after %llu instructions a %s file gives %d", (unsigned long long)r->instructions,
              whole ? "whole" : "half-made", rc);
    if (rc == 0 && (sc_join(&s, "", 0, 0, 1, &pid) != 0 || sc_verify(&s, text, sizeof text) != 0 || sc_close(&s) != 0))
        found(&r->report, "a new arena cannot be used");
    sc_segment_shut(&s);
    close(fd);
    r->checks++;
}

void run_create(struct bench *b, struct result *r)
{
    struct sc_config config = world_config();
    struct file now = {.fd = memfd_create("made", MFD_CLOEXEC)}, then;
    volatile int *done = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status;
    (void)b;
    look(&now);
    then = now;
    check(&now, false, r);
    pid_t child = fork();
    if (child == 0)
        child_main(now.fd, &config, done);
    for (waitpid(child, &status, __WALL); WIFSTOPPED(status) && !*done; waitpid(child, &status, __WALL)) {
        look(&now);
        if (now.st.st_size != then.st.st_size || memcmp(now.head, then.head, sizeof now.head) != 0) {
            r->stops++;
            check(&now, ((const struct sc_header *)now.head)->magic == SC_MAGIC, r);
        }
        then = now;
        r->instructions++;
        ptrace(PTRACE_SINGLESTEP, child, NULL, NULL);
    }
    if (*done != 1 || r->stops < 2)
        found(&r->report, "sc_format ended with %d after %llu changes", *done, (unsigned long long)r->stops);
    r->distinct = r->stops + 1;
    kill(child, SIGKILL);
    waitpid(child, &status, __WALL);
    munmap((void *)done, 4096);
    close(now.fd);
}
