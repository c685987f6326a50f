"""The core compiled with programs whose lanes are threads, or fibers on a simulated memory, of one process."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from core_support import NATIVE, build_core

HERE = Path(__file__).parent
LANES = (HERE / "lanes.c", HERE / "regions.c", HERE / "one_mapping.c")
WRAPPED = ("mmap", "munmap", "fcntl", "close")
#: The system's clock, its waiting and its chance, and what the core keeps for each thread: a simulation has its own.
WRAPPED_BY_FIBERS = ("syscall", "nanosleep", "clock_gettime", "getrandom", "sc_guard", "sc_unguard")
TIMEOUT_S = 240  #: after which something hangs
RACE = 66  #: the exit status that ThreadSanitizer is told to give


def compilers(name: str) -> str:
    """The compiler; skips where it cannot be had, but where CI is set, gcc must be there."""
    if platform.machine() != "x86_64":
        pytest.skip(f"written for x86_64, not for {platform.machine()}")
    if shutil.which(name) is None:
        if name == "gcc" and os.environ.get("CI"):
            pytest.fail("gcc is not installed")
        pytest.skip(f"{name} is not installed")
    return name


def _wrap(names: tuple[str, ...]) -> str:
    return "-Wl," + ",".join(f"--wrap={name}" for name in names)


def build_threads(program: Path, *, compiler: str = "gcc", native: Path = NATIVE) -> Path:
    """For ThreadSanitizer. It knows no fences, and gcc says so: no plain memory of the core relies on one alone."""
    flags = ["-O1", "-g", "-fsanitize=thread", f"-I{HERE}", _wrap(WRAPPED)]
    if "gcc" in compiler:
        flags.append("-Wno-tsan")
    sources = [HERE / "threads.c", *LANES]
    return build_core(program, sources, flags=flags, compiler=compiler, native=native)


def build_fibers(program: Path, *, native: Path = NATIVE) -> Path:
    """For the simulated memory: weak/stdatomic.h takes the place of the compiler's."""
    flags = ["-g", f"-I{HERE / 'weak'}", f"-I{HERE}", _wrap(WRAPPED + WRAPPED_BY_FIBERS)]
    sources = [HERE / "weak" / "fibers.c", HERE / "weak" / "memory.c", *LANES]
    return build_core(program, sources, flags=flags, native=native)


def run(program: Path, seed: int, operations: int) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, whatever that is. Without address randomization where that can be had: ThreadSanitizer
    of gcc 12 cannot bear as much of it as newer kernels may be set to."""
    command = [str(program), str(seed), str(operations)]
    plain = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*plain, "true"], capture_output=True, check=False).returncode == 0:
        command = [*plain, *command]
    print(*command)
    env = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE} history_size=7"}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env)


def show(done: subprocess.CompletedProcess[str]) -> str:
    """For a message: how it ended, and what it said last."""
    return f"exit status {done.returncode}\n{done.stderr[-6000:]}"


def counts(output: str) -> dict[str, int]:
    """What the lanes have done."""
    pairs = [line.split("=") for line in output.splitlines() if "=" in line]
    return {name: int(number) for name, number in pairs}
