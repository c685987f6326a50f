"""Builds ``shmcache._native`` from the C core with cffi's API mode, and ``shmcache._fast`` beside it.

``pyproject.toml`` names :class:`BuildExt` as the ``build_ext`` command; nothing is compiled at import.
The declarations that Python sees are in ``shmcache.cdef.h``; cffi turns them into one generated C
file, which is compiled together with every ``native/*.c``. ``native/python/*.c`` are the other module.

Set ``SHMCACHE_WERROR=1`` to make each compiler warning an error, as our own builds do. It is off by
default, because another compiler's new warning must not stop a user's ``pip install``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from sysconfig import get_config_var, get_platform

from cffi import FFI
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

MODULE = "shmcache._native"

# Relative, because setuptools builds in the project's root and takes only relative paths into an sdist.
NATIVE = Path("native")
CDEF = NATIVE / "shmcache.cdef.h"

PLATFORMS = ("linux-x86_64", "linux-aarch64")

# These follow Python's own flags on the command line, so -UNDEBUG undoes Python's -DNDEBUG: the core's
# asserts stay.  Hidden visibility leaves PyInit__native as the only exported symbol.
COMPILE_ARGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-UNDEBUG", "-fvisibility=hidden", "-pthread"]
LINK_ARGS = ["-pthread"]

# The code that cffi generates has the unused parameters that Python's calling convention asks for.
PREAMBLE = """
#include "arena.h"
#pragma GCC diagnostic ignored "-Wunused-parameter"
"""


def make_ffi() -> FFI:
    """An FFI that knows the core's declarations and is ready to emit the extension's C source."""
    ffi = FFI()
    # Python owns the memory of a segment's struct, without a look inside: its size is the compiler's.
    ffi.cdef(CDEF.read_text(encoding="utf-8").replace("struct sc_segment;", "struct sc_segment { ...; };"))
    ffi.set_source(MODULE, PREAMBLE)
    return ffi


def lto_args() -> list[str]:
    """Inlining across files saves a quarter of a lookup. Elsewhere than in gcc it asks for another linker."""
    compiler = (os.environ.get("CC") or get_config_var("CC") or "").split()
    return ["-flto"] if compiler and "gcc" in Path(compiler[0]).name else []


def compile_args() -> list[str]:
    """The compiler's flags, with ``-Werror`` where ``SHMCACHE_WERROR=1`` asks for it."""
    werror = ["-Werror"] if os.environ.get("SHMCACHE_WERROR") == "1" else []
    return COMPILE_ARGS + lto_args() + werror


def check_platform() -> None:
    """Refuse early what would fail late: the core needs Linux and lock-free 64-bit atomics."""
    platform = get_platform()
    if platform not in PLATFORMS or sys.maxsize < 2**32:
        bits = sys.maxsize.bit_length() + 1
        raise PlatformError(
            f"shmcache runs on 64-bit Linux on x86-64 and aarch64 only; this Python is a {bits}-bit one for {platform}"
        )


class BuildExt(build_ext):
    """``build_ext`` that emits cffi's C source into the build folder and compiles it with the core."""

    def finalize_options(self) -> None:
        """Complete the extension, so that an sdist knows the sources and headers, too."""
        super().finalize_options()
        for ext in self.extensions:
            ext.extra_compile_args = compile_args()
            ext.extra_link_args = LINK_ARGS + lto_args()
            folder = NATIVE if ext.name == MODULE else NATIVE / "python"
            ext.sources = sorted(str(path) for path in folder.glob("*.c"))
            # What ext.depends names is put into the sdist, and a change of it rebuilds.
            headers = {*NATIVE.glob("*.h"), *folder.glob("*.h")}
            ext.depends = sorted(str(path) for path in (*headers, NATIVE / "build_ffi.py"))
            ext.include_dirs = [str(NATIVE)]

    def build_extension(self, ext: Extension) -> None:
        """Generate and compile; raises PlatformError on a platform that the core does not support."""
        check_platform()
        if ext.name != MODULE:
            super().build_extension(ext)
            return
        generated = Path(self.build_temp) / "_native.c"
        generated.parent.mkdir(parents=True, exist_ok=True)
        make_ffi().emit_c_code(str(generated))
        sources = ext.sources
        ext.sources = [*sources, str(generated)]
        try:
            super().build_extension(ext)
        finally:
            ext.sources = sources  # an sdist of the same run must not name the generated file
