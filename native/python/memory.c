/* memory.c - region 0 on loan to one batch: an object that exports the mapping's bytes. All memoryviews of the batch, and
 * its arrays and tensors, refer to it, so that it dies when nothing of the batch is alive.
 */
#include "fast.h"

/* In 3.10 an exporter's slots have the numbers that they have in the limited API from 3.11 on, and Py_buffer the layout;
 * only its headers do not say so. */
typedef struct {
    void *buf;
    PyObject *obj;
    Py_ssize_t len, itemsize;
    int readonly, ndim;
    char *format;
    Py_ssize_t *shape, *strides, *suboffsets;
    void *internal;
} buffer;
enum { BF_GETBUFFER = 1, BF_WRITABLE = 1 };
int PyObject_GetBuffer(PyObject *exporter, buffer *view, int flags);
int PyBuffer_FillInfo(buffer *view, PyObject *exporter, void *buf, Py_ssize_t len, int readonly, int flags);
void PyBuffer_Release(buffer *view);

struct memory {
    PyObject_HEAD
    PyObject *mapping; /* a memoryview of its own: the mapping's count of them tells that there is one */
    buffer bytes;
    PyObject *weak;
};
static PyTypeObject *memory_type;

PyObject *fast_memory_over(PyObject *payload, bool writable)
{
    struct memory *m = (struct memory *)PyType_GenericAlloc(memory_type, 0);
    if (!m)
        return NULL;
    m->mapping = PyMemoryView_FromObject(payload);
    if (!m->mapping || PyObject_GetBuffer(m->mapping, &m->bytes, writable ? BF_WRITABLE : 0) < 0)
        Py_CLEAR(m);
    return (PyObject *)m;
}

static int memory_export(struct memory *m, buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)m, m->bytes.buf, m->bytes.len, m->bytes.readonly, flags);
}

static void memory_free(struct memory *m)
{
    PyTypeObject *type = Py_TYPE(m);
    if (m->weak)
        PyObject_ClearWeakRefs((PyObject *)m);
    if (m->bytes.obj)
        PyBuffer_Release(&m->bytes);
    Py_XDECREF(m->mapping);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(m);
    Py_DECREF(type);
}

static PyMemberDef memory_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct memory, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot memory_slots[] = {
    {BF_GETBUFFER, memory_export},
    {Py_tp_dealloc, memory_free},
    {Py_tp_members, memory_members},
    {0, NULL},
};
static PyType_Spec memory_spec = {"shmcache._fast.Memory", sizeof(struct memory), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, memory_slots};

bool fast_memory_ready(void)
{
    memory_type = (PyTypeObject *)PyType_FromSpec(&memory_spec);
    return memory_type;
}
