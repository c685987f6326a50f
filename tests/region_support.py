"""What tests of regions share beside the machine that they run on (conftest.py): objects in a region, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable

import cuda_double
import torch
from arena_support import TIMEOUT_S

import shmcache
from shmcache import Cache, Layout, Status

CAPACITY = 256 << 10


def put(cache: Cache, keys: list[bytes], layout: Layout | int, region: int | str, byte: int = 7) -> None:
    """Objects in a region, filled by torch."""
    batch = cache.reserve_write(keys, layout, region=region)
    assert batch.status == [Status.OK] * len(keys)
    for tensor in batch.tensors():
        tensor.view(torch.uint8).fill_(byte)
    del tensor
    assert batch.publish() == [Status.OK] * len(keys)


def held(name: str) -> int:
    """Looked at from outside, which makes no cache look after anything."""
    stats = shmcache.inspect(name).stats
    assert stats is not None
    return stats.held


def eventually(holds: Callable[[], bool]) -> None:
    """Waits for what a thread brings about."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "what was waited for does not come"
        time.sleep(0.001)


def end_process(double: cuda_double.Double) -> None:
    """Frees what is left, as the driver does at the process's end."""
    for address in list(double.owned):
        double.stack.append(int(double.cuDevicePrimaryCtxRetain(double.cuDeviceGet(0))))
        double.cuMemFree(address)
        double.stack.pop()
