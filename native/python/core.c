/* core.c - the module, and its type Core: calls of the core for one attachment.
 *
 * They take keys as a list or tuple of bytes of one length, and give None for any others, which go Python's way.
 */
#include "fast.h"

struct fast_calls fast_calls;
static PyObject *statuses; /* by the core's codes */

void fast_raise(struct fast_core *core, int64_t rc)
{
    Py_XDECREF(PyObject_CallMethod(core->attachment, "check", "L", (long long)rc));
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)kwargs;
    PyObject *attachment, *handle, *reads, *to_read, *to_write;
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "OOKOOO", &attachment, &handle, &address, &reads, &to_read, &to_write))
        return NULL;
    struct fast_core *core = (struct fast_core *)PyType_GenericAlloc(type, 0);
    if (!core)
        return NULL;
    core->attachment = Py_NewRef(attachment);
    core->handle = Py_NewRef(handle);
    core->reads = Py_NewRef(reads);
    core->payload[0] = Py_NewRef(to_read);
    core->payload[1] = Py_NewRef(to_write);
    core->segment = (struct sc_segment *)(uintptr_t)address;
    return (PyObject *)core;
}

static int core_traverse(struct fast_core *core, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(core));
    Py_VISIT(core->attachment);
    Py_VISIT(core->handle);
    Py_VISIT(core->reads);
    Py_VISIT(core->payload[0]);
    Py_VISIT(core->payload[1]);
    return 0;
}

static void core_free(struct fast_core *core)
{
    PyTypeObject *type = Py_TYPE(core);
    PyObject_GC_UnTrack(core);
    Py_XDECREF(core->attachment);
    Py_XDECREF(core->reads);
    Py_XDECREF(core->payload[0]);
    Py_XDECREF(core->payload[1]);
    Py_XDECREF(core->handle);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(core);
    Py_DECREF(type);
}

/* read(keys, flags): a batch of the type for reads. */
static PyObject *core_read(struct fast_core *core, PyObject *const *args, Py_ssize_t n)
{
    struct fast_keys keys;
    long flags = n == 2 ? PyLong_AsLong(args[1]) : (PyErr_BadArgument(), -1);
    if (flags == -1 && PyErr_Occurred())
        return NULL;
    if (!fast_keys_pack(args[0], &keys))
        Py_RETURN_NONE;
    struct fast_batch *b = fast_batch_new((PyTypeObject *)core->reads, core, keys, false);
    if (b && !fast_batch_read(b, (int)flags))
        Py_CLEAR(b);
    return (PyObject *)b;
}

/* batch(type, packed, writable): one that Python has read, or reserves, the objects of. */
static PyObject *core_batch(struct fast_core *core, PyObject *args)
{
    PyObject *type, *packed;
    int writable;
    struct fast_keys keys;
    if (!PyArg_ParseTuple(args, "OO!p", &type, &PyTuple_Type, &packed, &writable) || !fast_keys_load(packed, &keys))
        return NULL;
    return (PyObject *)fast_batch_new((PyTypeObject *)type, core, keys, writable);
}

static PyObject *core_lookup(struct fast_core *core, PyObject *arg)
{
    struct fast_keys k;
    if (!fast_keys_pack(arg, &k))
        Py_RETURN_NONE;
    const char *data = PyBytes_AsString(k.data);
    int64_t found;
    if (k.n <= FAST_FEW) {
        found = fast_calls.lookup(core->segment, data, k.width, NULL, k.n);
    } else {
        Py_BEGIN_ALLOW_THREADS
        found = fast_calls.lookup(core->segment, data, k.width, NULL, k.n);
        Py_END_ALLOW_THREADS
    }
    fast_keys_drop(&k);
    if (found >= 0)
        return PyLong_FromLongLong(found);
    fast_raise(core, found);
    return NULL;
}

