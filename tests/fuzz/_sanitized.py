"""The core, and the package around it, built with AddressSanitizer and UndefinedBehaviorSanitizer, elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import pytest
from core_support import NATIVE, ROOT, build_core

BUILD_S: Final = 300  #: a build that takes longer hangs
FLAGS: Final = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
LIBRARIES: Final = ("libasan.so", "libubsan.so")


def lacking(what: str) -> NoReturn:
    """Skips; where CI is set, fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def check_compiler() -> None:
    """Skips where there is no gcc with sanitizers."""
    if shutil.which("gcc") is None:
        lacking("gcc is not installed; on Debian: apt-get install gcc")
    for name in LIBRARIES:
        if not library(name).is_absolute():
            lacking(f"gcc has no {name}; on Debian it comes with gcc")


def library(name: str) -> Path:
    """Where gcc has it; the bare name where it has none."""
    command = ["gcc", f"-print-file-name={name}"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def build_target(folder: Path, native: Path = NATIVE) -> Path:
    """The fuzz target with its driver."""
    sources = sorted(Path(__file__).parent.glob("*.c"))
    return build_core(folder / "fuzz", sources, flags=(*FLAGS, "-fsanitize-coverage=trace-pc"), native=native)


@dataclass(frozen=True)
class Package:
    """Where it lies, and the environment in which an interpreter there imports it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: object, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs Python to its end, whatever that is."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def build_package(folder: Path, root: Path = ROOT) -> Package:
    """The package, built in ``folder``."""
    for part in ("native", "shmcache", "tools"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(root / part, folder / part, ignore=ignore)
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(root / part, folder / part)
    flags = " ".join(FLAGS)
    build = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CC": "cc", "CFLAGS": flags, "LDFLAGS": flags},  # not named gcc: without -flto
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "tools", ROOT / "tests"))),
        "PYTHONMALLOC": "malloc",  # so that buffers of Python's are guarded, too
        "LD_PRELOAD": " ".join(str(library(name)) for name in LIBRARIES),
        **OPTIONS,
    }
    return Package(folder, environment)


#: How the sanitizers end a process: by SIGABRT, so that nothing can take it for an exit of its own.
OPTIONS: Final = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
}
