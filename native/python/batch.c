/* batch.c - the base of ReadBatch and WriteBatch: the keys, what the core said of each, and the memoryviews.
 *
 *     batch --> views, root --> managed buffer --> memory --> mapping of the payload
 *               (memoryviews)   (of CPython's)
 *
 * A batch is open from its making until its shares are back (or its writing has ended, which is Python's to say): who
 * sets open to 0 gives them back, once. All memoryviews of a batch, and all slices of them, count on one managed buffer,
 * so that its count tells whether anything but the batch's own views is alive; arrays and tensors count in Python
 * (views.py), from when `borrowed` is set. Everything refers to `memory`: when that dies nothing of the batch is alive.
 *
 * A getter may lose the GIL while it allocates. So it makes what it gives before it looks whether the batch is open, and
 * whoever closes a batch looks at what was made before.
 */
#include "fast.h"

struct fast_batch {
    PyObject_HEAD
    struct fast_core *core;
    struct fast_keys keys;
    struct sc_ref *refs, one;          /* one a key; `one` where there is only one */
    long long ok;                      /* keys whose status is OK */
    char open, borrowed, writable;
    Py_ssize_t lent;                   /* memoryviews in views */
    PyObject *memory, *root, *views;   /* NULL until somebody looks */
    PyObject *loan, *device_loan;      /* Python's: arrays and tensors */
    PyObject *weak;
};

/* Making, reading */

struct fast_batch *fast_batch_new(PyTypeObject *type, struct fast_core *core, struct fast_keys keys, bool writable)
{
    struct fast_batch *b = (struct fast_batch *)PyType_GenericAlloc(type, 0);
    if (!b) {
        fast_keys_drop(&keys);
        return NULL;
    }
    Py_INCREF(core);
    b->core = core;
    b->keys = keys;
    b->writable = writable;
    b->refs = keys.n == 1 ? &b->one : PyMem_Calloc(keys.n ? keys.n : 1, sizeof *b->refs);
    if (!b->refs) {
        Py_DECREF(b);
        PyErr_NoMemory();
        return NULL;
    }
    b->open = 1;
    return b;
}

bool fast_batch_read(struct fast_batch *b, int flags)
{
    struct sc_segment *s = b->core->segment;
    const char *keys = PyBytes_AsString(b->keys.data);
    uint32_t n = b->keys.n;
    int64_t ok;
    if (n <= FAST_FEW) {
        ok = fast_calls.read(s, keys, b->keys.width, NULL, n, flags, b->refs);
    } else {
        Py_BEGIN_ALLOW_THREADS
        ok = fast_calls.read(s, keys, b->keys.width, NULL, n, flags, b->refs);
        Py_END_ALLOW_THREADS
    }
    if (ok < 0)
        fast_raise(b->core, ok);
    else
        b->ok = ok;
    return ok >= 0;
}

/* Giving back */

/* To give the last share of a temporary or lost object back may wait for the arena lock. */
static bool is_brief(const struct fast_batch *b)
{
    for (uint32_t i = 0; i < b->keys.n; i++)
        if (i == FAST_FEW || b->refs[i].temporary || b->refs[i].region)
            return false;
    return true;
}

static int note_first(PyObject *found, void *where)
{
    *(PyObject **)where = found;
    return 1;
}

/* A memoryview refers to one object, the managed buffer. */
static bool only_own_views(const struct fast_batch *b)
{
    PyObject *managed = NULL;
    ((traverseproc)PyType_GetSlot(Py_TYPE(b->root), Py_tp_traverse))(b->root, note_first, &managed);
    return managed && Py_REFCNT(managed) <= 1 + b->lent;
}

/* NULL where the status is not OK, or the object lies elsewhere. */
static PyObject *view_of(PyObject *root, const struct sc_ref *r)
{
    return r->status || r->region || !r->nbytes ? Py_NewRef(Py_None)
                                                : PySequence_GetSlice(root, (Py_ssize_t)r->offset,
                                                                      (Py_ssize_t)(r->offset + r->nbytes));
}

static bool release_view(PyObject *view)
{
    static PyObject *name;
    if (!name && !(name = PyUnicode_InternFromString("release")))
        return false;
    PyObject *none = PyMemoryView_Check(view) ? PyObject_CallMethodObjArgs(view, name, NULL) : Py_NewRef(Py_None);
    Py_XDECREF(none);
    return none;
}

/* A use of the views after this raises ValueError. False: one cannot be released, since its buffer is exported in a way
 * that only the export shows; the others are made anew. */
