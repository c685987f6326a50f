"""Regions of device memory in this process: those that it owns, and those of others that it has opened.

An allocation ends with a pattern that only its own handle gives. Who opens a region copies it to the host: that this
process can read the region is tried, not believed. A region is opened once for each device of this process that reads
it, and stays open until it is lost and nothing made from it is alive.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from shmcache import errors
from shmcache._binding import NOBODY, Handle, check, ffi, lib
from shmcache.config import parse_size, shown
from shmcache.device import Device, Driver
from shmcache.device_views import Mapped, complete_streams
from shmcache.layout import MAX_NBYTES
from shmcache.snapshot import device_uuid
from shmcache.status import OK

__all__ = ["Regions"]

_PROBE_BYTES: Final = 4096
_PAGE_BYTES: Final = 2 << 20  #: of a device; others map what has another length in small pages, at half the bandwidth
_LEAVE_S: Final = 2.0  #: how long an owner that leaves waits for others to close its region
_DEVICE: Final = re.compile(r"cuda:([0-9]{1,4})", re.ASCII)
_ADVICE: Final = (
    "its process and this one must see the same GPUs and share an IPC namespace (docker run --ipc=host), without MIG; "
    "host memory (region=None, with pin()) works everywhere"
)


# What this process has exported, by handle: it cannot open that itself, and another attachment of it may want to.
_exported: dict[bytes, tuple[Device, int]] = {}
os.register_at_fork(after_in_child=_exported.clear)


class Regions:
    """One attachment's. Its lock is held by whoever calls; the arena's is not. ``watch`` is called when something is
    open that :meth:`settle` has to close one day."""

    def __init__(self, arena: str, handle: Handle, watch: Callable[[], None]) -> None:
        self.arena: Final = arena
        self._handle: Final = handle
        self._watch: Final = watch
        self._driver: Driver | None = None
        self._own: dict[int, Mapped] = {}
        #: By number, and the device of the context of the thread that opened it, None where it had none.
        self._opened: dict[tuple[int, int | None], Mapped] = {}
        self._written: dict[int, Device] = {}  #: those on which this process has made tensors to write into

    @property
    def driver(self) -> Driver:
        """Loaded when it is first needed. DeviceError."""
        if self._driver is None:
            self._driver = Driver(self.arena)
        return self._driver

    # Those that this process owns

    def add(self, device: object, capacity: int | str) -> int:
        """Allocates, exports and records a region: its number."""
        nbytes = parse_size(capacity, "capacity")
        if nbytes > MAX_NBYTES:
            raise ValueError(f"capacity: expected at most 2**48 bytes, got {shown(capacity)}")
        block_size = int(lib.sc_region_block_size(self._handle, nbytes))
        if nbytes % block_size:
            raise ValueError(
                f"capacity: expected a multiple of {block_size} bytes, the block size in a region of that size here, "
                f"got {shown(capacity)}"
            )
        home = self._device(device, "device")
        address = home.allocate(-(-(nbytes + _PROBE_BYTES) // _PAGE_BYTES) * _PAGE_BYTES)
        try:
            exported = home.export(address)
            home.write(address + nbytes, _pattern(exported))
            _exported[exported] = home, address  # first: other caches of this process may look at once
            number = self._record(home, exported, nbytes)
        except BaseException:
            self._discard(home, address)
            raise
        self._own[number] = Mapped(number, self._info(number).generation, home, address, nbytes)
        return number

    def _record(self, home: Device, exported: bytes, nbytes: int) -> int:
        spec = ffi.new("struct sc_region_spec *")
        spec.handle, spec.uuid, spec.nbytes, spec.device = exported, home.uuid, nbytes, home.ordinal
        return check(self.arena, self._handle, lib.sc_region_add(self._handle, spec))

    def remove(self, number: object) -> None:
        """Gives up an own region: its objects are lost. ViewInUseError while something made from it is alive here."""
        mapped = self._own.get(number) if type(number) is int else None
        if mapped is None:
            raise ValueError(f"region: expected one that this process has added, got {shown(number)}")
        self._check_unused(mapped)
        self._give_up(mapped)
        self._free(mapped, time.monotonic() + _LEAVE_S)

    def _give_up(self, mapped: Mapped) -> None:
        check(self.arena, self._handle, lib.sc_region_give_up(self._handle, mapped.number))
        del self._own[mapped.number]

    def _free(self, mapped: Mapped, deadline: float) -> None:
        """Others close what they have open as soon as nothing made from it is alive; to free it before is not safe."""
        while (others := self._others(mapped)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if others:
            self._leave(mapped, f"is open in lanes {others}")
            return
        with _warned(f"asked to free region {mapped.number}"):
            self._discard(mapped.device, mapped.address)

    def _discard(self, home: Device, address: int) -> None:
        for exported in [handle for handle, (_, where) in list(_exported.items()) if where == address]:
            del _exported[exported]
        home.free(address)

    def _leave(self, mapped: Mapped, why: str) -> None:
        warnings.warn(
            f"arena {self.arena!r}: region {mapped.number} {why}, so its memory stays allocated until this process "
            "ends",
            RuntimeWarning,
            stacklevel=5,
        )

    def _others(self, mapped: Mapped) -> list[int]:
        """The lanes that have the region open. While one has, its number is no other's."""
        info = self._info(mapped.number)
        lanes = (lane for lane in range(64 * len(info.opened)) if info.opened[lane // 64] >> lane % 64 & 1)
        return list(lanes) if info.generation == mapped.generation else []

    # Those of others

    def number_of(self, region: object) -> int:
        """The number of a region, given by number, or by its device (then this process's own one first)."""
        if region is None:
            return 0
        if isinstance(region, int) and not isinstance(region, bool):
            if region and not (1 <= region < NOBODY and self._info(region).state):
                raise ValueError(f"region: expected 0 or the number of a region that there is, got {shown(region)}")
            return int(region)
        uuid = self._device(region, "region").uuid
        there = [number for number in self._numbers() if _lives_on(self._info(number), uuid)]
        if not there:
            raise errors.DeviceError(
                f"arena {self.arena!r}: there is no region on {region}; add one: cache.add_region({str(region)!r}, ...)"
            )
        return next((number for number in there if number in self._own), there[0])

    def lives(self, number: int) -> bool:
        """Whether a region's owner is there. For who has a share of an object in it, or writes one."""
        return bool(lib.sc_region_check(self._handle, number) == OK)

    def mapped(self, number: int, *, write: bool = False) -> Mapped | None:
        """The region in this process, opened where it is not yet; None: it is lost. DeviceError."""
        found = self._own.get(number) or self._mapped_of_others(number)
        if found is not None and write:
            self._written[found.device.ordinal] = found.device
        return found

    def complete_writes(self) -> None:
        """For who publishes by key: waits until this thread's current streams have written what they were given."""
        complete_streams(list(self._written.values()))  # others may add to it meanwhile

    def _mapped_of_others(self, number: int) -> Mapped | None:
        here = self.driver.own_ordinal()
        known = self._opened.get((number, here))
        if known is not None and self._say_open(known, open_=True):
            return known
        info = self._info(number)
        opened = self._open(number, info, self._reader(here, bytes(info.uuid))) if info.state == 1 else None
        if opened is not None:
            self._opened[number, here] = opened
            self._watch()
        return opened

    def _reader(self, here: int | None, uuid: bytes) -> Device:
        """The device that a region is opened on: the thread's own, or else the region's, or else any."""
        if here is not None:
            return self.driver.device(here)
        return self._home(uuid) or self.driver.device(0)

    def settle(self) -> bool:
        """Closes what is lost and nothing is made from any more. Whether something is still open."""
        closed = [key for key, mapped in self._opened.items() if not mapped.loans and not self._is_still(mapped)]
        for key in closed:
            self._close(self._opened.pop(key))
        if closed:  # its number may be free now
            lib.sc_reap(self._handle, False, ffi.new("struct sc_reaped *"))
        return bool(self._opened)

    def check_unused(self) -> None:
        """ViewInUseError while something made from any region is alive."""
        for mapped in (*self._own.values(), *self._opened.values()):
            self._check_unused(mapped)

    def close(self) -> None:
        """Gives up what is its own, and closes what is others'."""
        for key in list(self._opened):
            self._close(self._opened.pop(key))
        own = list(self._own.values())
        try:
            for mapped in own:
                self._give_up(mapped)
            deadline = time.monotonic() + _LEAVE_S
            for mapped in own:
                self._free(mapped, deadline)
        except (errors.ArenaDamagedError, errors.ClosedError):
            self._own.clear()
            self._leave(own[0], "lies in an arena that cannot tell who has it open")

    def _open(self, number: int, info: Any, reader: Device) -> Mapped | None:
        mapped = Mapped(number, info.generation, reader, 0, info.blocks * info.block_size)
        if not self._say_open(mapped, open_=True):
            return None
        if bytes(info.handle) in _exported:
            mapped.device, mapped.address = _exported[bytes(info.handle)]
            return mapped
        try:
            self._check_peer(reader, bytes(info.uuid))
            mapped.address = reader.open(bytes(info.handle))
            mapped.imported = True
            self._probe(mapped, info)
        except errors.DeviceError as error:
            self._close(mapped)
            if not self._is_still(mapped):
                return None  # its owner died meanwhile
            raise errors.DeviceError(
                f"{error}: region {number} of {device_uuid(bytes(info.uuid))} cannot be read on cuda:{reader.ordinal} "
                f"here; {_ADVICE}"
            ) from None
        return mapped

    def _check_peer(self, reader: Device, uuid: bytes) -> None:
        home = self._home(uuid)
        if home is not None and home.ordinal != reader.ordinal and not reader.reaches(home):
            raise errors.DeviceError(
                f"arena {self.arena!r}: cuda:{reader.ordinal} has no peer access to cuda:{home.ordinal}"
            )

    def _probe(self, mapped: Mapped, info: Any) -> None:
        expected = _pattern(bytes(info.handle))
        if mapped.device.length(mapped.address) < info.nbytes + _PROBE_BYTES:
            raise errors.DeviceError(f"arena {self.arena!r}: the allocation has another length than its owner recorded")
        if mapped.device.read(mapped.address + info.nbytes, _PROBE_BYTES) != expected:
            raise errors.DeviceError(f"arena {self.arena!r}: a copy of what its owner wrote there gave other bytes")

    def _close(self, mapped: Mapped) -> None:
        if mapped.imported:
            with _warned(f"asked to close region {mapped.number}"):
                mapped.device.close(mapped.address)
        others = (other.number for other in self._opened.values() if other.generation == mapped.generation)
        if mapped.number not in others:
            self._say_open(mapped, open_=False)

    def _say_open(self, mapped: Mapped, *, open_: bool) -> bool:
        """Tells the arena; whether it is the region that it was, and lives."""
        return bool(lib.sc_region_opened(self._handle, mapped.number, mapped.generation, open_) == OK)

    def _is_still(self, mapped: Mapped) -> bool:
        info = self._info(mapped.number)
        return bool(info.state == 1 and info.generation == mapped.generation)

    def _check_unused(self, mapped: Mapped) -> None:
        if mapped.loans:
            raise errors.ViewInUseError(
                f"arena {self.arena!r}: batches or tensors in region {mapped.number} are alive; release and drop them, "
                "and wait for the streams that release_after was given"
            )

    def _info(self, number: int) -> Any:
        info = ffi.new("struct sc_region_info *")
        code = lib.sc_get_region(self._handle, number, info)
        if code < 0 and code != lib.SC_E_REGIONS:
            check(self.arena, self._handle, code)
        return info

    def _numbers(self) -> range:
        info = ffi.new("struct sc_info *")
        lib.sc_get_info(self._handle, info)
        return range(1, info.regions + 1)

    def _home(self, uuid: bytes) -> Device | None:
        """The device of that name, if this process sees it."""
        return next((device for device in self.driver.devices() if device.uuid == uuid), None)

    def _device(self, device: object, what: str) -> Device:
        if not isinstance(device, str) and type(device).__module__ != "torch":
            raise TypeError(f'{what}: expected "cuda:0" or the like, got {shown(device)}')
        match = _DEVICE.fullmatch(str(device))
        if match is None:
            raise ValueError(f'{what}: expected "cuda:0" or the like, got {shown(device)}')
        devices = self.driver.devices()
        ordinal = int(match[1])
        if ordinal >= len(devices):
            raise errors.DeviceError(
                f"arena {self.arena!r}: there is no {match[0]}; this process sees {len(devices)} devices"
            )
        return devices[ordinal]


@contextmanager
def _warned(asked: str) -> Iterator[None]:
    """A driver that refuses to end something is shut down, or its context is broken: then it has ended."""
    try:
        yield
    except errors.DeviceError as error:
        warnings.warn(f"{error}, {asked}", RuntimeWarning, stacklevel=5)


def _lives_on(info: Any, uuid: bytes) -> bool:
    return bool(info.state == 1 and bytes(info.uuid) == uuid)


def _pattern(exported: bytes) -> bytes:
    """What lies behind the payload of the allocation that is exported under this handle."""
    return hashlib.shake_128(exported).digest(_PROBE_BYTES)
