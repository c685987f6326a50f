"""The cache: one process's membership in an arena, and everything that is done with keys."""

# ruff: noqa: SLF001 # a batch is filled by who makes it

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from shmcache import _fast, errors, snapshot
from shmcache._binding import ffi, lib, new
from shmcache._keys import MAX_KEY, BytesLike, Keys, Packed, pack, unpack
from shmcache.attachment import Attachment
from shmcache.batch import ReadBatch, WriteBatch, codes_of
from shmcache.config import check_bool, check_extra_count, check_writers, shown
from shmcache.layout import MAX_NBYTES, Layout
from shmcache.stats import ReapReport, Stats
from shmcache.status import OK, STATUSES, Status, statuses

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Cache"]

LayoutLike: TypeAlias = "Layout | int"

_NAP_S: Final = 0.0002  #: the first pause of a read that waits; doubled up to _LONG_NAP_S
_LONG_NAP_S: Final = 0.002
_REAP_S: Final = 0.05  #: how often a read that waits looks for dead writers
_IN_FLIGHT: Final = int(Status.IN_FLIGHT)
_NOT_FOUND: Final = int(Status.NOT_FOUND)
_PREFIX: Final = int(lib.SC_PREFIX)
_REFS: Final = ffi.typeof("struct sc_ref[]")
_CODES: Final = ffi.typeof("int8_t[]")
_PINNED: Final = snapshot.GAUGES.index("pinned_bytes")
_REPORT_BYTES: Final = 1 << 20  #: of verify
_sc_put: Final = lib.sc_put  # a function of lib costs a look-up at each use


def _address(function: str) -> int:
    """Of a function of the core."""
    return int(ffi.cast("uintptr_t", ffi.addressof(lib, function)))


_fast.connect(_address("sc_read"), _address("sc_release"), _address("sc_lookup"), STATUSES)
_FAST: Final = {
    name: _address(name)
    for name in ("sc_get_status", "sc_touch_keys", "sc_reserve_read", "sc_finish_read", "sc_cancel_read")
}


def _data(packed: Packed) -> Any:
    """The keys of :func:`pack`, and below their ends, as cffi takes them."""
    return packed[0] if type(packed[0]) is bytes else ffi.from_buffer("char[]", packed[0])


def _ends(packed: Packed) -> Any:
    return ffi.NULL if packed[2] is None else ffi.from_buffer("uint32_t[]", packed[2])


