"""CUDA's driver, as far as shmcache needs it: page-locking this process's mappings of host memory.

cuda-bindings (``pip install 'shmcache[cuda]'``) is imported when it is first asked for. No driver call is made while
the arena lock is held.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from shmcache.errors import DeviceError

__all__ = ["PIECE_BYTES", "Pinned", "Range", "pin"]

PIECE_BYTES: Final = 64 << 30  #: registered in one call at most


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


def pin(name: str, ranges: list[Range], piece_bytes: int, progress: Callable[[int], None]) -> Pinned:
    """Page-locks all ranges for every device of this process, or none; ``progress`` is told the bytes of each piece.

    The context is the calling thread's, or, where it has none, the primary one of device 0. DeviceError.
    """
    driver = _driver(name)
    pinned = Pinned(name, driver, _context(name, driver))
    try:
        with pinned.current():
            read_only = _read_only_flag(name, driver)
            for piece in (piece for whole in ranges for piece in whole.pieces(piece_bytes)):
                flags = driver.CU_MEMHOSTREGISTER_PORTABLE | (0 if piece.writable else read_only)
                _call(name, driver, driver.cuMemHostRegister(piece.address, piece.nbytes, flags))
                pinned.addresses.append(piece.address)
                progress(piece.nbytes)
    except BaseException:
        pinned.release()
        raise
    return pinned


class Pinned:
    """What is page-locked, until ``release``."""

    def __init__(self, name: str, driver: Any, context: Any) -> None:
        self.addresses: list[int] = []  #: of each piece that is registered
        self._name = name
        self._driver = driver
        self._context = context

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is this thread's for the time of the block."""
        _call(self._name, self._driver, self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def release(self) -> None:
        """To be called before the memory is unmapped. Again: nothing.

        Where the driver refuses (it is shut down, or a kernel has broken the context) there is nothing more to be done:
        the pages are the process's until it ends. A warning says so.
        """
        try:
            with self.current():
                while self.addresses:
                    _call(self._name, self._driver, self._driver.cuMemHostUnregister(self.addresses.pop()))
        except DeviceError as error:
            self.addresses.clear()
            warnings.warn(f"{error}; pages stay locked until this process ends", RuntimeWarning, stacklevel=2)


def _driver(name: str) -> Any:
    try:
        from cuda.bindings import driver  # noqa: PLC0415 # an extra
    except ImportError:
        raise DeviceError(f"arena {name!r}: to pin memory needs cuda-bindings: pip install 'shmcache[cuda]'") from None
    try:
        _call(name, driver, driver.cuInit(0))
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 # whatever cuda-bindings raises where there is no libcuda
        raise DeviceError(f"arena {name!r}: there is no CUDA driver here ({error})") from None
    return driver


def _context(name: str, driver: Any) -> Any:
    (context,) = _call(name, driver, driver.cuCtxGetCurrent())
    if int(context):
        return context
    (device,) = _call(name, driver, driver.cuDeviceGet(0))
    # Retained until the process ends, as by everybody else who uses the device's primary context.
    (context,) = _call(name, driver, driver.cuDevicePrimaryCtxRetain(device))
    return context


def _read_only_flag(name: str, driver: Any) -> int:
    """Read-only mappings can only be registered with this flag, by devices that support it."""
    (device,) = _call(name, driver, driver.cuCtxGetDevice())
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
    (supported,) = _call(name, driver, driver.cuDeviceGetAttribute(attribute, device))
    if not supported:
        raise DeviceError(
            f"arena {name!r}: this device cannot page-lock read-only memory, which readers' mappings are; copy from "
            "unpinned views, or through a pinned buffer of your own"
        )
    return int(driver.CU_MEMHOSTREGISTER_READ_ONLY)


def _call(name: str, driver: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a driver call gave beside its error, which is raised."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"arena {name!r}: the CUDA driver says {getattr(error, 'name', error)}")
    return tuple(values)
