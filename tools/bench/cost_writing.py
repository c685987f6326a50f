"""What an object costs on the writing side: put beside memcpy into the same arena's memory, and lmdb beside both.

One half of the arena is kept reserved by a WriteBatch, and memcpy fills its objects one after the other; put
goes through the other half in the same way. Both write through the same mapping, every page of which was
touched before, from the same source, and over the same number of bytes, more than the processor's caches hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import cost_peer
import numpy as np
from cost_common import Cost, Run, alternate, arena, compare, cost_of, new_keys, write_all

import shmcache

HALF = 128 << 20  # bytes that each of put, memcpy and lmdb goes through
PASS = 8 << 20  # bytes a repeat, and PUTS at most
PUTS = 512
SIZES = (4 << 10, 256 << 10, 4 << 20)
LABELS = ("4 KiB", "256 KiB", "4 MiB")
MEMCPY_GOAL = 0.9  # of the speed of memcpy, for the largest size


def costs(repeats: int) -> Iterator[list[Cost]]:
    """A list of costs for each size, as it is measured."""
    for size, label in zip(SIZES, LABELS, strict=True):
        yield _costs_of(size, label, repeats)


def _costs_of(size: int, label: str, repeats: int) -> list[Cost]:
    objects = HALF // size
    source = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    with (
        arena(capacity=2 * HALF, block_size=min(size, 64 << 10), slots=2 * objects) as name,
        shmcache.attach(name) as cache,
        cost_peer.environment(HALF) as env,
    ):
        reserved = cache.reserve_write(new_keys(objects), size)
        try:
            runs = _runs(cache, reserved.arrays(), source, env, min(PUTS, PASS // size), repeats)
            alternate(list(runs.values()), repeats)
        finally:
            reserved.abort()
    return _compared(label, runs)


def _runs(
    cache: shmcache.Cache, targets: Sequence[Any], source: bytes, env: Any, puts: int, repeats: int
) -> dict[str, Run]:
    """Each goes once through all of its memory before anything is timed."""
    times = range(puts)
    keys = new_keys(len(targets))
    write_all(cache, keys, len(source))
    runs = {
        "put": Run(_put_new(cache, source, len(targets) + (repeats + 2) * puts), times),
        "delete + put": Run(_put_again(cache, source), times),
        "memcpy": Run(_copy(targets, source), times),
    }
    if env is not None:
        cost_peer.fill(env, keys, source)
        runs["lmdb"] = Run(_replace(env, keys, source), times)
    for run in runs.values():
        for _ in range(len(targets)):
            run.work(None)
    return runs
