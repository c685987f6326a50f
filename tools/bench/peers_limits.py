"""What nobody can beat: memcpy out of and into memory of /dev/shm, preadv of a file there, and calls into C.

The call is one through cffi's API mode that does nothing; the loop of atomics is one such call for a whole batch that
does for each key what a share costs at least: one atomic instruction to take it, and one to give it back.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from peers_common import BATCH, Missing, Store, System, Work

C_DECLARATION = "void nothing(void); void take_and_give(uint64_t *words, int count);"
C_SOURCE = """\
#include <stdint.h>
static void nothing(void) { }
static void take_and_give(uint64_t *words, int count)
{
    for (int i = 0; i < count; i++) {  /* a share word in a cache line of its own, as in an arena */
        __atomic_fetch_add(&words[8 * i], 1, __ATOMIC_SEQ_CST);
        __atomic_fetch_sub(&words[8 * i], 1, __ATOMIC_SEQ_CST);
    }
}
"""


@contextmanager
def _file(nbytes: int) -> Iterator[tuple[int, Any]]:
    """A file on tmpfs, as an arena is one, every page of which is there: its descriptor, its mapping as an array."""
    with tempfile.NamedTemporaryFile(prefix=f"shmcache-bench-{os.getpid()}-", dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        memory = np.memmap(file.name, np.uint8, "r+", shape=(nbytes,))
        memory[::4096] = 1
        yield file.fileno(), memory


class Memcpy(System):
    name = "memcpy"
    about = "numpy's copy out of, or into, a mapping of /dev/shm"
    limit = True

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        size = len(value)
        with _file(len(keys) * size) as (_, memory):
            places = {key: memory[i * size : (i + 1) * size] for i, key in enumerate(keys)}
            turn = Turn(list(places.values()))
            source, private = np.frombuffer(value, np.uint8), np.empty(size, np.uint8)

            def copy_out(key: bytes) -> bool:
                np.copyto(private, places[key])
                return True

            works: dict[str, Work] = {
                "hit": copy_out,
                "put_new": lambda _: np.copyto(turn.next(), source),
                "put_over": lambda key: np.copyto(places[key], source),
            }
            store = Store(works)
            works["hits"] = store.each("hit")
            yield store
            works.clear()


class Turn:
    """One element after the other, and again."""

    def __init__(self, elements: Sequence[Any]) -> None:
        self.elements, self.at = elements, -1

    def next(self) -> Any:
        self.at = (self.at + 1) % len(self.elements)
        return self.elements[self.at]


class Preadv(System):
    name = "preadv"
    about = "preadv of a file on tmpfs into memory of the process"
    limit = True

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        size = len(value)
        with _file(len(keys) * size) as (file, _):
            places = {key: i * size for i, key in enumerate(keys)}
            private = [bytearray(size)]
            works: dict[str, Work] = {"hit": lambda key: os.preadv(file, private, places[key])}
            store = Store(works)
            works["hits"] = store.each("hit")
            yield store


class Call(System):
    name = "cffi call"
    about = "a call into C that does nothing; for a batch, one call with two atomic instructions a key"
    limit = True
    ffi: Any
    lib: Any

    def start(self) -> None:
        builder = import_module("cffi").FFI()
        builder.cdef(C_DECLARATION)
        builder.set_source("_shmcache_bench_call", C_SOURCE, extra_compile_args=["-O2"])
        sys.path.insert(0, str(self.folder))
        try:
            builder.compile(tmpdir=str(self.folder))
            module = import_module("_shmcache_bench_call")
        except Exception as error:  # noqa: BLE001 # whatever a compiler may do
            raise Missing(f"needs a C compiler: {error}") from None
        finally:
            sys.path.remove(str(self.folder))
        self.ffi, self.lib = module.ffi, module.lib

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:  # noqa: ARG002
        nothing, loop = self.lib.nothing, self.lib.take_and_give
        with _file(BATCH * 64) as (_, memory):
            words = self.ffi.cast("uint64_t *", self.ffi.from_buffer(memory))
            works: dict[str, Work] = {
                "hit": lambda _: nothing() is None,
                "hits": lambda some: loop(words, len(some)),
                "miss": lambda _: nothing(),
            }
            yield Store(works)
