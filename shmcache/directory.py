"""The directory that segments lie in: /dev/shm, or the one on a tmpfs that ``SHMCACHE_DIRECTORY`` names.

The variable is read at each call. A directory of the user's choice must be one in which nobody else can take a
segment away or put another in its place; what is in it is looked at through one descriptor, so that what was checked
is what is used. Files of /dev/shm are opened and unlinked by POSIX's own calls.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import posix_ipc

from shmcache import errors

__all__ = [
    "SHM",
    "VARIABLE",
    "huge_pages",
    "open_directory",
    "open_regular",
    "segment_directory",
    "unlink_file",
]

SHM: Final = Path("/dev/shm")  # noqa: S108 # where Linux has POSIX shared memory
VARIABLE: Final = "SHMCACHE_DIRECTORY"


def segment_directory() -> Path:
    """Where segments lie, unchecked."""
    return Path(os.environ.get(VARIABLE) or SHM)


@contextmanager
def open_directory() -> Iterator[int]:
    """A descriptor of it. DirectoryError where it is none that segments may lie in."""
    path = segment_directory()
    if not path.is_absolute():
        raise _unfit(f"{path}, which is not absolute")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if path == SHM or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise _unfit(f"{path} ({error.strerror})") from None
    try:
        if path != SHM:
            _check(path, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _check(path: Path, status: os.stat_result) -> None:
    kind, _ = _mount_of(status.st_dev)
    if kind != "tmpfs":
        raise _unfit(f"{path}, which is on {kind or 'a file system that this process sees no mount of'}")
    if status.st_uid not in (0, os.geteuid()):
        raise _unfit(f"{path}, which belongs to user {status.st_uid}")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise _unfit(f"{path}, which has mode {stat.S_IMODE(status.st_mode):04o}")


def _unfit(found: str) -> errors.DirectoryError:
    return errors.DirectoryError(
        f"{VARIABLE}: expected the absolute path of a directory on a tmpfs, of user {os.geteuid()} or root, that "
        f"others may not write to unless it is sticky, got {found}; mount a tmpfs there, correct the owner or the "
        f"mode, or unset {VARIABLE} to use {SHM}"
    )


def _mount_of(device: int) -> tuple[str, list[str]]:
    """Type and options of the file system with that device number; ``("", [])`` where no mount of it is seen."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:  # noqa: PTH123 # no Path needed
        for mount in mounts:
            place, _, about = mount.rstrip("\n").partition(" - ")
            if place.split(" ", 3)[2] == wanted:
                return about.partition(" ")[0], about.rpartition(" ")[2].split(",")
    return "", []


def huge_pages(fd: int) -> str:
    """The option ``huge=`` of the tmpfs that a file lies on; empty where that cannot be told."""
    try:
        kind, options = _mount_of(os.fstat(fd).st_dev)
    except OSError:  # no /proc
        return ""
    found = (option.removeprefix("huge=") for option in options if option.startswith("huge="))
    return next(found, "never" if kind == "tmpfs" else "")


def open_regular(file: str, *, writable: bool) -> int:
    """A descriptor of a file of the directory, close-on-exec. OSError, with EINVAL for what is no regular file."""
    if segment_directory() == SHM:
        _check_regular(os.lstat(SHM / file))
        with _os_errors(file):
            return int(posix_ipc.SharedMemory("/" + file, read_only=not writable).fd)
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
    with open_directory() as directory:
        _check_regular(os.stat(file, dir_fd=directory, follow_symlinks=False))
        return os.open(file, flags, dir_fd=directory)


def _check_regular(status: os.stat_result) -> None:
    """OSError for what would block when opened, or lead elsewhere."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a link, a directory or a special file")


def unlink_file(file: str) -> None:
    """Takes a name from the directory. OSError."""
    if segment_directory() == SHM:
        with _os_errors(file):
            posix_ipc.unlink_shared_memory("/" + file)
        return
    with open_directory() as directory:
        os.unlink(file, dir_fd=directory)


@contextmanager
def _os_errors(file: str) -> Iterator[None]:
    """posix_ipc's own exceptions as what they stand for."""
    try:
        yield
    except posix_ipc.ExistentialError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file) from None
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file) from None
