/* keys.c - keys from Python objects to packed bytes. Joining in Python costs three times as much as all that the core
 * does for a key.
 */
#include "fast.h"

#include <string.h>

enum { MAX_KEY = 64 };

/* Borrowed. The list may change while others run; each item is checked when it is looked at. */
static PyObject *item(PyObject *keys, Py_ssize_t i)
{
    return PyList_Check(keys) ? PyList_GetItem(keys, i) : PyTuple_GetItem(keys, i);
}

static bool is_key(PyObject *key, Py_ssize_t width)
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

bool fast_keys_pack(PyObject *keys, struct fast_keys *k)
{
    if (Py_TYPE(keys) != &PyList_Type && Py_TYPE(keys) != &PyTuple_Type)
        return false;
    Py_ssize_t n = PyList_Check(keys) ? PyList_Size(keys) : PyTuple_Size(keys);
    PyObject *first = n > 0 && n <= UINT32_MAX ? item(keys, 0) : NULL;
    Py_ssize_t width = first && Py_TYPE(first) == &PyBytes_Type ? PyBytes_Size(first) : 0;
    if (width < 1 || width > MAX_KEY)
        return false;
    PyObject *joined = n == 1 ? Py_NewRef(first) : join(keys, n, width);
    if (!joined)
        PyErr_Clear();
    *k = (struct fast_keys){joined, NULL, (uint32_t)width, (uint32_t)n};
    return joined;
}

bool fast_keys_load(PyObject *packed, struct fast_keys *k)
{
    unsigned int width, n;
    if (!PyArg_ParseTuple(packed, "OIOI", &k->data, &width, &k->ends, &n))
        return false;
    *k = (struct fast_keys){Py_NewRef(k->data), Py_NewRef(k->ends), width, n};
    return true;
}

PyObject *fast_keys_tuple(const struct fast_keys *k)
{
    return Py_BuildValue("(OIOI)", k->data, k->width, k->ends ? k->ends : Py_None, k->n);
}

void fast_keys_drop(struct fast_keys *k)
{
    Py_CLEAR(k->data);
    Py_CLEAR(k->ends);
}
