/* fast.h - what the files of the extension module shmcache._fast share.
 *
 * The module is the part of the package where Python itself would cost more than the core does: keys of lists to packed
 * bytes (keys.c), the calls of the core that read or grant (core.c), batches and their memoryviews (batch.c, memory.c). It
 * decides nothing: what is out of the common way goes to Python methods. It keeps to the limited API of 3.10.
 *
 * It relies on the GIL: what is looked at and changed without a call of Python's between is one step to other threads.
 */
#ifndef SC_FAST_H
#define SC_FAST_H

#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stdint.h>

#include "shmcache.cdef.h"

/* The core, which is linked into another module: its functions by address. */
struct fast_calls {
    __typeof__(sc_read) *read;
    __typeof__(sc_release) *release;
    __typeof__(sc_lookup) *lookup;
};
extern struct fast_calls fast_calls;

/* Keys of one width, one after the other in `data`: bytes. As Python has them, `data` may be a matrix and width 0, with
 * `ends` an array; see Packed in _keys.py. */
struct fast_keys { PyObject *data, *ends; uint32_t width, n; };

/* Packs a list or tuple of bytes of one length, 1 to 64. False: the keys need another way; no exception is set. */
bool fast_keys_pack(PyObject *keys, struct fast_keys *k);
/* From and to Python's tuple. */
bool fast_keys_load(PyObject *packed, struct fast_keys *k);
PyObject *fast_keys_tuple(const struct fast_keys *k);
void fast_keys_drop(struct fast_keys *k);

/* One attachment, as its batches see it. */
struct fast_core {
    PyObject_HEAD
    PyObject *attachment, *handle;  /* the latter keeps the memory of segment */
    PyObject *reads;                /* the type of the batches of read */
    PyObject *payload[2];           /* callables that give the mapping of region 0: to read, to write */
    struct sc_segment *segment;
};

/* A core's answer below zero as the exception that it stands for. */
void fast_raise(struct fast_core *core, int64_t rc);

struct fast_batch;
extern PyType_Spec fast_batch_spec;

/* A batch of these keys, which it takes over, whatever happens. NULL: an exception is set. */
struct fast_batch *fast_batch_new(PyTypeObject *type, struct fast_core *core, struct fast_keys keys, bool writable);
/* Takes the shares. From the first one on the batch gives them back. */
bool fast_batch_read(struct fast_batch *b, int flags);

/* An object of its own that exports the bytes of a memoryview. */
PyObject *fast_memory_over(PyObject *payload, bool writable);
/* Once, before the first. */
bool fast_memory_ready(void);

/* Calls of so few keys do not let go of the GIL: it costs more than they take. */
enum { FAST_FEW = 4 };

#endif