class Cache:
    """Made by :func:`shmcache.attach`. May be used from several threads; a context manager that closes.

    Methods that take ``keys`` take a sequence of bytes (1 to 64 each) or a C-contiguous uint8 array of shape
    (n, width), one row a key, and give one :class:`Status` a key. TypeError or ValueError for bad arguments,
    before anything is done; ClosedError after close and in a forked child; ArenaBusyError where a change waited
    longer than ``lock_timeout_s`` for a stopped holder of the arena lock.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.name: Final = attachment.name
        self.group: Final = attachment.member.group or None
        self.rank: Final = attachment.member.rank
        self.world_size: Final = attachment.member.world_size
        self.lane: Final = int(lib.sc_own_lane(attachment.handle))
        self._attachment = attachment
        self._handle = attachment.handle
        self._core = _fast.Core(
            attachment,
            attachment.handle,
            int(ffi.cast("uintptr_t", attachment.handle)),
            ReadBatch,
            partial(attachment.payload, writable=False),
            partial(attachment.payload, writable=True),
        )
        self._read = self._core.read
        self._lookup = self._core.lookup
        self._check = attachment.check
        self._later = attachment.later
        self._waiting = attachment.later.waiting

    def __repr__(self) -> str:
        who = "" if self.group is None else f" group={self.group!r} rank={self.rank} of {self.world_size}"
        return f"<shmcache.Cache {self.name!r} lane={self.lane}{who}{' closed' if self.closed else ''}>"

    # Writing

    def reserve_write(
        self,
        keys: Keys,
        layout: LayoutLike | Sequence[LayoutLike],
        *,
        region: str | int | None = None,
        writers: int = 1,
        temporary: bool = False,
    ) -> WriteBatch:
        """Memory for objects of these keys, evicting what is worth least where there is no room.

        ``layout``: a :class:`Layout`, or bytes an object as int, or one of these a key. ``temporary``: the
        objects are freed when their last share is released. ``region``: where they are to lie: None or 0 for host
        memory, the number of a region of device memory, or "cuda:0" for a region on that device, this process's own
        first; ValueError or DeviceError where there is none (:meth:`add_region`).

        ``writers``: so many lanes of this group fill each object together, each its own part. Each of them calls this
        with the same arguments and gets the same memory, and publishes (or finishes) when its part is done; the last
        to do so makes the object readable, with the shares for the most ranks that any of them asked for. Where one
        aborts, closes or dies before its part is done nobody publishes: the key is free again, the memory when no
        other writer fills it any more, and their publish says NOT_OWNER or NOT_FOUND. TypeError unless int (not
        bool), ValueError unless 1 <= writers <= world_size; GroupError where another of the group writes a key with
        other ``writers``, ``layout``, ``region`` or ``temporary``, and then nothing stays reserved.

        Status of a key: OK; EXISTS; IN_FLIGHT (it is being written, or this lane has its part in it already);
        NO_SPACE (every run of blocks of that length is being written or has shares; then nothing was evicted); LOST
        (the region's owner is gone, or somebody has a share of an object of that key which was lost).
        ArenaSpaceError where the kernel has no memory for blocks that were never used before; then nothing stays
        reserved.
        """
        if self._waiting:
            self._later.poll()
        packed = pack(keys)
        n = packed[3]
        number = 0 if region is None else self._region(region)
        writers = check_writers(writers, self.world_size)
        check_bool(temporary, "temporary")
        nbytes, layouts, each = self._demand(layout, n)
        batch = WriteBatch.over(self._core, packed)  # before the memory: whatever is raised, it aborts
        batch._ok = n
        refs = batch._refs
        ok = lib.sc_reserve_write(
            self._handle,
            _data(packed),
            packed[1],
            _ends(packed),
            n,
            nbytes,
            layouts,
            each,
            number,
            temporary,
            writers,
            refs,
        )
        batch._ok = max(ok, 0)
        if ok == lib.SC_E_UNLIKE:
            key = batch.keys[codes_of(refs, n).index(lib.SC_UNLIKE)]
            raise errors.GroupError(
                f"arena {self.name!r}: another rank of group {self.group!r} is writing key {key.hex()} with other "
                f"terms than writers={writers} and this layout; let all writers of a key state the same writers, "
                "layout, region and temporary"
            )
        self._check(ok)
        return batch

    def finish_write(self, keys: Keys) -> list[Status]:
        """Publishes what this lane reserved, or says that its part is done: OK, NOT_FOUND, NOT_OWNER, or EXISTS
        (published already)."""
        return self._finish_write(keys, 0)

    def finish_write_and_reserve_read(self, keys: Keys, extra_count: int = 0) -> list[Status]:
        """The same, and grants one reserved share each to ranks 0 to ``extra_count`` before anybody can evict.

        ``extra_count``: TypeError unless int (not bool), ValueError unless 0 <= extra_count < world_size.
        """
        return self._finish_write(keys, check_extra_count(extra_count, self.world_size) + 1)

    def abort_write(self, keys: Keys) -> list[Status]:
        """Gives back what this lane reserved: OK, NOT_FOUND, NOT_OWNER, or EXISTS (published already)."""
        self._attachment.check_open()
        with suppress(errors.DeviceError):  # a broken context writes nothing any more
            self._attachment.regions.complete_writes()
        return self._each("sc_abort_write", keys)

    def put(self, key: BytesLike, data: Any) -> Status:
        """Copies ``data`` (a contiguous buffer of at least one byte) in and publishes it: OK, EXISTS, IN_FLIGHT
        or NO_SPACE. ArenaSpaceError as with :meth:`reserve_write`."""
        if self._waiting:
            self._later.poll()
        packed, width = (key, len(key)) if type(key) is bytes and 0 < len(key) <= MAX_KEY else pack([key])[:2]
        try:
            source = data if type(data) is bytes else ffi.from_buffer("char[]", data)
        except (TypeError, BufferError, ValueError) as error:
            raise TypeError(f"data: expected a contiguous bytes-like object, got {shown(data)} ({error})") from None
        nbytes = len(source)
        if nbytes == 0:
            raise ValueError("data: expected at least 1 byte, got none")
        codes, attachment = new(_CODES, 1), self._attachment
        ok = _sc_put(self._handle, packed, width, attachment.write_address(), source, nbytes, codes)
        if ok < 0:
            self._check(ok)
        if attachment.listeners:
            attachment.tell([bytes(key)], ffi.buffer(codes)[:])
        return STATUSES[int(codes[0])]

    # Reading

    def lookup(self, keys: Keys) -> int:
        """How many leading keys are readable now."""
        if self._waiting:
            self._later.poll()
        found = self._lookup(keys)
        if found is not None:
            return found
        packed = pack(keys)
        return self._check(lib.sc_lookup(self._handle, _data(packed), packed[1], _ends(packed), packed[3]))

    def status(self, keys: Keys) -> list[Status]:
        """OK, IN_FLIGHT, NOT_FOUND, or LOST: the owner of the region that it lies in is gone."""
        return self._each("sc_get_status", keys)

    def reserve_read(self, keys: Keys, extra_count: int = 0) -> list[Status]:
        """Grants one reserved share each to ranks 0 to ``extra_count`` of this group: OK, NOT_FOUND, IN_FLIGHT, LOST,
        or NO_SHARE where a rank has 65,535 of that object already. ``extra_count`` is checked as in
        :meth:`finish_write_and_reserve_read`."""
        return self._each("sc_reserve_read", keys, check_extra_count(extra_count, self.world_size) + 1)

    def read(self, keys: Keys, *, prefix: bool = False, wait_s: float = 0.0) -> ReadBatch:
        """Claims this lane's reserved share of each object, else takes a fresh one.

        ``prefix``: stop at the first miss; the keys behind it are NOT_FOUND without a look. ``wait_s``: how long
        to wait for keys that are being written (IN_FLIGHT); a writer that dies meanwhile is noticed at once, and a
        key that nobody writes is not waited for. Status of a key: OK, NOT_FOUND, IN_FLIGHT, NO_SHARE (this
        lane holds 16,383 shares of it), or LOST (the owner of the region that it lies in is gone; a share that was
        reserved for this lane is given back).
        """
        if self._waiting:
            self._later.poll()
        if prefix is not False:
            check_bool(prefix, "prefix")
        if wait_s != 0.0:
            _check_wait(wait_s)
        batch = self._read(keys, _PREFIX if prefix else 0) or self._take_packed(pack(keys), _PREFIX if prefix else 0)
        if (prefix or wait_s) and batch._ok != len(batch):
            self._read_on(batch, prefix, wait_s)
        return batch

    def finish_read(self, keys: Keys) -> list[Status]:
        """Gives back one own reserved share unread: OK, NO_SHARE (there is none), NOT_FOUND."""
        return self._each("sc_finish_read", keys)

    def cancel_read(self, keys: Keys, extra_count: int = 0) -> list[Status]:
        """Takes back an unclaimed share from each of ranks 0 to ``extra_count``: OK where there was one at all,
        else NO_SHARE; NOT_FOUND. ``extra_count`` is checked as in :meth:`finish_write_and_reserve_read`."""
        return self._each("sc_cancel_read", keys, check_extra_count(extra_count, self.world_size) + 1)

    def touch(self, keys: Keys) -> list[Status]:
        """Counts as a request for eviction: OK, NOT_FOUND, IN_FLIGHT."""
        return self._each("sc_touch_keys", keys)

    # Removing

    def delete(self, keys: Keys, *, force: bool = False) -> list[Status]:
        """Deletes objects: OK, NOT_FOUND, or LOCKED while shares or a writer exist; then nothing was taken.

        Reserved shares whose lease is over do not count, nor, with ``force``, any reserved ones; held shares do.
        """
        check_bool(force, "force")
        return self._each("sc_delete", keys, force)

    def evict(self, nbytes: int, *, region: str | int | None = None) -> int:
        """Evicts what is worth least in a region (as in :meth:`reserve_write`; by default host memory) until ``nbytes``
        of blocks are free again, or nothing more can go: bytes freed."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int):
            raise TypeError(f"nbytes: expected int, got {shown(nbytes)}")
        if not 0 <= nbytes < 2**63:
            raise ValueError(f"nbytes: expected 0 or more, got {shown(nbytes)}")
        if self._waiting:
            self._later.poll()
        return self._check(lib.sc_evict(self._handle, 0 if region is None else self._region(region), nbytes))

    def clear(self) -> int:
        """Deletes all objects that are not locked: how many."""
        if self._waiting:
            self._later.poll()
        return self._check(lib.sc_clear(self._handle))

    def reap(self) -> ReapReport:
        """Takes back what dead lanes left: shares, half-written objects, the arena lock. Others do so, too, when they
        need it; nobody has to call this."""
        return self._reap(wait=True)

    # The whole

    def verify(self) -> list[str]:
        """Walks the whole arena under its lock: every breach of an invariant, in words; [] is sound."""
        report = ffi.new("char[]", _REPORT_BYTES)
        findings = self._check(lib.sc_verify(self._handle, report, _REPORT_BYTES))
        lines = ffi.string(report).decode("utf-8", "replace").splitlines()
        return [*lines, f"and {findings - len(lines)} more"] if findings > len(lines) else lines

    # Device memory

    def add_region(self, device: str, capacity: int | str) -> int:
        """Allocates a region of device memory for objects, which every process of this host can read in place: its
        number.

        ``device``: "cuda:0" or the like, as this process numbers them. ``capacity``: payload bytes as int or text like
        "4GiB", a multiple of the block size there: the arena's, or as many times twice of it as leaves no more blocks
        than the arena has in host memory; ValueError says which. It is one plain allocation (cuMemAlloc), exported by
        CUDA IPC. This process owns it: with its end, with :meth:`close` or :meth:`remove_region` the objects are LOST.

        Needs cuda-bindings (extra ``cuda``): DeviceError without it, without such a device, where the device has no
        room or cannot export memory, or where the arena has no more numbers (``ArenaConfig(regions=...)``).
        """
        with self._attachment.lock:
            self._attachment.check_open()
            return self._attachment.regions.add(device, capacity)

    def remove_region(self, region: int) -> None:
        """Gives up a region that this process has added: its objects are LOST, the memory is free.

        ViewInUseError while tensors in it are alive in this process; ValueError where it is not this process's. While
        another process has tensors in it the memory stays allocated, after 2 s of waiting and with a RuntimeWarning.
        """
        with self._attachment.lock:
            self._attachment.check_open()
            self._later.waits()  # a stream that has passed keeps nothing
            self._attachment.regions.remove(region)

    def open_region(self, region: str | int) -> None:
        """Opens a region here and now, instead of at the first ``tensors()``, and copies a pattern out of it:
        DeviceError where this process cannot read it, and why. To be called when a worker starts."""
        with self._attachment.lock:
            self._attachment.check_open()
            regions = self._attachment.regions
            number = regions.number_of(region)
            if number == 0:
                raise ValueError(f"region: expected one of device memory, got {shown(region)}")
            if regions.mapped(number) is None:
                raise errors.DeviceError(f"arena {self.name!r}: the owner of region {region} is gone; add it again")

    def _region(self, region: str | int) -> int:
        with self._attachment.lock:
            self._attachment.check_open()
            return self._attachment.regions.number_of(region)

    # Page-locked for a GPU

    def pin(self) -> None:
        """Page-locks this process's mapping of region 0, so that copies between its views and a GPU are as fast as from
        any pinned memory, and asynchronous. Again: nothing.

        All of the arena gets memory first (as ``populate=True``), and then both of this process's mappings are
        registered with the CUDA driver, in pieces of at most 64 GiB, all or none, for every device of this process; the
        context is the calling thread's, or else that of device 0. Others pin for themselves. ``close`` unpins.

        Needs cuda-bindings (extra ``cuda``): DeviceError without it, without a device, or where the device cannot pin
        read-only memory, which readers' mappings are. ArenaSpaceError where the memory is not to be had.
        """
        self._note_pinned(self._attachment.pin())

    def unpin(self) -> None:
        """Ends :meth:`pin`. The caller's streams must be done with the views. Where nothing is pinned: nothing."""
        self._note_pinned(-self._attachment.unpin())

    def _note_pinned(self, nbytes: int) -> None:
        if nbytes:
            lib.sc_note(self._handle, ffi.new("struct sc_note *", (lib.SC_GAUGE, _PINNED, nbytes)), 1)

    def stats(self) -> Stats:
        """Occupancy and counters, a snapshot without a lock."""
        with self._attachment.lock:  # nobody closes meanwhile
            self._attachment.check_open()
            found = snapshot.stats(self._handle, self._attachment.fd)
        self._check(lib.sc_intact(self._handle))
        return found

    def close(self) -> None:
        """Leaves the arena: reserved and held shares are given back, unfinished writes aborted. Again: nothing.

        ViewInUseError while a batch with views, or a tensor, array or view of one, is alive; then nothing is
        done. In a forked child this only drops the mapping.
        """
        self._attachment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except errors.ViewInUseError:
            # The error in flight is what the caller must see; its frames keep the views, and __del__ comes after.
            return

    def __del__(self) -> None:
        attachment: Attachment | None = getattr(self, "_attachment", None)
        if attachment is None or attachment.closed or sys.is_finalizing():
            return
        try:
            attachment.close(wait=False)  # perhaps this is the thread that looks at the streams
        except errors.ShmcacheError:
            attachment.keep()
        if not attachment.forked:
            warnings.warn(f"{self!r} was dropped without close", ResourceWarning, stacklevel=2, source=self)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._attachment.closed

    # What the methods above stand on

    def _take(self, keys: Keys, flags: int) -> ReadBatch:
        """A read that waits for nothing, with flags of the core."""
        return self._read(keys, flags) or self._take_packed(pack(keys), flags)

    def _take_packed(self, packed: Packed, flags: int) -> ReadBatch:
        """The same for keys of every kind."""
        batch = self._core.batch(ReadBatch, packed, False)  # before the shares: whatever is raised, it releases
        batch._ok = self._check(
            lib.sc_read(self._handle, _data(packed), packed[1], _ends(packed), packed[3], flags, batch._refs)
        )
        return batch

    def _finish_write(self, keys: Keys, ranks: int) -> list[Status]:
        self._attachment.check_open()
        self._attachment.regions.complete_writes()
        packed = pack(keys)
        codes, _ = self._call(lib.sc_finish_write, packed, ranks)
        found = ffi.buffer(codes)[:]
        if self._attachment.listeners:
            self._attachment.tell(unpack(packed), found)
        return statuses(found)

    def _reap(self, *, wait: bool) -> ReapReport:
        if self._waiting:
            self._later.poll()
        found = ffi.new("struct sc_reaped *")
        self._check(lib.sc_reap(self._handle, wait, found))
        return ReapReport(found.lanes, found.shares, found.writes, bool(found.lock))

    def _each(self, function: str, keys: Keys, *args: int) -> list[Status]:
        if function in _FAST:
            if self._waiting:
                self._later.poll()
            found = self._core.each(_FAST[function], keys, *args)
            if found is not None:
                return found
        packed = pack(keys)
        codes, ok = self._call(getattr(lib, function), packed, *args)
        return [OK] * ok if ok == packed[3] else statuses(ffi.buffer(codes)[:])

    def _call(self, function: Any, packed: Packed, *args: int) -> tuple[Any, int]:
        """The code of each key, and how many are OK."""
        if self._waiting:
            self._later.poll()
        codes = new(_CODES, packed[3])
        ok = function(self._handle, _data(packed), packed[1], _ends(packed), packed[3], *args, codes)
        return codes, self._check(ok)

    def _read_on(self, batch: ReadBatch, prefix: bool, wait_s: float) -> None:
        """The rest of a read that did not find all: waits for writers, and settles what lies behind a gap."""
        packed, refs, n = batch._packed, batch._refs, len(batch)
        data, ends, flags = _data(packed), _ends(packed), lib.SC_AGAIN | (_PREFIX if prefix else 0)
        deadline = time.monotonic() + wait_s
        nap, reap_at = _NAP_S, time.monotonic() + _REAP_S
        while wait_s > 0 and time.monotonic() < deadline and _waits(codes_of(refs, n), prefix):
            time.sleep(min(nap, max(0.0, deadline - time.monotonic())))
            nap = min(2 * nap, _LONG_NAP_S)
            if time.monotonic() > reap_at:
                with suppress(errors.ArenaBusyError):  # a stopped lock holder stops no reader
                    self._reap(wait=False)
                reap_at = time.monotonic() + _REAP_S
            batch._ok += self._check(lib.sc_read(self._handle, data, packed[1], ends, n, flags, refs))
        if prefix:
            _settle(refs, n)

    def _demand(self, layout: LayoutLike | Sequence[LayoutLike], n: int) -> tuple[Any, Any, bool]:
        """Bytes and layout number, of all keys or one a key, as the core takes them."""
        if isinstance(layout, (Layout, int)):
            nbytes, number = self._need(layout)
            return new("uint64_t[]", [nbytes]), new("uint32_t[]", [number]), False
        if isinstance(layout, (str, bytes)) or not isinstance(layout, Sequence):
            raise TypeError(f"layout: expected a Layout, bytes as int, or one of these a key, got {shown(layout)}")
        if len(layout) != n:
            raise ValueError(f"layout: expected one a key ({n}), got {len(layout)}")
        needs = [self._need(one) for one in layout]
        return (
            new("uint64_t[]", [need[0] for need in needs]),
            new("uint32_t[]", [need[1] for need in needs]),
            True,
        )

    def _need(self, layout: LayoutLike) -> tuple[int, int]:
        if isinstance(layout, Layout):
            return layout.nbytes, self._attachment.number_of(layout)
        if isinstance(layout, bool) or not isinstance(layout, int):
            raise TypeError(f"layout: expected a Layout or bytes as int, got {shown(layout)}")
        if not 1 <= layout <= MAX_NBYTES:
            raise ValueError(f"layout: expected 1 to 2**48 bytes an object, got {shown(layout)}")
        return layout, 0


def _check_wait(wait_s: float) -> None:
    if isinstance(wait_s, bool) or not isinstance(wait_s, (int, float)):
        raise TypeError(f"wait_s: expected seconds, got {shown(wait_s)}")
    if not 0 <= wait_s < float("inf"):
        raise ValueError(f"wait_s: expected 0 or more seconds, got {shown(wait_s)}")


def _waits(found: bytes, prefix: bool) -> bool:
    """Whether a key is in flight that a read may wait for: with prefix, only the first that is not OK."""
    if not prefix:
        return _IN_FLIGHT in found
    return next((code for code in found if code), None) == _IN_FLIGHT


def _settle(refs: Any, n: int) -> None:
    """Behind the first miss of a prefix nothing was looked at: NOT_FOUND."""
    codes = codes_of(refs, n)
    gap = next((i for i, code in enumerate(codes) if code), n)
    for i in range(gap + 1, n):
        refs[i].status = _NOT_FOUND
