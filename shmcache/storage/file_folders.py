"""The directory of a FileStore: which files are its own, what the dead left, how full it is, what is oldest.

::

    <root>/.shmcache-evicting              whose flock is held by the process that evicts
    <root>/<two hex digits>/<key>.safetensors
    <root>/<two hex digits>/.shmcache-<16 hex digits>.tmp   being written: by whom is alive, as its flock is held

Whatever else lies there is left alone.
"""

# ruff: noqa: PTH108, PTH120 # a Path costs more than the call that it is made for

from __future__ import annotations

import os
import re
import secrets
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np

__all__ = ["Evicted", "Usage", "clean", "evict", "evicting", "path_of", "temporary_path"]

_FOLDERS: Final = tuple(f"{number:02x}" for number in range(256))
_OBJECT: Final = re.compile(r"((?:[0-9a-f]{2}){1,64})\.safetensors", re.ASCII)
_TEMPORARY: Final = re.compile(r"\.shmcache-[0-9a-f]{16}\.tmp", re.ASCII)


def path_of(root: str, key: bytes) -> str:
    """Where the object of a key lies."""
    return f"{root}/{_FOLDERS[crc32(key) & 0xFF]}/{key.hex()}.safetensors"


def temporary_path(path: str) -> str:
    """A new name beside ``path``, for a file that is being written."""
    return f"{os.path.dirname(path)}/.shmcache-{secrets.token_hex(8)}.tmp"


def clean(root: str) -> None:
    """Removes the files that the dead were writing."""
    for entry in _entries(root):
        if _TEMPORARY.fullmatch(entry.name):
            _remove_if_dead(entry.path)


def _entries(root: str) -> Iterator[os.DirEntry[str]]:
    for folder in _FOLDERS:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(f"{root}/{folder}") as entries:
            yield from entries


def _objects(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """The path and state of every object."""
    for entry in _entries(root):
        match = _OBJECT.fullmatch(entry.name)
        if match is None or entry.path != path_of(root, bytes.fromhex(match[1])):
            continue
        with suppress(FileNotFoundError):  # evicted or deleted meanwhile
            if entry.is_file(follow_symlinks=False):
                yield entry.path, entry.stat(follow_symlinks=False)


def _remove_if_dead(path: str) -> None:
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # written and renamed meanwhile; or not to be opened, and so not to be judged
        return
    try:
        flock(file, LOCK_EX | LOCK_NB)
        # Its writer may be alive, between open and flock: then it finds the file gone and writes another.
        with suppress(FileNotFoundError):
            os.unlink(path)
    except BlockingIOError:
        pass
    finally:
        os.close(file)


# Capacity


@contextmanager
def evicting(root: str) -> Iterator[bool]:
    """Whether it is for this thread to evict, until the end of the block. Does not wait for another one."""
    file = os.open(f"{root}/.shmcache-evicting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        os.close(file)
        yield False
        return
    try:
        yield True
    finally:
        flock(file, LOCK_UN)  # a child forked meanwhile has the file open, too
        os.close(file)


class Evicted(NamedTuple):
    """What an eviction did."""

    objects: int
    nbytes: int
    left_nbytes: int


def evict(root: str, capacity: int, nbytes: int) -> Evicted:
    """Looks at every object, and if ``nbytes`` more would exceed the capacity, removes the oldest until 95 % of it
    are left, or less if that is what ``nbytes`` needs. Cleans up after the dead, too.

    Objects are walked through twice, once to find how old the youngest is that must go, so that of a million of them
    two numbers each are kept, not the path. What was read between the two is no longer old, and stays.
    """
    clean(root)
    times, sizes = array("q"), array("q")
    for _, state in _objects(root):
        times.append(state.st_mtime_ns)
        sizes.append(state.st_size)
    total = sum(sizes)
    if total + nbytes <= capacity:
        return Evicted(0, 0, total)
    excess = total - min(capacity * 19 // 20, capacity - nbytes)
    youngest = _youngest_to_go(times, sizes, excess)
    objects = freed = 0
    for path, state in _objects(root):
        if state.st_mtime_ns < youngest or (state.st_mtime_ns == youngest and freed < excess):
            with suppress(FileNotFoundError):
                os.unlink(path)
                objects, freed = objects + 1, freed + state.st_size
    return Evicted(objects, freed, total - freed)


def _youngest_to_go(times: array[int], sizes: array[int], excess: int) -> int:
    """The time of the object with which the oldest have ``excess`` bytes."""
    ages = np.frombuffer(times, np.int64)
    order = np.argsort(ages)
    sums = np.cumsum(np.frombuffer(sizes, np.int64)[order])
    return int(ages[order[min(int(np.searchsorted(sums, excess)), len(order) - 1)]])


class Usage:
    """What one process knows of the bytes in the directory: those it found at its last look, and those that it has
    written since. Others' writes it does not see, so it looks again when it has written a 20th of the capacity."""

    def __init__(self, capacity: int) -> None:
        self.pid: Final = os.getpid()
        self._capacity = capacity
        self._step = capacity // 20
        self._lock = threading.Lock()
        self._found: int | None = None
        self._written = 0

    def take(self, nbytes: int) -> bool:
        """Counts bytes that are to be written, if they fit as far as is known; False: look first."""
        with self._lock:
            known = self._found is not None and self._written < self._step
            fits = known and (self._found or 0) + self._written + nbytes <= self._capacity
            self._written += nbytes if fits else 0
            return fits

    def take_unseen(self, nbytes: int) -> bool:
        """The same while somebody else evicts, and may be about to make room: up to a 10th of the capacity."""
        with self._lock:
            fits = self._written < 2 * self._step
            self._written += nbytes if fits else 0
            return fits

    @property
    def written(self) -> int:
        """Bytes taken since the last look."""
        return self._written

    def looked(self, found: int, written: int) -> None:
        """``found`` bytes are there; ``written``: what had been taken when the look began."""
        with self._lock:
            self._found = found
            self._written -= written
