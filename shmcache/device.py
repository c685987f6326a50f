"""CUDA's driver, as far as shmcache needs it; the only module that calls it.

cuda-bindings (``pip install 'shmcache[cuda]'``) is imported when it is first asked for. No driver call is made while
the arena lock is held, nor by who reaps.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from shmcache.errors import DeviceError

__all__ = ["PIECE_BYTES", "Device", "Driver", "Event", "Pinned", "Range", "pin"]

PIECE_BYTES: Final = 64 << 30  #: registered in one call at most
HANDLE_BYTES: Final = 64


class Driver:
    """The driver, as an arena's messages name it. DeviceError where there is none."""

    def __init__(self, arena: str) -> None:
        self.arena: Final = arena
        self.calls: Final = _load(arena)
        try:
            result = self.calls.cuInit(0)
        except Exception as error:  # noqa: BLE001 # whatever cuda-bindings raises where there is no libcuda
            raise DeviceError(f"arena {arena!r}: there is no CUDA driver here ({error})") from None
        self.call(result)
        self._devices: dict[int, Device] = {}

    def call(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a driver call gave beside its error, which is raised."""
        error, *values = result
        if error != self.calls.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"arena {self.arena!r}: the CUDA driver says {getattr(error, 'name', error)}")
        return tuple(values)

    def one(self, result: tuple[Any, ...]) -> Any:
        """The same of a call that gives one value."""
        (value,) = self.call(result)
        return value

    @contextmanager
    def current(self, context: Any) -> Iterator[None]:
        """The context is this thread's for the time of the block."""
        self.call(self.calls.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            self.calls.cuCtxPopCurrent()

    def device(self, ordinal: int) -> Device:
        """One of those that this process sees, by its number: always the same object."""
        if ordinal not in self._devices:
            self._devices[ordinal] = Device(self, ordinal)
        return self._devices[ordinal]

    def devices(self) -> list[Device]:
        """Those that this process sees."""
        return [self.device(ordinal) for ordinal in range(self.one(self.calls.cuDeviceGetCount()))]

    def own_ordinal(self) -> int | None:
        """The device of the calling thread's context; None where it has none."""
        if not int(self.one(self.calls.cuCtxGetCurrent())):
            return None
        return int(self.one(self.calls.cuCtxGetDevice()))

    def own_context(self) -> Any:
        """The calling thread's context, or, where it has none, the primary one of device 0."""
        context = self.one(self.calls.cuCtxGetCurrent())
        return context if int(context) else self.device(0).context


def _load(arena: str) -> Any:
    try:
        from cuda.bindings import driver  # noqa: PLC0415 # an extra
    except ImportError:
        raise DeviceError(
            f"arena {arena!r}: device memory and pinning need cuda-bindings: pip install 'shmcache[cuda]'"
        ) from None
    return driver


class Device:
    """A device that this process sees, by its number; all is done in its primary context, which torch uses, too."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver: Final = driver
        self.ordinal: Final = ordinal
        self._device: Final = driver.one(driver.calls.cuDeviceGet(ordinal))

    @cached_property
    def uuid(self) -> bytes:
        """16 bytes that name the device on this host, whatever its number."""
        calls = self.driver.calls
        get = getattr(calls, "cuDeviceGetUuid_v2", calls.cuDeviceGetUuid)  # of CUDA 12: a MIG instance's own, as in 13
        return bytes(self.driver.one(get(self._device)).bytes)

    @cached_property
    def context(self) -> Any:
        """Retained until the process ends, as by everybody else who uses the primary context."""
        return self.driver.one(self.driver.calls.cuDevicePrimaryCtxRetain(self._device))

    def reaches(self, other: Device) -> bool:
        """Whether this device can read the other's memory."""
        return bool(self.driver.one(self.driver.calls.cuDeviceCanAccessPeer(self._device, other._device)))

    def allocate(self, nbytes: int) -> int:
        """The address of a plain allocation: one from a pool could not be exported."""
        with self.driver.current(self.context):
            return int(self.driver.one(self.driver.calls.cuMemAlloc(nbytes)))

    def free(self, address: int) -> None:
        """Ends :meth:`allocate`. No other process may have it open."""
        with self.driver.current(self.context):
            self.driver.call(self.driver.calls.cuMemFree(address))

    def export(self, address: int) -> bytes:
        """The handle by which other processes open an allocation."""
        with self.driver.current(self.context):
            handle = self.driver.one(self.driver.calls.cuIpcGetMemHandle(address))
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)  # not all versions of cuda-bindings show the bytes

    def open(self, exported: bytes) -> int:
        """The address at which this process finds another's allocation, also one of another device.

        ``exported``: the 64 bytes of :meth:`export`.
        """
        calls = self.driver.calls
        handle = calls.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), exported, HANDLE_BYTES)
        flags = int(calls.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        with self.driver.current(self.context):
            return int(self.driver.one(calls.cuIpcOpenMemHandle(handle, flags)))

    def close(self, address: int) -> None:
        """Ends :meth:`open`."""
        with self.driver.current(self.context):
            self.driver.call(self.driver.calls.cuIpcCloseMemHandle(address))

    def length(self, address: int) -> int:
        """Bytes of the allocation that begins at ``address``; 0 where none does."""
        with self.driver.current(self.context):
            base, nbytes = self.driver.call(self.driver.calls.cuMemGetAddressRange(address))
        return int(nbytes) if int(base) == address else 0

    def write(self, address: int, data: bytes) -> None:
        """Copies from host to device, and waits for it."""
        source = ctypes.create_string_buffer(data, len(data))
        with self.driver.current(self.context):
            self.driver.call(self.driver.calls.cuMemcpyHtoD(address, ctypes.addressof(source), len(data)))

    def read(self, address: int, nbytes: int) -> bytes:
        """Copies from device to host."""
        target = ctypes.create_string_buffer(nbytes)
        with self.driver.current(self.context):
            self.driver.call(self.driver.calls.cuMemcpyDtoH(ctypes.addressof(target), address, nbytes))
        return target.raw

    def complete(self, stream: int) -> None:
        """Waits until all that was given to a stream of this device is done."""
        with self.driver.current(self.context):
            self.driver.call(self.driver.calls.cuStreamSynchronize(stream))


class Event:
    """A point in a stream, made when the stream is there."""

    def __init__(self, driver: Driver, context: Any, stream: int) -> None:
        self._driver = driver
        self._context = context
        calls = driver.calls
        with driver.current(context):
            self._event = driver.one(calls.cuEventCreate(int(calls.CUevent_flags.CU_EVENT_DISABLE_TIMING)))
            try:
                driver.call(calls.cuEventRecord(self._event, stream))
            except BaseException:
                calls.cuEventDestroy(self._event)
                raise

    def passed(self) -> bool:
        """Whether the stream has passed it. So it has where the context is broken or gone: nothing runs there."""
        calls = self._driver.calls
        try:
            with self._driver.current(self._context):
                (error,) = calls.cuEventQuery(self._event)
        except DeviceError:
            return True
        return bool(error != calls.CUresult.CUDA_ERROR_NOT_READY)

    def destroy(self) -> None:
        """To be called once. What the driver says is of no more use to anybody."""
        try:
            with self._driver.current(self._context):
                self._driver.calls.cuEventDestroy(self._event)
        except DeviceError:
            return


# Page-locking


@dataclass(frozen=True, slots=True)
class Range:
    """Mapped memory of this process."""

    address: int
    nbytes: int
    writable: bool

    def pieces(self, piece_bytes: int) -> Iterator[Range]:
        """The same in parts of at most so many bytes."""
        for at in range(0, self.nbytes, piece_bytes):
            yield Range(self.address + at, min(piece_bytes, self.nbytes - at), self.writable)


def pin(driver: Driver, ranges: list[Range], piece_bytes: int, progress: Callable[[int], None]) -> Pinned:
    """Page-locks all ranges for every device of this process, or none; ``progress`` is told the bytes of each piece.

    The context is the calling thread's, or, where it has none, the primary one of device 0. DeviceError.
    """
    pinned = Pinned(driver, driver.own_context())
    calls = driver.calls
    try:
        with driver.current(pinned.context):
            read_only = _read_only_flag(driver)
            for piece in (piece for whole in ranges for piece in whole.pieces(piece_bytes)):
                flags = calls.CU_MEMHOSTREGISTER_PORTABLE | (0 if piece.writable else read_only)
                driver.call(calls.cuMemHostRegister(piece.address, piece.nbytes, flags))
                pinned.addresses.append(piece.address)
                progress(piece.nbytes)
    except BaseException:
        pinned.release()
        raise
    return pinned


class Pinned:
    """What is page-locked, until ``release``."""

    def __init__(self, driver: Driver, context: Any) -> None:
        self.addresses: list[int] = []  #: of each piece that is registered
        self.context: Final = context
        self._driver = driver

    def release(self) -> None:
        """To be called before the memory is unmapped. Again: nothing.

        Where the driver refuses (it is shut down, or a kernel has broken the context) there is nothing more to be done:
        the pages are the process's until it ends. A warning says so.
        """
        try:
            with self._driver.current(self.context):
                while self.addresses:
                    self._driver.call(self._driver.calls.cuMemHostUnregister(self.addresses.pop()))
        except DeviceError as error:
            self.addresses.clear()
            warnings.warn(f"{error}; pages stay locked until this process ends", RuntimeWarning, stacklevel=2)


def _read_only_flag(driver: Driver) -> int:
    """Read-only mappings can only be registered with this flag, by devices that support it."""
    calls = driver.calls
    device = driver.one(calls.cuCtxGetDevice())
    attribute = calls.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
    if not driver.one(calls.cuDeviceGetAttribute(attribute, device)):
        raise DeviceError(
            f"arena {driver.arena!r}: this device cannot page-lock read-only memory, which readers' mappings are; copy "
            "from unpinned views, or through a pinned buffer of your own"
        )
    return int(calls.CU_MEMHOSTREGISTER_READ_ONLY)
