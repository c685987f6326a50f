"""How fast kernels read a region of another process in place, beside local memory; and what a key costs on the way.

The peer is a twin in torch's own memory: the same tensors, at the same distances from each other, read by the same
kernels in the same process. Keys cost Python's time: the peer is the same batch of objects in host memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from cost_common import Run, alternate, write_all
from device_common import (
    BLOCK,
    Finding,
    Side,
    check_all,
    check_norm,
    in_turn,
    keys_of,
    write_objects,
)
from device_reader import Reader

import shmcache
from shmcache_tools.text import count_text, size_text

EQUAL = 0.98  # of local memory's speed
PASSES = 5  # over all of the memory, timed together
BATCHES = (1, 32, 256)
HOST_OBJECT = 4096  # bytes
KEYS = 1024  # a repeat


def findings(side: Side, reader: Reader, region: int, total: int, rounds: int) -> list[Finding]:
    """Reads ``total`` bytes in large objects, and a part of it in small ones."""
    found = []
    for nbytes, count in ((total, 1), (min(4 << 20, total // 4), None), (BLOCK, total // 4 // BLOCK)):
        keys = keys_of(f"read-{nbytes}", count or total // nbytes)
        write_objects(side, keys, nbytes, region)
        found += reader.ask(_speeds, keys, nbytes, rounds)
        if any(side.cache.delete(keys)):
            raise RuntimeError("the objects that were read are still locked")
    return found


def _speeds(side: Side, keys: list[bytes], nbytes: int, rounds: int) -> list[Finding]:
    """In the second process."""
    objects = f"{count_text(len(keys))} x {size_text(nbytes)}" if len(keys) > 1 else size_text(nbytes)
    with side.cache.read(keys) as batch:
        check_all(batch)
        imported = batch.tensors()
        local = _twin(side, imported)
        found = [_kernel_speed(side, imported, local, objects, rounds)]
        if len(keys) == 1:
            found.append(_copy_speed(side, imported[0], local[0], objects, rounds))
        del imported
    return found


def _twin(side: Side, tensors: list[Any]) -> list[Any]:
    """The same in local memory."""
    begin = min(tensor.data_ptr() for tensor in tensors)
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    memory = side.gpu.memory(end - begin)
    starts = [tensor.data_ptr() - begin for tensor in tensors]
    twins = [memory[i : i + one.nbytes].view(one.dtype) for i, one in zip(starts, tensors, strict=True)]
    for twin, tensor in zip(twins, tensors, strict=True):
        twin.copy_(tensor)
    return twins


def _kernel_speed(side: Side, imported: list[Any], local: list[Any], objects: str, rounds: int) -> Finding:
    nbytes = sum(tensor.nbytes for tensor in imported)

    def speed_of(tensors: list[Any]) -> Callable[[], float]:
        launch, result = side.gpu.captured(lambda: side.gpu.norm(tensors))
        launch()
        check_norm(float(result), len(tensors), tensors[0].nbytes)
        return lambda: PASSES * nbytes / side.gpu.seconds(lambda: [launch() for _ in range(PASSES)])

    ours, theirs = in_turn(rounds, speed_of(imported), speed_of(local))
    return Finding(f"kernel reads {objects} in place", "rate", ours, "the same of local memory", theirs, EQUAL)


def _copy_speed(side: Side, imported: Any, local: Any, objects: str, rounds: int) -> Finding:
    target = side.gpu.memory(imported.nbytes).view(imported.dtype)

    def speed_of(source: Any) -> Callable[[], float]:
        return lambda: imported.nbytes / side.gpu.seconds(lambda: target.copy_(source))

    ours, theirs = in_turn(rounds, speed_of(imported), speed_of(local))
    return Finding(f"copy of {objects} on the device", "rate", ours, "of local memory", theirs, EQUAL)


# What a key costs


def write_key_objects(side: Side, region: int, count: int) -> tuple[list[bytes], list[bytes]]:
    """Keys of small objects in device memory, and of as many in host memory."""
    device, host = keys_of("device", count), keys_of("host", count)
    write_objects(side, device, BLOCK, region)
    write_all(side.cache, host, HOST_OBJECT)
    return device, host


def key_findings(reader: Reader, device: list[bytes], host: list[bytes], repeats: int) -> list[Finding]:
    return [reader.ask(_key_cost, device, host, n, repeats) for n in BATCHES]


def _key_cost(side: Side, device: list[bytes], host: list[bytes], n: int, repeats: int) -> Finding:
    """In the second process."""
    ours, theirs = (
        Run(_read_tensors(side.cache), [random.sample(keys, n) for _ in range(KEYS // n)], n) for keys in (device, host)
    )
    alternate([ours, theirs], repeats)
    what = f"read + tensors() + release, a key of {n}"
    return Finding(what, "time", seconds(ours), "host objects", seconds(theirs))


def _read_tensors(cache: shmcache.Cache) -> Callable[[list[bytes]], None]:
    def work(keys: list[bytes]) -> None:
        batch = cache.read(keys)
        batch.tensors()
        batch.release()

    return work


def seconds(run: Run) -> list[float]:
    return [ns / 1e9 for ns in run.wall]
