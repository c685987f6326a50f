/* pack.c - keys from Python objects to packed bytes: the one piece that works on Python objects, and so an extension
 * module of its own (shmcache._pack) beside cffi's. It knows nothing of arenas. Joining in Python costs three times as
 * much as all that the core does for a key.
 */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <string.h>

enum { MAX_KEY = 64 };

/* Borrowed. The list may change while others run; each item is checked when it is looked at. */
static PyObject *item(PyObject *keys, Py_ssize_t i)
{
    return PyList_Check(keys) ? PyList_GetItem(keys, i) : PyTuple_GetItem(keys, i);
}

static int is_key(PyObject *key, Py_ssize_t width)
{
    return key && Py_TYPE(key) == &PyBytes_Type && PyBytes_Size(key) == width;
}

static PyObject *join(PyObject *keys, Py_ssize_t n, Py_ssize_t width)
{
    PyObject *joined = PyBytes_FromStringAndSize(NULL, n * width);
    if (!joined)
        return NULL;
    char *at = PyBytes_AsString(joined);
    for (Py_ssize_t i = 0; i < n; i++, at += width) {
        PyObject *key = item(keys, i);
        if (!is_key(key, width)) {
            Py_DECREF(joined);
            return NULL;
        }
        memcpy(at, PyBytes_AsString(key), (size_t)width);
    }
    return joined;
}

/* None where the keys are anything else than a list or tuple of bytes of one length, 1 to 64. */
static PyObject *pack(PyObject *module, PyObject *keys)
{
    (void)module;
    if (Py_TYPE(keys) != &PyList_Type && Py_TYPE(keys) != &PyTuple_Type)
        Py_RETURN_NONE;
    Py_ssize_t n = PyList_Check(keys) ? PyList_Size(keys) : PyTuple_Size(keys);
    PyObject *first = n > 0 ? item(keys, 0) : NULL;
    Py_ssize_t width = first && Py_TYPE(first) == &PyBytes_Type ? PyBytes_Size(first) : 0;
    if (width < 1 || width > MAX_KEY)
        Py_RETURN_NONE;
    PyObject *joined = n == 1 ? Py_NewRef(first) : join(keys, n, width);
    if (joined)
        return Py_BuildValue("(NnOn)", joined, width, Py_None, n);
    PyErr_Clear();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_O, "pack(keys) -> (data, width, None, n), or None where the keys need another way"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shmcache._pack", "Packs keys.", -1, methods, NULL, NULL, NULL, NULL,
};
PyMODINIT_FUNC PyInit__pack(void) { return PyModule_Create(&definition); }
