"""The names of ``cuda.bindings.driver`` that the double has: enums, and the objects that stand for numbers.

As in cuda-bindings, results are objects that ``int()`` understands, and arguments may be those or ints. Device numbers
and pointers are equal to nothing but themselves there, and neither is an index; contexts, streams and events are equal
to their like.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any


class CUresult(enum.IntEnum):
    """What calls answer."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_DEINITIALIZED = 4
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_MAP_FAILED = 205
    CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713
    CUDA_ERROR_NOT_SUPPORTED = 801


class Refused(Exception):  # noqa: N818 # what a call answers is no error of the double
    """Ends a call with this result."""

    def __init__(self, result: CUresult) -> None:
        super().__init__(result.name)
        self.result = result


class CUdevice_attribute(enum.IntEnum):  # noqa: N801 # the driver's name
    """What can be asked of a device."""

    CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41
    CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113
    CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED = 125


class CUipcMem_flags(enum.IntEnum):  # noqa: N801 # the driver's name
    """How memory of others is opened."""

    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1


class CUevent_flags(enum.IntEnum):  # noqa: N801 # the driver's name
    """What an event is for."""

    CU_EVENT_DEFAULT = 0
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2
    CU_EVENT_INTERPROCESS = 4


def number(given: Any) -> int:
    """An argument that is a number, an object that stands for one, or None."""
    if isinstance(given, str | bytes) or not (given is None or hasattr(given, "__int__")):
        raise TypeError("an integer is required")
    return 0 if given is None else int(given)


class _Number:
    def __init__(self, value: Any = 0) -> None:
        self._value = number(value)

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value}>"


class CUdevice(_Number):
    """A device's ordinal among those that this process sees."""


class CUdeviceptr(_Number):
    """An address."""


class _Handle(_Number):
    def __index__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


class CUcontext(_Handle):
    """A context; 0 is none."""


class CUstream(_Handle):
    """A stream; 0, 1 and 2 are the current context's own."""


class CUevent(_Handle):
    """An event."""


class CUuuid:
    """A device's UUID."""

    def __init__(self, value: bytes = bytes(16)) -> None:
        self._bytes = value

    @property
    def bytes(self) -> bytes:
        """All 16."""
        return self._bytes


HANDLE_BYTES = 64


class CUipcMemHandle:
    """An exported allocation: 64 bytes at ``getPtr()``, as all versions of cuda-bindings have it."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(HANDLE_BYTES)

    def getPtr(self) -> int:  # noqa: N802 # cuda-bindings' name
        """Where the 64 bytes are."""
        return ctypes.addressof(self._buffer)


class ReadableIpcMemHandle(CUipcMemHandle):
    """As in old versions: 13.4 and the last of 12.9 have no such attribute."""

    @property
    def reserved(self) -> bytes:
        """The 64 bytes."""
        return self._buffer.raw

    @reserved.setter
    def reserved(self, value: bytes) -> None:
        if len(value) != HANDLE_BYTES:
            raise ValueError(f"reserved length must be {HANDLE_BYTES}, is {len(value)}")
        self._buffer.raw = bytes(value)


#: what the module has beside calls
NAMES: dict[str, Any] = {
    **{
        kind.__name__: kind
        for kind in (CUresult, CUdevice_attribute, CUipcMem_flags, CUevent_flags, CUdevice, CUdeviceptr, CUcontext)
    },
    **{kind.__name__: kind for kind in (CUstream, CUevent, CUuuid)},
    "CU_MEMHOSTREGISTER_PORTABLE": 1,
    "CU_MEMHOSTREGISTER_READ_ONLY": 8,
    "CU_IPC_HANDLE_SIZE": HANDLE_BYTES,
}