static PyObject *status_list(const int8_t *codes, uint32_t n)
{
    PyObject *list = PyList_New(n);
    for (uint32_t i = 0; list && i < n; i++) {
        PyObject *status = PyTuple_GetItem(statuses, codes[i]);
        if (!status || PyList_SetItem(list, i, Py_NewRef(status)) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* each(function, keys[, ranks]): what became of each key. The function by its address; it may wait for the arena lock. */
typedef __typeof__(sc_finish_read) each_call;
typedef __typeof__(sc_reserve_read) each_rank_call;

static PyObject *core_each(struct fast_core *core, PyObject *const *args, Py_ssize_t n)
{
    enum { HERE = 64 };
    struct fast_keys k;
    size_t function = n == 2 || n == 3 ? PyLong_AsSize_t(args[0]) : (size_t)(PyErr_BadArgument(), -1);
    long ranks = n == 3 ? PyLong_AsLong(args[2]) : 0;
    if (PyErr_Occurred())
        return NULL;
    if (!fast_keys_pack(args[1], &k))
        Py_RETURN_NONE;
    int8_t here[HERE], *codes = k.n <= HERE ? here : PyMem_Malloc(k.n);
    if (!codes) {
        fast_keys_drop(&k);
        return PyErr_NoMemory();
    }
    const char *data = PyBytes_AsString(k.data);
    int64_t ok;
    Py_BEGIN_ALLOW_THREADS
    if (n == 3)
        ok = ((each_rank_call *)function)(core->segment, data, k.width, NULL, k.n, (uint32_t)ranks, codes);
    else
        ok = ((each_call *)function)(core->segment, data, k.width, NULL, k.n, codes);
    Py_END_ALLOW_THREADS
    PyObject *list = ok < 0 ? NULL : status_list(codes, k.n);
    if (ok < 0)
        fast_raise(core, ok);
    if (codes != here)
        PyMem_Free(codes);
    fast_keys_drop(&k);
    return list;
}

static PyMethodDef core_methods[] = {
    {"read", (PyCFunction)(void (*)(void))core_read, METH_FASTCALL, NULL},
    {"batch", (PyCFunction)core_batch, METH_VARARGS, NULL},
    {"lookup", (PyCFunction)core_lookup, METH_O, NULL},
    {"each", (PyCFunction)(void (*)(void))core_each, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot core_slots[] = {
    {Py_tp_doc, "Calls of the core for one attachment."},
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_free},
    {Py_tp_traverse, core_traverse},
    {Py_tp_methods, core_methods},
    {0, NULL},
};
static PyType_Spec core_spec = {"shmcache._fast.Core", sizeof(struct fast_core), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, core_slots};

/* pack(keys) */
static PyObject *pack(PyObject *module, PyObject *keys)
{
    (void)module;
    struct fast_keys k;
    if (!fast_keys_pack(keys, &k))
        Py_RETURN_NONE;
    PyObject *packed = fast_keys_tuple(&k);
    fast_keys_drop(&k);
    return packed;
}

/* connect(read, release, lookup, statuses) */
static PyObject *connect(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long read, release, lookup;
    if (!PyArg_ParseTuple(args, "KKKO!", &read, &release, &lookup, &PyTuple_Type, &statuses))
        return NULL;
    Py_INCREF(statuses);
    fast_calls.read = (__typeof__(fast_calls.read))(uintptr_t)read;
    fast_calls.release = (__typeof__(fast_calls.release))(uintptr_t)release;
    fast_calls.lookup = (__typeof__(fast_calls.lookup))(uintptr_t)lookup;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_O, "pack(keys) -> (data, width, None, n), or None where the keys need another way"},
    {"connect", connect, METH_VARARGS, "connect(read, release, lookup, statuses): the core's functions, by address"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shmcache._fast", "Where Python costs more than the core.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    PyObject *module = PyModule_Create(&definition);
    PyObject *batch = PyType_FromSpec(&fast_batch_spec);
    PyObject *core = PyType_FromSpec(&core_spec);
    if (!module || !batch || !core || !fast_memory_ready() || PyModule_AddObjectRef(module, "Batch", batch) < 0 ||
        PyModule_AddObjectRef(module, "Core", core) < 0)
        Py_CLEAR(module);
    Py_XDECREF(batch);
    Py_XDECREF(core);
    return module;
}