static bool end_views(struct fast_batch *b)
{
    bool own_list = b->views && Py_REFCNT(b->views) == 1;
    for (Py_ssize_t i = 0; b->views && i < PyList_Size(b->views); i++) {
        PyObject *view = PyList_GetItem(b->views, i);
        if ((own_list && Py_REFCNT(view) == 1) || release_view(view)) /* the former goes with the list */
            continue;
        PyErr_Clear();
        for (Py_ssize_t j = 0; j < i && j < b->keys.n; j++)
            if (PyList_SetItem(b->views, j, view_of(b->root, &b->refs[j])) < 0)
                PyErr_Clear();
        return false;
    }
    if (b->root && !release_view(b->root))
        PyErr_Clear();
    return true;
}

static void forget_views(struct fast_batch *b)
{
    Py_CLEAR(b->views);
    Py_CLEAR(b->root);
}

static void shut(struct fast_batch *b)
{
    b->open = 0;
    forget_views(b);
    Py_CLEAR(b->memory);
}

/* The end of an open batch, after end_views. Open no more before anything is called that could come back to it. */
static void give_back(struct fast_batch *b)
{
    struct sc_segment *s = b->core->segment;
    shut(b);
    if (is_brief(b)) {
        fast_calls.release(s, b->refs, b->keys.n);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    fast_calls.release(s, b->refs, b->keys.n);
    Py_END_ALLOW_THREADS
}

/* Ends the batch where it is plain that nothing made from it is alive; true where it is ended. */
static bool end(struct fast_batch *b)
{
    if (!b->open)
        return true;
    if (b->borrowed || (b->views && !(only_own_views(b) && end_views(b))))
        return false;
    give_back(b);
    return true;
}

static PyObject *batch_end(struct fast_batch *b, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(end(b));
}

/* For who has seen that nothing is alive, and gives the shares back in another way. */
static PyObject *batch_close(struct fast_batch *b, PyObject *unused)
{
    (void)unused;
    bool ended = end_views(b);
    if (ended)
        shut(b);
    return PyBool_FromLong(ended);
}

static PyObject *batch_let_go(struct fast_batch *b, PyObject *unused)
{
    (void)unused;
    PyObject *memory = b->memory;
    b->memory = NULL;
    forget_views(b);
    return memory ? memory : Py_NewRef(Py_None);
}

static PyObject *batch_enter(PyObject *b, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(b);
}

static PyObject *batch_exit(struct fast_batch *b, PyObject *const *args, Py_ssize_t n)
{
    if (end(b))
        Py_RETURN_NONE;
    return PyObject_CallMethod((PyObject *)b, "_leave", "O", n ? args[0] : Py_None);
}

/* What somebody still has may be among the views: only `memory` tells, once they are let go of. */
static void batch_finalize(struct fast_batch *b)
{
    PyObject *type, *value, *trace;
    if (!b->open)
        return;
    PyErr_Fetch(&type, &value, &trace);
    forget_views(b);
    if (b->open && !b->borrowed && (!b->memory || Py_REFCNT(b->memory) == 1)) {
        give_back(b);
    } else if (b->open) {
        PyObject *done = PyObject_CallMethod((PyObject *)b, "_hand_over", NULL);
        if (!done)
            PyErr_WriteUnraisable((PyObject *)b);
        Py_XDECREF(done);
    }
    PyErr_Restore(type, value, trace);
}

static void batch_free(struct fast_batch *b)
{
    PyTypeObject *type = Py_TYPE(b);
    PyObject_GC_UnTrack(b);
    if (b->weak)
        PyObject_ClearWeakRefs((PyObject *)b);
    if (b->refs != &b->one)
        PyMem_Free(b->refs);
    fast_keys_drop(&b->keys);
    Py_XDECREF(b->views);
    Py_XDECREF(b->root);
    Py_XDECREF(b->memory);
    Py_XDECREF(b->loan);
    Py_XDECREF(b->device_loan);
    Py_XDECREF(b->core);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(b);
    Py_DECREF(type);
}

/* There is no clear: whatever can be part of a cycle with a batch has one. */
static int batch_traverse(struct fast_batch *b, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(b));
    Py_VISIT(b->core);
    Py_VISIT(b->keys.data);
    Py_VISIT(b->views);
    Py_VISIT(b->loan);
    Py_VISIT(b->device_loan);
    return 0;
}

/* Lending */

/* ClosedError where the shares are back. */
static bool check_open(struct fast_batch *b)
{
    if (!b->open)
        Py_XDECREF(PyObject_CallMethod((PyObject *)b, "_refuse", NULL));
    return b->open;
}

/* One object for all, whichever thread was first. */
static PyObject *batch_memory(struct fast_batch *b, void *unused)
{
    (void)unused;
    if (!check_open(b))
        return NULL;
    if (!b->memory) {
        PyObject *payload = PyObject_CallNoArgs(b->core->payload[(int)b->writable]);
        PyObject *made = payload ? fast_memory_over(payload, b->writable) : NULL;
        Py_XDECREF(payload);
        if (!made || !b->open || !b->memory) {
            if (made && b->open)
                b->memory = Py_NewRef(made);
            return made;
        }
        Py_DECREF(made);
    }
    return Py_NewRef(b->memory);
}

