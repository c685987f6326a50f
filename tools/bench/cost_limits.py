"""The limits: loops in C (limits.c) that do what every core of this design must do at least, and nothing else.

They are compiled at the first use into a folder that is gone afterwards, in the way that the core itself is: by cffi's
API mode, so that a call of them is also what a bare call from Python costs. That takes a C compiler and Python's
headers; where they are missing there are no limits, and a line says so.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from cost_common import WIDTH, Run

SOURCE = Path(__file__).with_name("limits.c")
COMPILE_ARGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-w")
COMPILE_S = 120.0
DECLARED = """
    struct limit;
    struct limit *limit_open(const char *keys, uint32_t n);
    void limit_close(struct limit *t);
    uint64_t limit_lookup(struct limit *t, const char *keys, uint32_t n);
    uint64_t limit_share(struct limit *t, const char *keys, uint32_t n, bool back_by_key);
    uint64_t limit_words(struct limit *t, const uint32_t *slots, uint32_t n);
    int64_t limit_call(struct limit *t, const char *keys, uint32_t width, const uint32_t *ends, uint32_t n);
    void limit_copy(char **targets, uint32_t at, const char *source, uint64_t bytes);
    char *limit_map(uint64_t bytes, bool huge);
    void limit_unmap(char *p, uint64_t bytes);
    void limit_touch(char *p, uint64_t bytes);
"""
LOOKUP, GRANT, READ, WORDS = "C lookup", "C lookups + CAS", "C lookup + CAS", "C CAS alone"
CALL, TWO_CALLS = "cffi call", "2 cffi calls"


@cache
def load() -> tuple[Any, str]:
    """The compiled module, or None and why there is none."""
    compiler = _compiler()
    if not compiler:
        return None, "no C compiler on the PATH, so there are no limits to compare with"
    with tempfile.TemporaryDirectory(prefix="shmcache-bench-") as folder:
        built = Path(folder, "_limits.so")
        ffi = FFI()
        ffi.cdef(DECLARED)
        ffi.set_source("_limits", SOURCE.read_text(encoding="utf-8"))
        with redirect_stdout(StringIO()):  # it tells what it does
            ffi.emit_c_code(str(built.with_suffix(".c")))
        headers = [f"-I{sysconfig.get_path(which)}" for which in ("include", "platinclude")]
        command = [*compiler, *COMPILE_ARGS, *headers, "-o", str(built), str(built.with_suffix(".c"))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"limits.c cannot be compiled, so there are no limits to compare with: {_reason(error)}"
        spec = spec_from_file_location("_limits", built)
        assert spec is not None  # noqa: S101 # of a file with such a name
        assert spec.loader is not None  # noqa: S101
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module, ""


def _compiler() -> list[str]:
    """Its command; none where there is no compiler."""
    named = shlex.split(os.environ.get("CC", ""))
    return named or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]


def _reason(error: Exception) -> str:
    """The compiler's first error, in one line."""
    said = str(getattr(error, "stderr", None) or error).splitlines()
    return next((line for line in said if "error" in line), said[0] if said else type(error).__name__)


def copier(targets: Sequence[Any], source: bytes) -> Callable[[int], None] | None:
    """Copies ``source`` into the target (a writable buffer) of a number; None where there is no compiler."""
    module, _ = load()
    if module is None:
        return None
    copy, size = module.lib.limit_copy, len(source)
    keep = [module.ffi.from_buffer("char[]", target, require_writable=True) for target in targets]
    pointers = module.ffi.new("char *[]", keep)
    keep.clear()  # else the targets could not be given back; who has the copier keeps them
    return lambda at: copy(pointers, at, source, size)


class Table:
    """The limits' own table of the keys of a matrix; a row's slot has the row's number."""

    def __init__(self, module: Any, keys: Any) -> None:
        self._lib, self._ffi = module.lib, module.ffi
        self.objects = len(keys)
        self._table = self._lib.limit_open(self._ffi.from_buffer("char[]", keys), len(keys))
        if not self._table:
            raise RuntimeError(f"no memory for the limits of {len(keys):,} objects")

    def close(self) -> None:
        self._lib.limit_close(self._table)

    def by_keys(self, passes: Iterator[Any], units: int) -> dict[str, Run]:
        """Each repeat takes the next of ``passes``, each a matrix of so many keys of the table."""
        lib, from_buffer = self._lib, self._ffi.from_buffer

        def run(work: Any, *more: Any) -> Run:
            def once(_: object) -> None:
                if work(self._table, from_buffer("char[]", next(passes)), units, *more) != units:
                    raise RuntimeError("a key is missing in the table of the limits")

            return Run(once, [None], units)

        share = lib.limit_share
        return {LOOKUP: run(lib.limit_lookup), GRANT: run(share, True), READ: run(share, False)}

    def by_slots(self, slots: Any) -> dict[str, Run]:
        lib = self._lib
        numbers = np.ascontiguousarray(slots, np.uint32)
        pointer = self._ffi.from_buffer("uint32_t[]", numbers)
        return {WORDS: Run(lambda _: lib.limit_words(self._table, pointer, len(numbers)), [None], len(numbers))}

    def calls(self, count: int) -> dict[str, Run]:
        """A call that does nothing, with the arguments of a batch of one key."""
        call, table, null, key = self._lib.limit_call, self._table, self._ffi.NULL, bytes(WIDTH)

        def twice(_: object) -> None:
            call(table, key, WIDTH, null, 1)
            call(table, key, WIDTH, null, 1)

        return {
            CALL: Run(lambda _: call(table, key, WIDTH, null, 1), range(count)),
            TWO_CALLS: Run(twice, range(count)),
        }


@contextmanager
def table(keys: Any) -> Iterator[Table | None]:
    """None where there is no compiler."""
    module, _ = load()
    if module is None:
        yield None
        return
    opened = Table(module, keys)
    try:
        yield opened
    finally:
        opened.close()
