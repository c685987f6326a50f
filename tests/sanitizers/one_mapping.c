/* one_mapping.c - see one_mapping.h. Linked with --wrap for the four functions of the system that it replaces. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include "one_mapping.h"

void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t bytes);
int __real_fcntl(int fd, int command, ...);
int __real_close(int fd);

static void *mapping;
static size_t mapped;

void one_mapping_begin(int fd, size_t bytes)
{
    mapped = bytes;
    mapping = __real_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}
void *one_mapping(void) { return mapping; }
void one_mapping_end(void) { __real_munmap(mapping, mapped); }

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (fd >= 0 && offset == 0 && bytes <= mapped)
        return mapping;
    return __real_mmap(at, bytes, protection, flags, fd, offset);
}

int __wrap_munmap(void *at, size_t bytes) { return at == mapping ? 0 : __real_munmap(at, bytes); }

/* Who has each byte that lanes lock: lock_fd, or 0. Relaxed, so that the book-keeping orders
 * nothing by itself; not by stdatomic.h, which may be a simulation. */
enum { LANE_BYTES = 2048 };
static int holder[KERNEL_LOCKS];

static unsigned place_of(const struct flock *f)
{
    return (unsigned)(f->l_start / LANE_BYTES * 2 + (f->l_start % LANE_BYTES != 0)) % KERNEL_LOCKS;
}

int __wrap_fcntl(int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    struct flock *f = va_arg(args, struct flock *);
    va_end(args);
    if (command != F_OFD_SETLK && command != F_OFD_GETLK)
        return __real_fcntl(fd, command, f);
    unsigned at = place_of(f);
    if (f->l_type == F_UNLCK) {
        __atomic_store_n(&holder[at], 0, __ATOMIC_RELAXED);
        kernel_release(at);
    }
    bool locks = f->l_type != F_UNLCK;
    int rc = __real_fcntl(fd, command, f);
    if (rc == 0 && locks && command == F_OFD_SETLK)
        __atomic_store_n(&holder[at], fd, __ATOMIC_RELAXED);
    if (rc == 0 && locks && (command == F_OFD_SETLK || f->l_type == F_UNLCK))
        kernel_acquire(at); /* after whoever had it */
    return rc;
}

int __wrap_close(int fd)
{
    for (unsigned at = 0; at < KERNEL_LOCKS; at++)
        if (__atomic_load_n(&holder[at], __ATOMIC_RELAXED) == fd) {
            __atomic_store_n(&holder[at], 0, __ATOMIC_RELAXED);
            kernel_release(at);
        }
    return __real_close(fd);
}
