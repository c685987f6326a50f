"""The only module that imports the compiled core, and the one that turns its codes into exceptions."""

from __future__ import annotations

import os
import weakref
from typing import Any, Final, NoReturn

from shmcache import errors
from shmcache._native import ffi, lib
from shmcache.directory import segment_directory

__all__ = ["NOBODY", "Handle", "check", "ffi", "lib", "new", "open_segment", "process_state", "raise_code"]

NOBODY: Final = 0xFFFFFFFF  #: no lane
Handle = Any  #: a ``struct sc_segment *``, shut and freed with its last reference

#: Arrays that the core fills itself need no zeroing first.
new: Final = ffi.new_allocator(should_clear_after_alloc=False)


def open_segment(name: str, fd: int, *, writable: bool) -> Handle:
    """The core's view of the segment behind ``fd``, which stays the caller's."""
    handle = ffi.new("struct sc_segment *")
    code = lib.sc_segment_open(fd, writable, handle)
    if code < 0:
        raise_code(name, code, fd=fd, error=ffi.errno)
    # Not ffi.gc: where a cycle of objects is collected, that would free the struct before some __del__ uses it. Like
    # this it is shut when nothing refers to the struct any more, all __del__ being over, and freed after.
    weakref.finalize(handle[0], lib.sc_segment_shut, ffi.cast("struct sc_segment *", handle)).atexit = False
    return handle


def check(name: str, handle: Handle, code: int) -> int:
    """``code`` itself unless it is an error of the core; then the exception that stands for it."""
    if code < 0:
        raise_code(name, code, handle=handle, error=ffi.errno)
    return code


def raise_code(name: str, code: int, *, handle: Handle = None, fd: int = -1, pid: int = 0, error: int = 0) -> NoReturn:
    """Raises what an error of the core means to a caller."""
    if code == lib.SC_E_CLOSED:
        raise errors.ClosedError(
            f"arena {name!r}: this cache is closed, or belongs to the process that this one was forked from; "
            "attach again"
        )
    if code == lib.SC_E_FENCED:
        raise errors.ClosedError(
            f"arena {name!r}: the descriptor that keeps this cache's lane was closed behind its back and "
            "another process has the lane now; attach again, and do not close descriptors you did not open"
        )
    if code == lib.SC_E_BUSY:
        raise errors.ArenaBusyError(_busy(name, handle, pid))
    if code == lib.SC_E_VERSION:
        raise errors.ArenaVersionError(_versions(name, fd))
    if code == lib.SC_E_DAMAGED:
        raise errors.ArenaDamagedError(
            f"arena {name!r}: expected a segment that shmcache made, found a foreign, cut or overwritten one; "
            f"remove it with shmcache-cleanup --force {name}"
        )
    if code == lib.SC_E_MEMORY:
        raise errors.ArenaSpaceError(
            f"arena {name!r}: the kernel has no memory for it ({os.strerror(error)}); free {segment_directory()} or "
            "give it more: mount -o remount,size=..., docker run --shm-size=..., or an emptyDir of medium Memory"
        )
    if code == lib.SC_E_LAYOUTS:
        raise errors.ArenaSpaceError(
            f"arena {name!r}: its layout table is full (1,024 layouts); use fewer layouts or a new arena"
        )
    if code == lib.SC_E_REGIONS:
        raise errors.DeviceError(
            f"arena {name!r}: all the numbers that it has for regions of device memory are taken; remove one, or "
            "create the arena with more (ArenaConfig(regions=...))"
        )
    raise errors.ShmcacheError(f"arena {name!r}: system call failed: {os.strerror(error)}")


def process_state(pid: int) -> str:
    """What /proc says of a process, for messages."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 # no Path needed
            letter = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "not visible from here"
    return {"T": "stopped", "t": "traced", "D": "in the kernel", "Z": "a zombie"}.get(letter, "running")


def _busy(name: str, handle: Handle, pid: int) -> str:
    who = "somebody"
    if handle is not None and not pid:
        info = ffi.new("struct sc_info *")
        lane = ffi.new("struct sc_lane_info *")
        lib.sc_get_info(handle, info)
        if info.lock_lane != NOBODY:
            lib.sc_get_lane(handle, info.lock_lane, lane)
            pid = lane.pid
    if pid:
        who = f"process {pid} ({process_state(pid)})"
    return (
        f"arena {name!r}: {who} has been in the way for longer than lock_timeout_s; "
        "let it run on (kill -CONT) or kill it, and try again"
    )


def _versions(name: str, fd: int) -> str:
    found, own = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    lib.sc_formats(fd, found, own)

    def text(word: int) -> str:
        version, slot, lane, statistics = (word >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        counters, gauges, histograms = statistics & 0x7F, statistics >> 7 & 0xF, statistics >> 11
        return (
            f"version {version} (slot {slot}, lane {lane} bytes; {counters} counters, {gauges} gauges, "
            f"{histograms} histograms)"
        )

    return (
        f"arena {name!r}: expected memory format {text(own[0])}, found {text(found[0])}; use one build of "
        f"shmcache everywhere, or remove the arena with shmcache-cleanup --force {name}"
    )
