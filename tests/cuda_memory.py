"""Device memory for the double: files in a directory, the machine, that all processes of a test share.

Who has an allocation open says so by a lock on a byte of its file: byte 0 is its owner's, byte 1 + pid an importer's.
They are locks of the process (POSIX), not of an open file: the kernel takes them back when the process dies, whatever
killed it, and children that it forked do not keep them. To close any descriptor of a file would give back all of the
process's locks on it, so a process opens each file once (``_MINE``), and maps it without ``mmap``'s second descriptor.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import mmap
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cuda_names import HANDLE_BYTES, CUresult, Refused

_TOKEN_BYTES = 16  #: names an allocation; the first is its device
_PAGE = 2 << 20  #: of a device; addresses are multiples
_FREED, _BROKEN = 0xDD, 0xBB  #: what memory shows that was freed under importers, and that no peer path leads to
_FLOCK = "hhqqi0q"  #: struct flock
_EVERY_PID = 1 << 23  #: no pid is larger

_GUARD = threading.RLock()
_entered: set[Path] = set()
_MINE: dict[Path, _File] = {}  #: the allocations' files that this process has open
# Addresses are not used again, so that a pointer that is no longer valid never becomes valid by chance.
_addresses = itertools.count(0x2CDA << 32, 1 << 36)

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Allocation:
    """Device memory that some process has. ``owner`` is None where only importers are left."""

    device: int
    nbytes: int
    owner: int | None
    importers: frozenset[int]


@dataclass
class _File:
    fd: int
    pid: int
    owner: bool
    users: int = 1  #: mappings


@dataclass(eq=False)
class Mapping:
    """An allocation in this process's address space, its own or (``context`` is not 0) imported there."""

    token: bytes
    address: int
    nbytes: int
    context: int = 0
    opens: int = 1
    lent: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)  #: what keeps tensors in it alive

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether all of that lies in it."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class Machine:
    """What all processes see."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def uuid(self, device: int) -> bytes:
        """The UUID of a physical device."""
        return hashlib.sha256(f"{self.root} {device}".encode()).digest()[:16]

    def violation(self, what: str) -> None:
        """Notes what a real driver answers with undefined behaviour."""
        with (self.root / "violations").open("a", encoding="utf-8") as notes:
            notes.write(f"process {os.getpid()}: {what}\n")

    def violations(self) -> list[str]:
        """All of them, of all processes."""
        notes = self.root / "violations"
        return notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []

    def allocations(self) -> list[Allocation]:
        """The memory that some process has; what only dead ones had is gone then."""
        with self.alone():
            seen = [(path, self._seen(path)) for path in self.root.glob("*.memory")]
            for path, allocation in seen:
                if allocation.owner is None and not allocation.importers:
                    path.unlink()
        return [allocation for _, allocation in seen if allocation.owner is not None or allocation.importers]

    def _seen(self, path: Path) -> Allocation:
        mine = _mine(path)
        fd = mine.fd if mine else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            owners, importers = set(_holders(fd, 0, 1)), set(_holders(fd, 1, _EVERY_PID))
            if mine:
                (owners if mine.owner else importers).add(os.getpid())
            token = bytes.fromhex(path.stem)
            return Allocation(token[0], os.fstat(fd).st_size, next(iter(owners), None), frozenset(importers))
        finally:
            if not mine:
                os.close(fd)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes the allocations meanwhile."""
        with _GUARD:
            if self.root in _entered:  # a finalizer that ran in between
                yield
                return
            fd = os.open(self.root / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            _entered.add(self.root)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                yield
            finally:
                _entered.discard(self.root)
                os.close(fd)

    def path(self, token: bytes) -> Path:
        """An allocation's file."""
        return self.root / f"{token.hex()}.memory"


class Memory:
    """What this process has of it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.mappings: dict[int, Mapping] = {}  #: by address

    def allocate(self, device: int, nbytes: int, room: int) -> int:
        """Memory of this process's own, where all processes together have no more than ``room`` of that device."""
        if nbytes <= 0:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        with self.machine.alone():
            used = sum(one.nbytes for one in self.machine.allocations() if one.device == device)
            if used + nbytes > room:
                raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
            token = bytes([device]) + secrets.token_bytes(_TOKEN_BYTES - 1)
            file = _open(self.machine.path(token), owner=True)
            os.ftruncate(file.fd, nbytes)
            return self._map(token, file.fd, nbytes)

    def free(self, address: int) -> None:
        """Frees memory of this process's own."""
        with self.machine.alone():
            mapping = self._own(address)
            path = self.machine.path(mapping.token)
            importers = set(_holders(_MINE[path].fd, 1, _EVERY_PID))
            if importers:
                self.machine.violation(f"freed memory that {sorted(importers)} have open")
                ctypes.memset(mapping.address, _FREED, mapping.nbytes)
            path.unlink()
            self._unmap(mapping)

    def export(self, address: int) -> bytes:
        """The handle of the whole allocation in which an address is."""
        mapping = self.find(address)
        if mapping.context:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        return mapping.token + _digest(mapping.token)

    def open(self, handle: bytes, context: int, *, broken: bool) -> int:
        """Opens what another process exports, once a context; ``broken``: the address shows other bytes."""
        token, path = handle[:_TOKEN_BYTES], self.machine.path(handle[:_TOKEN_BYTES])
        with self.machine.alone():
            file = _mine(path)
            if file and file.owner:
                raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
            if not path.exists() or self.machine._seen(path).owner is None:
                raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
            for mapping in self.mappings.values():
                if (mapping.token, mapping.context) == (token, context):
                    mapping.opens += 1
                    return mapping.address
            file = _open(path, owner=False)
            nbytes = os.fstat(file.fd).st_size
            return self._map(token, -1 if broken else file.fd, nbytes, context)

    def close(self, address: int) -> None:
        """Undoes one ``open``."""
        with self.machine.alone():
            mapping = self.mappings.get(address)
            if mapping is None or not mapping.context:
                raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
            mapping.opens -= 1
            if not mapping.opens:
                self._unmap(mapping)
                self.machine.allocations()  # which drops it where this was the last to have it

    def find(self, address: int, nbytes: int = 1) -> Mapping:
        """The mapping in which all of that lies."""
        for mapping in list(self.mappings.values()):
            if mapping.holds(address, nbytes):
                return mapping
        raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)

    def end(self) -> None:
        """What the end of the process does. Mappings with tensors stay, for those."""
        with self.machine.alone():
            for mapping in list(self.mappings.values()):
                self._unmap(mapping, quiet=True)
            self.machine.allocations()

    def _own(self, address: int) -> Mapping:
        mapping = self.mappings.get(address)
        if mapping is None or mapping.context:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        return mapping

    def _map(self, token: bytes, fd: int, nbytes: int, context: int = 0) -> int:
        flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
        address = _LIBC.mmap(next(_addresses), nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        if fd < 0:
            ctypes.memset(address, _BROKEN, nbytes)
        self.mappings[address] = Mapping(token, address, nbytes, context)
        return int(address)

    def _unmap(self, mapping: Mapping, *, quiet: bool = False) -> None:
        if not mapping.lent:
            _LIBC.munmap(mapping.address, mapping.nbytes)
        elif not quiet:
            self.machine.violation(f"unmapped device memory in which {len(mapping.lent)} tensors live")
        del self.mappings[mapping.address]
        path = self.machine.path(mapping.token)
        _MINE[path].users -= 1
        if not _MINE[path].users:
            os.close(_MINE.pop(path).fd)


def device_of(handle: bytes) -> int:
    """The physical device whose memory it exports; refuses what is no handle."""
    token = handle[:_TOKEN_BYTES]
    if handle[_TOKEN_BYTES:] != _digest(token):
        raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
    return token[0]


def _digest(token: bytes) -> bytes:
    """The rest of a handle: a single wrong byte is seen."""
    return hashlib.shake_128(token).digest(HANDLE_BYTES - _TOKEN_BYTES)


def _mine(path: Path) -> _File | None:
    file = _MINE.get(path)
    return file if file and file.pid == os.getpid() else None  # a forked child inherits the table, not the locks


def _open(path: Path, *, owner: bool) -> _File:
    """Opens an allocation's file once more, for a mapping; the process says that it has it."""
    file = _mine(path)
    if file:
        file.users += 1
        return file
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if owner else 0), 0o600)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0 if owner else 1 + os.getpid())
    _MINE[path] = _File(fd, os.getpid(), owner)
    return _MINE[path]


def _holders(fd: int, begin: int, end: int) -> Iterator[int]:
    """The other processes that have locked some of these bytes."""
    if begin >= end:
        return
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
    kind, _, at, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return
    yield pid
    yield from _holders(fd, begin, at)
    yield from _holders(fd, at + 1, end)
