"""What an object costs on the writing side: put beside memcpy into the same arena's memory, and lmdb beside both.

One half of an arena is kept reserved by a WriteBatch, and memcpy fills its objects one after the other; put
goes through the other half in the same way, each object taking an older one's place. Both write through one
mapping, every page of which was touched before, from one source, over more bytes than the processor's caches
hold. Deleting an object and putting it back has an arena of its own, and lmdb a map of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cost_limits
import cost_peer
import numpy as np
from cost_common import Cost, Report, Run, Work, alternate, arena, compare, cost_of, new_keys, share, write_all

import shmcache

FOOTPRINT = 128 << 20  # bytes that each of put, delete + put, memcpy and lmdb goes through
SIZES = {"4 KiB": 4 << 10, "256 KiB": 256 << 10, "4 MiB": 4 << 20}
PUTS = 512  # a repeat, at most, and PASS bytes
PASS = 16 << 20
MEMCPY = "memcpy"
GOALS = {"256 KiB": [share(95, MEMCPY)], "4 MiB": [share(95, MEMCPY)]}


def costs(repeats: int) -> Report:
    """A list of costs for each size, as it is measured."""
    for label, size in SIZES.items():
        source = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
        with _works(source) as works:
            for work in works.values():
                for _ in range(FOOTPRINT // size):
                    work(None)
            runs = {what: Run(work, range(min(PUTS, PASS // size))) for what, work in works.items()}
            alternate(list(runs.values()), repeats)
        yield _compared(label, runs)


def _compared(label: str, runs: dict[str, Run]) -> list[Cost]:
    limits, peers = {MEMCPY: runs[MEMCPY]}, {name: run for name, run in runs.items() if name == "lmdb"}
    return [
        compare(cost_of(f"{what}, {label}", "put", runs[what], goals=GOALS.get(label, ())), runs[what], peers, limits)
        for what in ("put", "delete + put")
    ]


@contextmanager
def _works(source: bytes) -> Iterator[dict[str, Work]]:
    """What is to be compared; each call writes one object the size of ``source``."""
    size = len(source)
    objects, block = FOOTPRINT // size, min(size, 64 << 10)
    with (
        arena(capacity=2 * FOOTPRINT, block_size=block, slots=2 * objects) as name,
        shmcache.attach(name) as cache,
        arena(capacity=FOOTPRINT, block_size=block, slots=objects) as second_name,
        shmcache.attach(second_name) as second,
        cost_peer.environment(FOOTPRINT) as env,
    ):
        write_all(cache, new_keys(objects), size)
        keys = new_keys(objects)
        write_all(second, keys, size)
        reserved = cache.reserve_write(new_keys(objects), size)
        targets = reserved.arrays()
        try:
            works = {
                "put": _put_new(cache, source),
                "delete + put": _put_again(second, keys, source),
                MEMCPY: _copy(targets, source),
            }
            if env is not None:
                cost_peer.fill(env, keys, source)
                works["lmdb"] = _replace(env, keys, source)
            yield works
        finally:
            targets.clear()  # the cache cannot be closed while an array of it is alive
            reserved.abort()


def _put_new(cache: shmcache.Cache, source: bytes) -> Work:
    def work(_: object) -> None:
        _check(cache.put(next_key(), source))

    next_key = _key_source()
    return work


def _put_again(cache: shmcache.Cache, keys: Sequence[bytes], source: bytes) -> Work:
    def work(_: object) -> None:
        key = next(turn)
        _check(cache.delete([key])[0])
        _check(cache.put(key, source))

    turn = itertools.cycle(keys)
    return work


def _copy(targets: Sequence[Any], source: bytes) -> Work:
    """By a call of memcpy, or by numpy where there is no compiler."""
    turn = itertools.cycle(range(len(targets)))
    copy = cost_limits.copier(targets, source)
    if copy is not None:
        return lambda _: copy(next(turn))
    array = np.frombuffer(source, np.uint8)
    return lambda _: np.copyto(targets[next(turn)], array)


def _replace(env: Any, keys: Sequence[bytes], source: bytes) -> Work:
    def work(_: object) -> None:
        key = next_key()
        cost_peer.replace(env, old.pop(0), key, source)
        old.append(key)

    next_key, old = _key_source(), list(keys)
    return work


def _key_source() -> Callable[[], bytes]:
    """New keys, at next to no cost: a counter in front of what makes them unlike other keys."""
    counter = itertools.count()
    (tail,) = new_keys(1)
    return lambda: next(counter).to_bytes(8, "big") + tail[8:]


def _check(status: shmcache.Status) -> None:
    if status:
        raise RuntimeError(f"expected every write to succeed, got {status.name}")
