"""The segment's file: its name, its birth, its end. An arena's file appears under its name only when it is whole.

A new segment is formatted as a file without a name and linked into place, so that no death leaves a half-made
arena behind, and no process ever sees one. A name is removed only by who holds the arena's door (``lane.h``).
"""

from __future__ import annotations

import atexit
import errno
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from shmcache import errors
from shmcache._binding import Handle, check, ffi, lib, open_segment, raise_code
from shmcache.config import ArenaConfig, check_name
from shmcache.directory import open_directory, open_regular, segment_directory, unlink_file

_PREFIX: Final = f"shmcache.{os.geteuid()}."
_MAX_THREADS: Final = 64  #: that populate
_POPULATE_STEP: Final = 64 << 20  #: bytes of payload that one thread touches at a time
_PREFAULT_LEAST: Final = 64 << 20  #: bytes in memory: for less, faults cost less than a thread is worth


def path_of(name: str) -> Path:
    """Where the segment of this user's arena ``name`` lies."""
    return segment_directory() / (_PREFIX + name)


def names() -> list[str]:
    """The names of this user's arenas, sorted. What is not a regular file is no arena."""
    with open_directory() as directory, os.scandir(directory) as entries:
        found = [
            entry.name.removeprefix(_PREFIX)
            for entry in entries
            if entry.name.startswith(_PREFIX) and entry.is_file(follow_symlinks=False)
        ]
    return sorted(name for name in found if _is_name(name))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def open_file(name: str, *, writable: bool = True) -> int:
    """A descriptor of the segment, close-on-exec.

    ArenaNotFoundError; ArenaPermissionError where it is a symbolic link, no regular file, another user's, or
    open to others. OSError where this process may open no more files.
    """
    try:
        fd = open_regular(_PREFIX + name, writable=writable)
    except FileNotFoundError:
        raise errors.ArenaNotFoundError(
            f"no arena {name!r}: {path_of(name)} does not exist; create it, or attach with create=config"
        ) from None
    except PermissionError:
        raise errors.ArenaPermissionError(
            f"arena {name!r}: {path_of(name)} does not let this user in; run all its processes as one user"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ELOOP):
            raise  # also posix_ipc's, without a number: no descriptors, no memory; that says nothing of the file
        raise errors.ArenaPermissionError(
            f"arena {name!r}: expected a regular file at {path_of(name)}, got: {error.strerror}; remove it"
        ) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise errors.ArenaPermissionError(
            f"arena {name!r}: expected {path_of(name)} to be a regular file of user {os.geteuid()} with mode "
            f"0600, got user {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}; remove it"
        )
    return fd


def same_file(a: int, b: int) -> bool:
    """Whether two descriptors are of one file."""
    first, second = os.fstat(a), os.fstat(b)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def build(name: str, config: ArenaConfig) -> None:
    """Makes the segment of a new arena. ArenaExistsError, ArenaSpaceError."""
    if os.path.lexists(path_of(name)):
        raise _exists(name)
    with open_directory() as directory, _unnamed(name, directory) as fd:
        described = _describe(config)
        _check_space(name, directory, described)
        code = lib.sc_format(fd, described)
        if code < 0:
            raise_code(name, code, error=ffi.errno)
        if config.populate:
            _populate(name, fd)
        _give_name(name, directory, fd)


def _exists(name: str) -> errors.ArenaExistsError:
    return errors.ArenaExistsError(
        f"arena {name!r}: {path_of(name)} is there already; attach to it, or destroy it first"
    )


