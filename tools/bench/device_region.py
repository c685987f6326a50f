"""What it takes to make a region readable in another process: to add and export it, to open it there, to have tensors.

The peer is torch's own way: a CUDA tensor of the same size that is handed to another process.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial

from device_common import Finding, Side, check_all, check_norm, timed, write_objects
from device_reader import Reader

from shmcache_tools.text import size_text

OBJECT = 4096  # bytes


@dataclass
class Times:
    """Of one region. Seconds."""

    add: float
    remove: float
    open: float
    again: float
    first_tensors: float
    next_tensors: float


def findings(side: Side, reader: Reader, sizes: list[int], rounds: int) -> list[Finding]:
    first = _ours(side, reader, sizes[0])
    found = [
        Finding("add_region, the first of a process", "time", [first.add]),
        Finding("open_region, the first of a process", "time", [first.open]),
    ]
    for nbytes in sizes:
        _torch(side, reader, nbytes)  # warms up
        pairs = [(_ours(side, reader, nbytes), _torch(side, reader, nbytes)) for _ in range(rounds)]
        found += _of_size(size_text(nbytes), [ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    return found


def _of_size(size: str, ours: list[Times], theirs: list[tuple[float, float]]) -> list[Finding]:
    exports, imports = (list(column) for column in zip(*theirs, strict=True))
    return [
        Finding(f"add_region {size}", "time", [t.add for t in ours], "torch.empty, its export", exports),
        Finding(f"open_region {size}", "time", [t.open for t in ours], "torch's import", imports),
        Finding(f"open_region {size}, again", "time", [t.again for t in ours]),
        Finding(f"first tensors() in {size}", "time", [t.first_tensors for t in ours]),
        Finding(f"next tensors() in {size}", "time", [t.next_tensors for t in ours]),
        Finding(f"remove_region {size}, open elsewhere", "time", [t.remove for t in ours]),
    ]


def _ours(side: Side, reader: Reader, nbytes: int) -> Times:
    add, number = timed(lambda: side.cache.add_region(side.gpu.device, nbytes))
    key = secrets.token_bytes(16)
    write_objects(side, [key], OBJECT, number)
    opened = reader.ask(_open, number, key)
    remove, _ = timed(lambda: side.cache.remove_region(number))
    return Times(add, remove, *opened)


def _open(side: Side, number: int, key: bytes) -> tuple[float, float, float, float]:
    """In the second process."""
    first, again = (timed(lambda: side.cache.open_region(number))[0] for _ in range(2))
    return first, again, _tensors(side, key), _tensors(side, key)


def _tensors(side: Side, key: bytes) -> float:
    with side.cache.read([key]) as batch:
        check_all(batch)
        took, tensors = timed(batch.tensors)
        check_norm(float(side.gpu.norm(tensors)), 1, OBJECT)
        del tensors
    return took


def _torch(side: Side, reader: Reader, nbytes: int) -> tuple[float, float]:
    """What export and import take."""
    side.gpu.forget()  # so that the memory is allocated anew, as ours is
    made, tensor = timed(lambda: side.gpu.memory(nbytes))
    tensor.fill_(1)
    side.gpu.wait()
    export, exported = timed(partial(side.gpu.export, tensor))
    opened = reader.ask(_torch_open, exported)
    del tensor
    side.gpu.forget()
    return made + export, opened


def _torch_open(side: Side, exported: bytes) -> float:
    """In the second process."""
    took, tensor = timed(lambda: side.gpu.imported(exported))
    if int(tensor[-1]) != 1:
        raise RuntimeError("torch's own tensor of another process has other bytes")
    return took