/* A list of one view a key, and in *lent how many are no None. */
static PyObject *slices(const struct fast_batch *b, PyObject *root, Py_ssize_t *lent)
{
    PyObject *views = PyList_New(b->keys.n);
    *lent = 0;
    for (uint32_t i = 0; views && i < b->keys.n; i++) {
        PyObject *view = view_of(root, &b->refs[i]);
        *lent += view && view != Py_None;
        if (!view || PyList_SetItem(views, i, view) < 0)
            Py_CLEAR(views);
    }
    return views;
}

static bool make_views(struct fast_batch *b)
{
    Py_ssize_t lent = 0;
    PyObject *memory = batch_memory(b, NULL);
    PyObject *root = memory ? PyMemoryView_FromObject(memory) : NULL;
    PyObject *views = root ? slices(b, root, &lent) : NULL;
    bool made = views;
    if (made && b->open && !b->views) { /* else another thread has released the batch, or made them */
        b->lent = lent;
        b->root = Py_NewRef(root);
        b->views = Py_NewRef(views);
    }
    Py_XDECREF(views);
    Py_XDECREF(root);
    Py_XDECREF(memory);
    return made;
}

static PyObject *batch_views(struct fast_batch *b, void *unused)
{
    (void)unused;
    if ((!b->views && !make_views(b)) || !check_open(b))
        return NULL;
    return Py_NewRef(b->views);
}

/* For who makes arrays or tensors: from now on only Python can tell whether anything is alive. */
static PyObject *batch_borrow(struct fast_batch *b, PyObject *unused)
{
    (void)unused;
    if (!check_open(b))
        return NULL;
    b->borrowed = 1;
    Py_RETURN_NONE;
}

static PyObject *batch_packed(struct fast_batch *b, void *unused)
{
    (void)unused;
    return fast_keys_tuple(&b->keys);
}

static PyObject *batch_address(struct fast_batch *b, void *unused)
{
    (void)unused;
    return PyLong_FromVoidPtr(b->refs);
}

static PyObject *batch_attachment(struct fast_batch *b, void *unused)
{
    (void)unused;
    return Py_NewRef(b->core->attachment);
}

static Py_ssize_t batch_length(struct fast_batch *b) { return b->keys.n; }

static PyMethodDef batch_methods[] = {
    {"_end", (PyCFunction)batch_end, METH_NOARGS, "Gives the shares back, unless something may be alive: whether."},
    {"_close", (PyCFunction)batch_close, METH_NOARGS, "Ends the batch, but for its shares; False: a view cannot be released."},
    {"_let_go", (PyCFunction)batch_let_go, METH_NOARGS, "Forgets the views; what they refer to, or None."},
    {"_borrow", (PyCFunction)batch_borrow, METH_NOARGS, "Says that arrays or tensors will be made; or ClosedError."},
    {"__enter__", batch_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))batch_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef batch_getters[] = {
    {"views", (getter)batch_views, NULL,
     "One memoryview of bytes a key, or None where the status is not OK, or the object lies in device memory. Made at "
     "the first call.", NULL},
    {"_memory", (getter)batch_memory, NULL, "What all that is made from the batch refers to.", NULL},
    {"_packed", (getter)batch_packed, NULL, NULL, NULL},
    {"_address", (getter)batch_address, NULL, "Of the struct sc_ref of the first key.", NULL},
    {"_attachment", (getter)batch_attachment, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMemberDef batch_members[] = {
    {"_ok", T_LONGLONG, offsetof(struct fast_batch, ok), 0, NULL},
    {"_open", T_BOOL, offsetof(struct fast_batch, open), 0, NULL},
    {"_lent", T_PYSSIZET, offsetof(struct fast_batch, lent), READONLY, NULL},
    {"_root", T_OBJECT, offsetof(struct fast_batch, root), READONLY, NULL},
    {"_views", T_OBJECT, offsetof(struct fast_batch, views), READONLY, NULL},
    {"_loan", T_OBJECT, offsetof(struct fast_batch, loan), 0, NULL},
    {"_device_loan", T_OBJECT, offsetof(struct fast_batch, device_loan), 0, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct fast_batch, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot batch_slots[] = {
    {Py_tp_doc, "Keys, what the core said of each, and memoryviews of those that are OK."},
    {Py_tp_dealloc, batch_free},
    {Py_tp_finalize, batch_finalize},
    {Py_tp_traverse, batch_traverse},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_getters},
    {Py_tp_members, batch_members},
    {Py_sq_length, batch_length},
    {0, NULL},
};
PyType_Spec fast_batch_spec = {"shmcache._fast.Batch", sizeof(struct fast_batch), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
                                   Py_TPFLAGS_DISALLOW_INSTANTIATION,
                               batch_slots};
