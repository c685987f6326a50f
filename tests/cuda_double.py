"""A double of CUDA's driver for machines without one: a module in place of ``cuda.bindings.driver``, in any process.

The processes of a test share a directory, the machine (cuda_memory.py): devices, their UUIDs, memory that is exported
and opened, and who is alive. In the test's own process::

    with cuda_double.installed(tmp_path, devices=2) as double: ...

and in others, before they ask for CUDA::

    import cuda_double; double = cuda_double.install(root, devices=2)

It is as strict as the driver, or stricter: a call needs ``cuInit`` and a current context, an event and its stream must
be of one context, memory must be mapped as long as it is registered, a process cannot open what it exports itself, and
a forked child cannot go on with its parent's driver. What the driver leaves undefined is noted: ``violations(root)``.
cuda_torch.py stands in for CUDA torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_memory import Allocation, Machine, Memory, device_of
from cuda_names import (
    HANDLE_BYTES,
    NAMES,
    CUcontext,
    CUdevice,
    CUdevice_attribute,
    CUdeviceptr,
    CUevent,
    CUipcMem_flags,
    CUipcMemHandle,
    CUresult,
    CUuuid,
    ReadableIpcMemHandle,
    Refused,
    number,
)
from cuda_streams import CONTEXTS, Stream, Streams, Work

PORTABLE: int = NAMES["CU_MEMHOSTREGISTER_PORTABLE"]
READ_ONLY: int = NAMES["CU_MEMHOSTREGISTER_READ_ONLY"]

#: calls that need no context
_WITHOUT_CONTEXT = {
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetUuid",
    "cuDeviceGetAttribute",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
}


@dataclass
class Double:
    """One driver in one process. Devices are numbered as the process sees them, but for ``visible`` and ``peers``."""

    devices: int = 1  #: that the machine has
    read_only: bool = True  #: whether the device can register read-only memory
    room: int = 1 << 62  #: bytes that can be registered
    root: Path | None = None  #: the machine
    visible: Sequence[int] | None = None  #: as CUDA_VISIBLE_DEVICES; None: all
    room_device: int = 1 << 40  #: bytes of each device, of all processes together
    ipc: bool = True  #: whether memory can be exported and opened
    peers: Collection[tuple[int, int]] | None = None  #: (device, peer): reaches the peer's memory; None: all do
    broken_peer: bool = False  #: memory of another device opens, and shows other bytes
    broken: bool = False  #: all memory that is opened does
    reserved: bool = False  #: whether CUipcMemHandle has that attribute, as in old cuda-bindings
    fail: dict[str, CUresult] = field(default_factory=dict)  #: calls that fail on purpose, until taken out
    before: dict[str, Callable[[], object]] = field(default_factory=dict)  #: is called as such a call begins
    log: list[tuple[str, str]] = field(default_factory=list)  #: each call's name and thread
    registered: dict[int, tuple[int, int]] = field(default_factory=dict)  #: address: bytes, flags
    retained: dict[int, int] = field(default_factory=dict)  #: device: how often its primary context is
    shut_down: bool = False
    stacks: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.pid = os.getpid()
        self.initialized = False
        self.memory = Memory(Machine(self.root)) if self.root else None
        self.streams = Streams()

    # What tests do.

    def module(self) -> types.ModuleType:
        """What ``from cuda.bindings import driver`` gives."""
        made = types.ModuleType("cuda.bindings.driver")
        made.__dict__.update(NAMES, CUipcMemHandle=ReadableIpcMemHandle if self.reserved else CUipcMemHandle)
        for name in dir(self):
            if name.startswith("cu"):
                made.__dict__[name] = self._noted(name)
        return made

    @property
    def calls(self) -> list[str]:
        """The names of the calls so far."""
        return [name for name, _ in self.log]

    @property
    def stack(self) -> list[int]:
        """The contexts of this thread."""
        if not hasattr(self.stacks, "contexts"):
            self.stacks.contexts = []
        contexts: list[int] = self.stacks.contexts
        return contexts

    @property
    def owned(self) -> dict[int, int]:
        """The memory of this process's own: address: bytes."""
        return {m.address: m.nbytes for m in self._memory.mappings.values() if not m.context}

    @property
    def opened(self) -> dict[int, int]:
        """The memory of others that is open here: address: how often."""
        return {m.address: m.opens for m in self._memory.mappings.values() if m.context}

    def default_stream(self, device: int = 0) -> Stream:
        """The stream 0 of a device's primary context."""
        return Stream(device, 0)

    def make_stream(self, device: int = 0) -> Stream:
        """A new one, which waits for no other."""
        return self.streams.make(device)

    def hold(self, stream: Stream) -> None:
        """What comes into the stream from now on is not done until ``let_go``."""
        self.streams.hold(stream)

    def let_go(self, stream: Stream) -> None:
        """All that came into the stream is done, in its order, when this returns."""
        self.streams.let_go(stream)

    def launch(self, stream: Stream, job: Callable[[], object]) -> None:
        """A kernel: is called now, or by ``let_go`` where the stream is held.

        Let it refer to no tensor, but to its address: kernels keep nothing alive.
        """
        self.streams.launch(stream, job)

    def end(self) -> None:
        """Gives back what the end of the process would."""
        if self.memory:
            self.memory.end()

    # How calls are made.

    def _noted(self, name: str) -> Any:
        gives = getattr(type(self), name).__annotations__["return"]
        failed = () if gives == "None" else (None, None) if gives.startswith("tuple") else (None,)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append((name, threading.current_thread().name))
            if name in self.before:
                self.before[name]()
            try:
                self._check(name)
                given = getattr(self, name)(*arguments)
            except Refused as refused:
                return (refused.result, *failed)
            values = given if isinstance(given, tuple) else (given,)
            return (CUresult.CUDA_SUCCESS, *values[: len(failed)])

        return call

    def _check(self, name: str) -> None:
        if name in self.fail:
            raise Refused(self.fail[name])
        if self.shut_down:
            raise Refused(CUresult.CUDA_ERROR_DEINITIALIZED)
        if os.getpid() != self.pid or not (self.initialized or name == "cuInit"):
            raise Refused(CUresult.CUDA_ERROR_NOT_INITIALIZED)
        if name not in _WITHOUT_CONTEXT and not self.stack:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    @property
    def _memory(self) -> Memory:
        assert self.memory, "a double without a root has no memory"
        return self.memory

    def _physical(self, device: Any) -> int:
        """The machine's number of a device."""
        seen = range(self.devices) if self.visible is None else self.visible
        if not 0 <= number(device) < len(seen):
            raise Refused(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return seen[number(device)]

    @property
    def _here(self) -> int:
        """The physical device of the current context."""
        return self._physical(self.stack[-1] - CONTEXTS)

    def _work(self, stream: Any) -> tuple[int, Work]:
        """A stream's context and its work."""
        return self.streams.work(number(stream), self.stack[-1])

    # Devices and contexts.

    def cuInit(self, _flags: int) -> None:  # noqa: N802
        if not self.devices or self.visible == []:
            raise Refused(CUresult.CUDA_ERROR_NO_DEVICE)
        self.initialized = True

    def cuDeviceGetCount(self) -> int:  # noqa: N802
        return self.devices if self.visible is None else len(self.visible)

    def cuDeviceGet(self, ordinal: int) -> CUdevice:  # noqa: N802
        self._physical(ordinal)
        return CUdevice(ordinal)

    def cuDeviceGetUuid(self, device: Any) -> CUuuid:  # noqa: N802
        return CUuuid(self._memory.machine.uuid(self._physical(device)))

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: Any) -> int:  # noqa: N802
        self._physical(device)
        of = CUdevice_attribute
        return {
            of.CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING.value: 1,
            of.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED.value: int(self.read_only),
            of.CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED.value: int(self.ipc),
        }[attribute.value]  # an int has no value: so it is with cuda-bindings

    def cuDeviceCanAccessPeer(self, device: Any, peer: Any) -> int:  # noqa: N802
        return int(self._reaches(self._physical(device), self._physical(peer)))

    def _reaches(self, device: int, peer: int) -> bool:
        return device != peer and (self.peers is None or (device, peer) in self.peers)

    def cuDevicePrimaryCtxRetain(self, device: Any) -> CUcontext:  # noqa: N802
        self._physical(device)
        self.retained[number(device)] = self.retained.get(number(device), 0) + 1
        return CUcontext(CONTEXTS + number(device))

    def cuDevicePrimaryCtxRelease(self, device: Any) -> None:  # noqa: N802
        if not self.retained.get(number(device)):
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.retained[number(device)] -= 1

    def cuCtxGetCurrent(self) -> CUcontext:  # noqa: N802
        return CUcontext(self.stack[-1] if self.stack else 0)

    def cuCtxGetDevice(self) -> CUdevice:  # noqa: N802
        return CUdevice(self.stack[-1] - CONTEXTS)

    def cuCtxPushCurrent(self, context: Any) -> None:  # noqa: N802
        if not 0 <= number(context) - CONTEXTS < self.cuDeviceGetCount():
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.stack.append(number(context))

    def cuCtxPopCurrent(self) -> CUcontext:  # noqa: N802
        return CUcontext(self.stack.pop())

    # Host memory.

    def cuMemHostRegister(self, address: Any, nbytes: int, flags: int) -> None:  # noqa: N802
        address = number(address)
        access = protection(address, nbytes)
        if access is None or ("w" not in access and not (flags & READ_ONLY and self.read_only)):
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if any(address < begin + n and begin < address + nbytes for begin, (n, _) in self.registered.items()):
            raise Refused(CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        if sum(n for n, _ in self.registered.values()) + nbytes > self.room:
            raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        self.registered[address] = (nbytes, flags)

    def cuMemHostUnregister(self, address: Any) -> None:  # noqa: N802
        if number(address) not in self.registered:
            raise Refused(CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
        nbytes, _ = self.registered.pop(number(address))
        assert protection(number(address), nbytes) is not None, "it was unmapped while it was registered"

    # Device memory.

    def cuMemAlloc(self, nbytes: int) -> CUdeviceptr:  # noqa: N802
        return CUdeviceptr(self._memory.allocate(self._here, number(nbytes), self.room_device))

    def cuMemFree(self, pointer: Any) -> None:  # noqa: N802
        self._memory.free(number(pointer))

    def cuMemGetAddressRange(self, pointer: Any) -> tuple[CUdeviceptr, int]:  # noqa: N802
        mapping = self._memory.find(number(pointer))
        return CUdeviceptr(mapping.address), mapping.nbytes

    def cuMemcpyHtoD(self, target: Any, source: Any, nbytes: int) -> None:  # noqa: N802
        self._copy(number(target), number(target), _address(source), nbytes)

    def cuMemcpyDtoH(self, target: Any, source: Any, nbytes: int) -> None:  # noqa: N802
        self._copy(number(source), _address(target), number(source), nbytes)

    def _copy(self, device: int, target: int, source: int, nbytes: int) -> None:
        """After what is in the stream 0, as there."""
        self._memory.find(device, nbytes)
        self._work(0)[1].wait()
        ctypes.memmove(target, source, nbytes)

    def cuIpcGetMemHandle(self, pointer: Any) -> CUipcMemHandle:  # noqa: N802
        self._check_ipc()
        handle = ReadableIpcMemHandle() if self.reserved else CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), self._memory.export(number(pointer)), HANDLE_BYTES)
        return handle

    def cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> CUdeviceptr:  # noqa: N802
        if not isinstance(handle, CUipcMemHandle):
            raise TypeError(
                f"Argument 'handle' has incorrect type (expected CUipcMemHandle, got {type(handle).__name__})"
            )
        self._check_ipc()
        data = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
        peer = device_of(data)
        if number(flags) != CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if peer not in (range(self.devices) if self.visible is None else self.visible):
            raise Refused(CUresult.CUDA_ERROR_INVALID_DEVICE)
        if peer != self._here and not self._reaches(self._here, peer):
            raise Refused(CUresult.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
        broken = self.broken or (self.broken_peer and peer != self._here)
        return CUdeviceptr(self._memory.open(data, self.stack[-1], broken=broken))

    def cuIpcCloseMemHandle(self, pointer: Any) -> None:  # noqa: N802
        self._memory.close(number(pointer))

    def _check_ipc(self) -> None:
        if not self.ipc:
            raise Refused(CUresult.CUDA_ERROR_NOT_SUPPORTED)

    # Streams and events.

    def cuStreamGetCtx(self, stream: Any) -> CUcontext:  # noqa: N802
        return CUcontext(self._work(stream)[0])

    def cuStreamQuery(self, stream: Any) -> None:  # noqa: N802
        self._work(stream)[1].check()

    def cuStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        self._work(stream)[1].wait()

    def cuEventCreate(self, _flags: int) -> CUevent:  # noqa: N802
        return CUevent(self.streams.make_event(self.stack[-1]))

    def cuEventRecord(self, event: Any, stream: Any) -> None:  # noqa: N802
        context, work = self._work(stream)
        recorded = self.streams.event(number(event))
        if recorded.context != context:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
        recorded.work = work

    def cuEventQuery(self, event: Any) -> None:  # noqa: N802
        self.streams.event(number(event)).work.check()

    def cuEventSynchronize(self, event: Any) -> None:  # noqa: N802
        self.streams.event(number(event)).work.wait()

    def cuEventDestroy(self, event: Any) -> None:  # noqa: N802
        self.streams.event(number(event))
        del self.streams.events[number(event)]


def _address(host: Any) -> int:
    """Of host memory, given as a number or as an object with a buffer."""
    if host is None or hasattr(host, "__int__"):
        return number(host)
    return int(np.frombuffer(host, np.uint8).ctypes.data)


def protection(address: int, nbytes: int) -> str | None:
    """What may be done with memory of this process, as ``rw-s``; None where not all of it is mapped alike."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, access = line.split()[:2]
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if begin <= address and address + nbytes <= end:
            return access
    return None


def use(patch: pytest.MonkeyPatch, double: Double) -> Double:
    """cuda-bindings with this driver below."""
    bindings = types.ModuleType("cuda.bindings")
    bindings.__dict__["driver"] = double.module()
    patch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", bindings)
    return double


def install(root: str | Path, patch: pytest.MonkeyPatch | None = None, **options: Any) -> Double:
    """A driver on the machine ``root``, and torch for its memory, here: for good, or until ``patch`` is undone.

    ``options`` are fields of ``Double``; ``torch=False`` leaves torch alone, which takes seconds to import.
    """
    with_torch = options.pop("torch", True)
    patch = patch or pytest.MonkeyPatch()
    double = use(patch, Double(root=Path(root), **options))
    if with_torch:
        import cuda_torch

        cuda_torch.stand_in(double, patch)
    return double


@contextmanager
def installed(root: str | Path, **options: Any) -> Iterator[Double]:
    """``install``, for the time of the block, at whose end this process has nothing of the machine any more."""
    with pytest.MonkeyPatch.context() as patch:
        double = install(root, patch, **options)
        try:
            yield double
        finally:
            double.end()


def violations(root: str | Path) -> list[str]:
    """What processes did that a driver answers with undefined behaviour."""
    return Machine(Path(root)).violations()


def allocations(root: str | Path) -> list[Allocation]:
    """The device memory that living processes have."""
    return Machine(Path(root)).allocations()
