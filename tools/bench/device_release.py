"""What ``release_after`` costs who calls it, and how soon the shares are back once the stream has passed.

The first process has an object that goes with its last share, and watches it: so nobody calls the second process's
cache meanwhile, unless that is what is measured. Both read one clock, which is the host's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from cost_common import Run, alternate
from device_common import Finding, Side, check_all
from device_reader import Reader
from device_reading import HOST_OBJECT, seconds

import shmcache

BATCH = 32
BATCHES = 32  # a repeat
PRODUCTS = 4  # what the stream has to do yet
PATIENCE_S = 10.0


def findings(
    side: Side, reader: Reader, device: list[bytes], host: list[bytes], rounds: int, repeats: int
) -> list[Finding]:
    found: list[Finding] = reader.ask(_costs, device[:BATCH], host[:BATCH], repeats)
    by_thread, by_call = ([_latency(side, reader, calls=calls) for _ in range(rounds)] for calls in (False, True))
    return [
        *found,
        Finding("share back after the event, by the thread", "time", by_thread),
        Finding("share back after the event, by a call", "time", by_call),
    ]


def _latency(side: Side, reader: Reader, *, calls: bool) -> float:
    key = secrets.token_bytes(16)
    with side.cache.reserve_write([key], HOST_OBJECT, temporary=True) as batch:
        if any(batch.status):
            raise RuntimeError(f"no room for an object: {batch.status[0].name}")
    reader.order(_give_back_late, key, calls)
    deadline = time.monotonic() + PATIENCE_S
    while side.cache.lookup([key]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"a share was not back after {PATIENCE_S:.0f} s")
    back = time.perf_counter()
    reached: float = reader.answer()
    return max(0.0, back - reached)


def _give_back_late(side: Side, key: bytes, calls: bool) -> float:
    """In the second process: when its stream had passed."""
    side.gpu.product()
    side.gpu.wait()
    batch = side.cache.read([key])
    check_all(batch)
    for _ in range(PRODUCTS):
        side.gpu.product()
    batch.release_after(side.gpu.current_stream())
    side.gpu.mark()()
    reached = time.perf_counter()
    if calls:
        side.cache.lookup([b"another"])
    return reached


def _costs(side: Side, device: list[bytes], host: list[bytes], repeats: int) -> list[Finding]:
    """In the second process, whose stream has nothing to do."""
    stream = side.gpu.current_stream()
    cache = side.cache

    def later(batch: shmcache.ReadBatch) -> None:
        batch.release_after(stream)

    def now(batch: shmcache.ReadBatch) -> None:
        batch.release()

    def run(keys: list[bytes], release: Callable[[shmcache.ReadBatch], None]) -> Run:
        def work(_: Any) -> None:
            batch = cache.read(keys)
            batch.tensors()
            release(batch)

        return Run(work, range(BATCHES), restore=lambda: cache.lookup([b"another"]))

    far_later, far_now, near_later, near_now = (
        run(device, later),
        run(device, now),
        run(host, later),
        run(host, now),
    )
    alternate([far_later, far_now, near_later, near_now], repeats)
    return [
        Finding(
            f"the call of release_after, {BATCH} keys",
            "time",
            _calls(cache, device, later, repeats),
            "release",
            _calls(cache, device, now, repeats),
        ),
        *(
            Finding(f"read to {what}, {BATCH} keys", "time", seconds(ours), "to release, host", seconds(near_now))
            for what, ours in (
                ("release_after, device", far_later),
                ("release, device", far_now),
                ("release_after, host", near_later),
            )
        ),
    ]


def _calls(
    cache: shmcache.Cache, keys: list[bytes], release: Callable[[shmcache.ReadBatch], None], repeats: int
) -> list[float]:
    """The call alone."""
    took = []
    for _ in range(repeats * BATCHES):
        batch = cache.read(keys)
        batch.tensors()
        began = time.perf_counter()
        release(batch)
        took.append(time.perf_counter() - began)
    return took