@contextmanager
def _unnamed(name: str, directory: int) -> Iterator[int]:
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        raise errors.ArenaPermissionError(
            f"arena {name!r}: cannot make a file in {segment_directory()} ({error.strerror}); expected a tmpfs that "
            "this user may write to"
        ) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _give_name(name: str, directory: int, fd: int) -> None:
    try:
        # With a directory descriptor this is linkat(2), which can follow the link to an unnamed file.
        os.link(f"/proc/self/fd/{fd}", _PREFIX + name, dst_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        raise _exists(name) from None
    except OSError as error:
        raise errors.ArenaSpaceError(
            f"arena {name!r}: cannot name the segment in {segment_directory()}: {error.strerror}"
        ) from None


def _describe(config: ArenaConfig) -> Any:
    fingerprint = config.fingerprint.encode()
    described = ffi.new("struct sc_config *")
    described.capacity = config.capacity
    described.block_size = config.block_size
    described.slots = config.slots
    described.lanes = config.lanes
    described.regions = config.regions
    described.read_lease_us = round(config.read_lease_s * 1e6)
    described.write_lease_us = round(config.write_lease_s * 1e6)
    described.lock_timeout_us = round(config.lock_timeout_s * 1e6)
    if config.eviction == "segmented":
        described.eviction_window_us = round(config.eviction_window_s * 1e6)
    described.fingerprint_bytes = len(fingerprint)
    ffi.memmove(described.fingerprint, fingerprint, len(fingerprint))
    ffi.memmove(described.boot_id, boot_id(), 16)
    return described


@cache
def boot_id() -> bytes:
    """This boot of this kernel, 16 bytes."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def _check_space(name: str, directory: int, described: Any) -> None:
    total, metadata = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    lib.sc_segment_bytes(described, total, metadata)
    needed = metadata[0] + described.capacity
    shm = os.statvfs(directory)
    free = shm.f_bavail * shm.f_frsize
    if free < needed:
        raise errors.ArenaSpaceError(
            f"arena {name!r}: needs {needed:,} bytes ({metadata[0]:,} of metadata), {segment_directory()} has {free:,} "
            f"free; use a smaller capacity or a larger {segment_directory()}: mount -o remount,size=..., docker run "
            "--shm-size=..., or an emptyDir of medium Memory with a sizeLimit"
        )
    room = _cgroup_room()
    if room is not None and room < needed:
        raise errors.ArenaSpaceError(
            f"arena {name!r}: needs {needed:,} bytes ({metadata[0]:,} of metadata), the memory cgroup of this "
            f"process leaves {room:,}; use a smaller capacity or raise memory.max (docker run --memory=..., "
            "resources.limits.memory), or the kernel kills processes when the arena fills"
        )


def _cgroup_room() -> int | None:
    """Bytes that the memory cgroups (version 2) above this process leave; None where none sets a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return None
    root = Path("/sys/fs/cgroup")
    group = root / own
    rooms = [_room_of(g) for g in (group, *group.parents) if g.is_relative_to(root)]
    return min((room for room in rooms if room is not None), default=None)


def _room_of(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(counts.get("inactive_file", 0)))


def _populate(name: str, fd: int) -> None:
    handle = open_segment(name, fd, writable=True)
    with map_payload(name, handle, fd, writable=True) as mapping:
        address = ffi.from_buffer(mapping)
        try:
            populate(name, handle, address)
        finally:
            ffi.release(address)


def populate(name: str, handle: Handle, address: Any) -> None:
    """Gives every page of the payload memory, in parallel; what is in it stays. ArenaSpaceError.

    ``address``: where this process has mapped it writable.
    """
    info = ffi.new("struct sc_info *")
    lib.sc_get_info(handle, info)
    blocks, step = info.capacity // info.block_size, max(1, _POPULATE_STEP // info.block_size)

    def touch(block: int) -> int:
        count = min(step, blocks - block)
        check(name, handle, lib.sc_populate(handle, address, block, count))
        return int(count * info.block_size)

    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool, progress(f"populating {name}", info.capacity) as tell:
        for nbytes in pool.map(touch, range(0, blocks, step)):
            tell(nbytes)


@contextmanager
def progress(what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Is told the bytes that are done, and shows on a terminal how many of all."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 # slow to import, and only a terminal needs it
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=nbytes)
        yield lambda done: bar.advance(task, done)


def map_payload(name: str, handle: Handle, fd: int, *, writable: bool) -> mmap.mmap:
    """This process's mapping of region 0, read-only unless ``writable``. ArenaDamagedError, ArenaSpaceError."""
    info = ffi.new("struct sc_info *")
    lib.sc_get_info(handle, info)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        mapping = mmap.mmap(fd, info.capacity, mmap.MAP_SHARED, protection, offset=info.payload)
    except ValueError:  # the file is shorter than that
        raise_code(name, lib.SC_E_DAMAGED)
    except OSError as error:
        raise_code(name, lib.SC_E_MEMORY, error=error.errno or 0)
    with suppress(OSError):  # a kernel without huge pages; a tmpfs without them does not mind
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def prefault(handle: Handle, fd: int, mapping: mmap.mmap) -> None:
    """Maps what has memory into this process, in the background, until the segment is closed: who reads or writes there
    for the first time then finds it mapped. Returns at once."""
    if os.fstat(fd).st_blocks * 512 < _PREFAULT_LEAST:
        return
    buffer = ffi.from_buffer("char[]", mapping)
    address = ffi.cast("char *", buffer)
    ffi.release(buffer)  # the address alone counts as no view
    lib.sc_prefault(handle, address)  # where it cannot, whoever reads or writes there faults


# A thread of the core's own, which needs no GIL; Python does not know it, and must not take memory from under it.
atexit.register(lib.sc_prefault_end)


def unlink(name: str, fd: int) -> None:
    """Takes the name from the segment behind ``fd``, whose door the caller holds; another one's name stays."""
    try:
        current = open_file(name)
    except errors.ArenaNotFoundError:
        return
    try:
        if same_file(current, fd):
            with suppress(FileNotFoundError):  # somebody removed it by hand
                unlink_file(_PREFIX + name)
    finally:
        os.close(current)


def unlink_unread(name: str) -> None:
    """Takes the name from whatever has it. For what cannot be opened as an arena, and so has no door."""
    try:
        unlink_file(_PREFIX + name)
    except FileNotFoundError:
        raise errors.ArenaNotFoundError(f"no arena {name!r}: {path_of(name)} does not exist") from None
    except OSError as error:
        if error.errno == errno.EACCES:
            raise errors.ArenaPermissionError(
                f"arena {name!r}: {path_of(name)} is not this user's to remove; let its owner do it, or root"
            ) from None
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        raise errors.ArenaPermissionError(
            f"arena {name!r}: {path_of(name)} is no file ({error.strerror}); remove it by hand"
        ) from None
