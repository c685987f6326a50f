/* one_mapping.h - lanes within one process: every mapping of the segment is one mapping, so that a tool that watches
 * addresses knows all lanes' accesses as accesses to the same memory; and the tool is told of what the kernel's locks
 * order, which it cannot see.
 *
 * Each lane keeps its own lock_fd: open-file-description locks work between threads as they do between processes, and
 * closing lock_fd is the lane's death as the others see it.
 */
#ifndef ONE_MAPPING_H
#define ONE_MAPPING_H

#include <stdbool.h>
#include <stddef.h>

/* Maps the whole segment behind fd: from now on each mmap of a file from its beginning on is this mapping. */
void one_mapping_begin(int fd, size_t bytes);
void *one_mapping(void);
void one_mapping_end(void);

/* Whoever gets a lock of the kernel, or sees it free, comes after whoever had it. Defined by the program. */
enum { KERNEL_LOCKS = 1024 };
void kernel_acquire(unsigned lock);
void kernel_release(unsigned lock);

#endif
