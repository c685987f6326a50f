"""FileStore: L2 in a directory, one file an object."""

# ruff: noqa: PTH100, PTH103, PTH104, PTH108, PTH116, PTH120 # a Path costs more than the call that it is made for

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from fcntl import LOCK_EX, flock
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote

from shmcache.config import parse_size, shown
from shmcache.layout import Layout
from shmcache.status import Status
from shmcache.storage.adapter import Counting
from shmcache.storage.checksum import checksum, hasher
from shmcache.storage.file_folders import Usage, clean, evict, evicting, path_of, temporary_path
from shmcache.storage.file_format import ALIGNMENT, Header, decode_header, encode_header, header_nbytes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FileStore"]

_PIECE: Final = 1 << 20  #: bytes read and then hashed, while the core has them in its cache
_TOUCH_S: Final = 60  #: a file's time of last access is kept this exactly
_TRIES: Final = 8  #: to write a file of which someone removes the beginning
_WARN_S: Final = 600  #: a full disk is worth a line in the log so often
_MIN_CAPACITY: Final = 1 << 20  #: bytes

_log = logging.getLogger("shmcache.storage")


class FileStore:
    """Objects as files in a directory, one each, in the safetensors format.

    ``path``: a directory on a local disk, made if it is missing; files in it are this user's alone. Any number of
    threads, processes and engines may share it. ``capacity``: bytes that all files together may have, int or text such
    as "100GiB"; None: as many as the disk takes. All who share a directory should give the same capacity.

    With a capacity the objects are evicted that were not loaded or stored for longest (to the minute). Each process
    counts what it writes and looks at the directory now and then, so ``n`` processes can exceed the capacity by ``n``
    times (a tenth of it and one object), no more. An object that has no room is NO_SPACE: it is larger than the
    capacity, the disk is full, or the process that evicts does not get on.

    It is a cache: nothing is synced to the disk, and what a power cut tore is found by its checksum. A file that
    cannot be what was stored is removed, and counted as ``l2_damaged``. Nothing stays open between two calls, so that
    ``close`` ends nothing and a forked child may go on.

    TypeError or ValueError for bad arguments; PermissionError where the directory is not writable; ImportError without
    xxhash. Methods raise the OSError of a disk that fails.
    """

    keeps_layouts: Final = True

    def __init__(self, path: str | os.PathLike[str], capacity: int | str | None = None) -> None:
        self._root = _check_path(path)
        self._capacity = None if capacity is None else _check_capacity(capacity)
        self._usage = None if self._capacity is None else Usage(self._capacity)
        self._count: Counting = _count_nothing
        self._warned: float | None = None
        hasher()  # if xxhash is missing, it is missed now
        _make_root(self._root)
        clean(self._root)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """The store of ``file:///var/cache/kv?capacity=100GiB``, or of a path alone, which may say ``?capacity=``, too.

        In a URL, ``?``, ``#`` and ``%`` of the path are written ``%3F``, ``%23`` and ``%25``.
        """
        path, _, query = url.partition("?")
        if path.startswith("file:"):
            path = _path_of_url(path, url)
        try:
            options = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        except ValueError:
            options = [("", "")]
        if any(name != "capacity" for name, _ in options) or len(options) > 1:
            raise ValueError(f"l2: expected ?capacity=SIZE or nothing after the path, got {shown(url)}")
        return cls(path, options[0][1] if options else None)

    def __repr__(self) -> str:
        return f"FileStore({self._root!r}, capacity={self._capacity})"

    def bind(self, payload: memoryview, count: Counting) -> None:  # noqa: ARG002 # files need no registration
        """From now on counts ``l2_damaged``, ``l2_evictions`` and ``l2_evicted_bytes``."""
        self._count = count

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each object has a file."""
        return [os.access(self._path_of(key), os.F_OK) for key in keys]

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Reads files straight into the views. OK, or NOT_FOUND."""
        return [self._load(key, view.cast("B")) for key, view in zip(keys, views, strict=True)]

    def store(
        self,
        keys: Sequence[bytes],
        views: Sequence[memoryview],
        layouts: Sequence[Layout | None] | None = None,
    ) -> list[Status]:
        """Writes files. OK, EXISTS where one of this key and size is there, or NO_SPACE.

        ``layouts``: what a file says of its tensors; by default that it is one of bytes.
        """
        whole = [None] * len(keys) if layouts is None else layouts
        return [self._store(*each) for each in zip(keys, views, whole, strict=True)]

    def delete(self, keys: Sequence[bytes]) -> None:
        """Removes files."""
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self._path_of(key))

    def close(self) -> None:
        """Counts no more. Nothing else is to be let go of; the store can still be used."""
        self._count = _count_nothing

    def _path_of(self, key: bytes) -> str:
        if not 1 <= len(key) <= 64:
            raise ValueError(f"key: expected 1 to 64 bytes, got {len(key)}")
        return path_of(self._root, key)

    # Load

    def _load(self, key: bytes, view: memoryview) -> Status:
        path = self._path_of(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Status.NOT_FOUND
        try:
            state = os.fstat(file)
            whole = _read(file, state.st_size, key, view)
            if whole is None:
                self._remove_damaged(path, state)
            elif whole:
                _touch(file, state)
        finally:
            os.close(file)
        return Status.OK if whole else Status.NOT_FOUND

    def _remove_damaged(self, path: str, state: os.stat_result) -> None:
        self._count("l2_damaged", 1)
        _log.warning("%s is not what was stored there; it is removed", path)
        with suppress(FileNotFoundError, PermissionError):  # gone, or another user's
            if os.path.samestat(state, os.stat(path)):  # else it is replaced already
                os.unlink(path)

    # Store

    def _store(self, key: bytes, view: memoryview, layout: Layout | None) -> Status:
        path = self._path_of(key)
        layout = layout or Layout((view.nbytes,), "uint8")
        if layout.nbytes != view.nbytes:
            raise ValueError(f"store: expected a view of {layout.nbytes} bytes for {layout!r}, got {view.nbytes}")
        header = encode_header(Header(key, layout, 0))
        nbytes = len(header) + view.nbytes
        if _size_of(path) == nbytes:
            return Status.EXISTS
        if not self._has_room(nbytes):
            return Status.NO_SPACE
        header = encode_header(Header(key, layout, checksum(view)))
        try:
            _write(path, [header, view])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._warn_of_full_disk(error)
            return Status.NO_SPACE
        return Status.OK

    def _warn_of_full_disk(self, error: OSError) -> None:
        now = time.monotonic()
        if self._warned is None or now - self._warned > _WARN_S:
            self._warned = now
            _log.warning(
                "%s: %s: objects are not stored; free some of the disk, or give the store a capacity that it has",
                self._root,
                error.strerror,
            )

    # Capacity

    def _has_room(self, nbytes: int) -> bool:
        """Makes room for a file, where there is a capacity."""
        if self._capacity is None or self._usage is None:
            return True
        if nbytes > self._capacity:
            return False
        if self._usage.pid != os.getpid():  # forked: what the parent knew is the parent's
            self._usage = Usage(self._capacity)
        usage = self._usage
        if usage.take(nbytes):
            return True
        with evicting(self._root) as mine:
            if not mine:
                return usage.take_unseen(nbytes)
            written = usage.written
            evicted = evict(self._root, self._capacity, nbytes)
            fits = evicted.left_nbytes + nbytes <= self._capacity
            usage.looked(evicted.left_nbytes + (nbytes if fits else 0), written)
        self._count("l2_evictions", evicted.objects)
        self._count("l2_evicted_bytes", evicted.nbytes)
        return fits


def _count_nothing(_name: str, _n: int) -> None:
    """For a store that is not bound."""


# Reading and writing one file


def _read(file: int, file_nbytes: int, key: bytes, view: memoryview) -> bool | None:
    """Fills the view. False if the file is of another size; None if it is damaged."""
    begin = bytearray(ALIGNMENT)
    got = os.preadv(file, [begin, view[:_PIECE]], 0)  # nearly always the header, and the first piece
    nbytes = header_nbytes(begin)
    if nbytes is None or got < ALIGNMENT:
        return None
    if nbytes > ALIGNMENT:
        begin, got = bytearray(nbytes), nbytes
        os.preadv(file, [begin], 0)
    header = decode_header(begin)
    if header is None or header.key != key or file_nbytes != nbytes + header.layout.nbytes:
        return None
    if header.layout.nbytes != view.nbytes:
        return False
    return header.checksum == _read_and_hash(file, nbytes, view, got - nbytes) or None


def _read_and_hash(file: int, start: int, view: memoryview, done: int) -> int | None:
    """The checksum of the object that begins at ``start`` and of which ``done`` bytes are read already; None if the
    file ends before."""
    of = hasher()
    of.update(view[:done])
    while done < view.nbytes:
        piece = view[done : done + _PIECE]
        got = os.preadv(file, [piece], start + done)
        if got == 0:
            return None
        of.update(piece[:got])
        done += got
    return of.intdigest()


def _touch(file: int, state: os.stat_result) -> None:
    """Notes that a file was used, if that is not known to the minute."""
    if not 0 <= time.time() - state.st_mtime < _TOUCH_S:
        with suppress(PermissionError):  # another user's
            os.utime(file)


def _write(path: str, parts: list[bytes | memoryview]) -> None:
    """Writes a file under a temporary name and gives it its own when it is whole. Leaves nothing if it fails."""
    if not any(_write_once(path, parts) for _ in range(_TRIES)):
        raise FileNotFoundError(errno.ENOENT, "what was being written there was removed, again and again", path)


def _write_once(path: str, parts: list[bytes | memoryview]) -> bool:
    """False if someone took the new file for that of a dead writer, between its making and its locking."""
    temporary = temporary_path(path)
    file = _open_new(temporary)
    try:
        flock(file, LOCK_EX)  # who holds this is alive
        if os.fstat(file).st_nlink == 0:
            return False
        _write_all(file, parts)
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(file)
    return True


def _open_new(path: str) -> int:
    """A descriptor of a new file, in a folder that may be missing yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return os.open(path, flags, 0o600)


def _write_all(file: int, parts: list[bytes | memoryview]) -> None:
    left = [memoryview(part).cast("B") for part in parts]
    offset = 0
    while left:
        wrote = os.pwritev(file, left, offset)  # 2 GiB at most
        offset += wrote
        while left and wrote >= left[0].nbytes:
            wrote -= left.pop(0).nbytes
        if left:
            left[0] = left[0][wrote:]


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


# What callers pass


def _check_path(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"path: expected str or os.PathLike, got {shown(path)}")
    if not name or "\0" in name:
        raise ValueError(f"path: expected the name of a directory, got {shown(path)}")
    return os.path.abspath(name)


def _check_capacity(capacity: int | str) -> int:
    nbytes = parse_size(capacity, "capacity")
    if nbytes < _MIN_CAPACITY:
        raise ValueError(f"capacity: expected at least 1MiB, got {shown(capacity)}")
    return nbytes


def _make_root(root: str) -> None:
    try:
        os.makedirs(root, 0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"path: expected a directory, but {root} is or lies below a file") from None
    except PermissionError:
        raise _not_permitted("made", root) from None
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise _not_permitted("written", root)


def _not_permitted(what: str, root: str) -> PermissionError:
    return PermissionError(
        errno.EACCES,
        f"path: the directory cannot be {what} by user {os.geteuid()}; give it to that user (chown), mount it "
        "writable, or choose another",
        root,
    )


def _path_of_url(begin: str, url: str) -> str:
    """The path in ``file:///path``, ``file://localhost/path`` or ``file:path``."""
    path = begin.removeprefix("file:")
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(f"l2: expected file:///PATH with three slashes, got {shown(url)}")
        path = "/" + path
    if "#" in path:
        raise ValueError(f"l2: expected # in a URL's path written as %23, got {shown(url)}")
    return unquote(path, errors="strict")
