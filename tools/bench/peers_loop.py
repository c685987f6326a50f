"""How a reader among several times itself: all start at one instant of the host's clock, and stop by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

READERS = 4  # at most
LEAD_S = 0.01  # for a command to come to its reader
_CHUNK_S = 0.002


@dataclass
class Timing:
    """Nanoseconds a hit in one reader, and how many hits there were."""

    wall: float
    cpu: float
    hits: int


def start_time() -> float:
    """An instant soon enough, by the clock that all processes share."""
    return time.monotonic() + LEAD_S


def read_for(hit: Callable[[Any], object], key: Any, at: float, lasts_s: float) -> Timing:
    """Hits one object again and again, from ``at`` on."""
    hit(key)  # the first is another matter
    chunk = _chunk(hit, key)
    time.sleep(max(0.0, at - time.monotonic()))
    hits, end = 0, time.perf_counter() + lasts_s
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    while time.perf_counter() < end:
        for _ in range(chunk):
            hit(key)
        hits += chunk
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    return Timing(wall / hits, cpu / hits, hits)


def _chunk(hit: Callable[[Any], object], key: Any) -> int:
    """Hits between two looks at the clock."""
    began = time.perf_counter()
    hit(key)
    return max(1, int(_CHUNK_S / (time.perf_counter() - began)))
