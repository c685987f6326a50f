"""The few calls of CUDA's driver that shmcache makes, for machines without one: a module in place of
``cuda.bindings.driver``.

It is as strict as the driver: memory must be mapped when it is registered and when it is not any more, a mapping that
cannot be written needs the flag for that, nothing is registered twice, and a call without a context is an error.
"""

from __future__ import annotations

import enum
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class CUresult(enum.IntEnum):
    """What calls answer."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_DEINITIALIZED = 4
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713


class CUdevice_attribute(enum.IntEnum):  # noqa: N801 # the driver's name
    """What can be asked of a device."""

    CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113


PORTABLE, READ_ONLY = 1, 8
_OK = CUresult.CUDA_SUCCESS


@dataclass
class Double:
    """One driver in one process. ``calls`` are the names of the calls so far."""

    devices: int = 1
    read_only: bool = True  #: whether the device can register read-only memory
    room: int = 1 << 62  #: bytes that can be registered
    calls: list[str] = field(default_factory=list)
    registered: dict[int, tuple[int, int]] = field(default_factory=dict)  #: address: bytes, flags
    shut_down: bool = False
    stacks: threading.local = field(default_factory=threading.local)

    def module(self) -> types.ModuleType:
        """What ``from cuda.bindings import driver`` gives."""
        made = types.ModuleType("cuda.bindings.driver")
        made.__dict__.update(CUresult=CUresult, CUdevice_attribute=CUdevice_attribute)
        made.__dict__.update(CU_MEMHOSTREGISTER_PORTABLE=PORTABLE, CU_MEMHOSTREGISTER_READ_ONLY=READ_ONLY)
        for name in dir(self):
            if name.startswith("cu"):
                made.__dict__[name] = self._noted(name)
        return made

    def _noted(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if self.shut_down:
                return (CUresult.CUDA_ERROR_DEINITIALIZED,)
            given: tuple[Any, ...] = getattr(self, name)(*arguments)
            return given

        return call

    @property
    def stack(self) -> list[int]:
        """The contexts of this thread."""
        if not hasattr(self.stacks, "contexts"):
            self.stacks.contexts = []
        contexts: list[int] = self.stacks.contexts
        return contexts

    def cuInit(self, _flags: int) -> tuple[Any, ...]:  # noqa: N802
        return (_OK if self.devices else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return (_OK, ordinal)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return (_OK, self.stack[-1] if self.stack else 0)

    def cuCtxGetDevice(self) -> tuple[Any, ...]:  # noqa: N802
        return (_OK, self.stack[-1] - 1000) if self.stack else (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        return (_OK, 1000 + device)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        self.stack.append(context)
        return (_OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return (_OK, self.stack.pop())

    def cuDeviceGetAttribute(self, attribute: int, _device: int) -> tuple[Any, ...]:  # noqa: N802
        assert attribute == CUdevice_attribute.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
        return (_OK, int(self.read_only))

    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        access = protection(address, nbytes)
        if access is None or ("w" not in access and not (flags & READ_ONLY and self.read_only)):
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        if any(address < begin + n and begin < address + nbytes for begin, (n, _) in self.registered.items()):
            return (CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        if sum(n for n, _ in self.registered.values()) + nbytes > self.room:
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        self.registered[address] = (nbytes, flags)
        return (_OK,)

    def cuMemHostUnregister(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        if address not in self.registered:
            return (CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,)
        nbytes, _ = self.registered.pop(address)
        assert protection(address, nbytes) is not None, "it was unmapped while it was registered"
        return (_OK,)


def protection(address: int, nbytes: int) -> str | None:
    """What may be done with memory of this process, as ``rw-s``; None where not all of it is mapped alike."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, access = line.split()[:2]
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if begin <= address and address + nbytes <= end:
            return access
    return None
