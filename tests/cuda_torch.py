"""What CUDA torch does, on a CPU build, with memory of the double.

``torch.as_tensor(run, device="cuda:0")`` gives a tensor in place for an object with ``__cuda_array_interface__``; the
tensor, and each view of it, keeps ``run`` alive, as there. But ``tensor.device`` is the CPU here, and what is done with
the tensor is done at once, in no stream: ``Double.launch`` does work in a stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cuda_double import Double
from cuda_names import Refused
from cuda_streams import Stream

_streams = threading.local()  #: .current: dict[device, stream], of each thread


class _Keeper:
    """What a tensor refers to, and through it the run whose bytes it shows."""

    def __init__(self, run: Any) -> None:
        given = run.__cuda_array_interface__
        self.run = run
        self.__array_interface__ = {name: given[name] for name in ("version", "shape", "typestr", "data")}


def stand_in(double: Double, patch: pytest.MonkeyPatch) -> None:
    """Patches torch for this driver."""
    as_tensor = torch.as_tensor

    def patched(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        if not hasattr(data, "__cuda_array_interface__"):
            return as_tensor(data, dtype=dtype, device=device)
        _ordinal(double, device)
        return _tensor(double, data)

    def current(device: Any = None) -> Stream:
        ordinal = _ordinal(double, device)
        return _current().get(ordinal, double.default_stream(ordinal))

    patch.setattr(torch, "as_tensor", patched)
    patch.setattr(torch.cuda, "current_stream", current)


@contextmanager
def current_stream(stream: Stream) -> Iterator[Stream]:
    """It is this thread's current one on its device for the time of the block, as with torch.cuda.stream."""
    before = _current().get(stream.device_index)
    _current()[stream.device_index] = stream
    try:
        yield stream
    finally:
        del _current()[stream.device_index]
        if before:
            _current()[stream.device_index] = before


def _tensor(double: Double, run: Any) -> torch.Tensor:
    keeper = _Keeper(run)
    address, read_only = keeper.__array_interface__["data"]
    if read_only:
        raise TypeError("the read only flag is not supported, should always be False")
    array = np.asarray(keeper)
    if array.nbytes:
        assert double.memory
        try:
            double.memory.find(address, array.nbytes).lent.add(keeper)
        except Refused:
            raise RuntimeError(f"{address:#x} is no device memory of this process") from None
    return torch.from_numpy(array)


def _ordinal(double: Double, device: Any) -> int:
    """Of a device as torch lets it be named; it must be there."""
    if device is None:
        ordinal = 0
    elif isinstance(device, int):
        ordinal = device
    else:
        named = torch.device(device)
        assert named.type == "cuda", device
        ordinal = named.index or 0
    if not 0 <= ordinal < double.cuDeviceGetCount():
        raise RuntimeError(f"CUDA error: invalid device ordinal {ordinal}")
    return ordinal


def _current() -> dict[int, Stream]:
    if not hasattr(_streams, "current"):
        _streams.current = {}
    current: dict[int, Stream] = _streams.current
    return current
