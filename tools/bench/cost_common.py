"""What the cost programs share: how a cost is timed, what is known of it, and arenas that are gone afterwards.

A cost is measured in repeats of some milliseconds each. Its wall time is ``perf_counter_ns``, its CPU time
``process_time_ns`` (all threads of this process). The best repeat is what the code costs when nobody is in
the way; the median is what it costs on this machine at this hour.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import shmcache

WIDTH = 32  # bytes a key: what a SHA-256 of a prefix has


@dataclass
class Cost:
    """One line of the report. Times are nanoseconds for one ``unit``."""

    name: str
    unit: str  # "key", "put", ...
    best: float = 0.0
    median: float = 0.0
    cpu: float = 0.0  # median over the repeats
    goal: float | None = None  # nanoseconds at most
    peers: dict[str, Ratio] = field(default_factory=dict)
    least_ratio: tuple[str, float] | None = None  # of a peer: at least so many times as fast as it

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, by the median; None where there is none."""
        if self.goal is not None:
            return self.median <= self.goal
        if self.least_ratio is not None and self.least_ratio[0] in self.peers:
            return self.peers[self.least_ratio[0]].times >= self.least_ratio[1]
        return None


@dataclass
class Ratio:
    """A peer that does the same work: nanoseconds for one unit, and how many times as long as ours that is."""

    median: float
    best: float
    times: float


Work = Callable[[Any], object]


@dataclass
class Run:
    """Work to be timed: ``work`` is called with each of ``items``, and each call does ``units`` units.
    ``restore`` is called after each repeat, untimed."""

    work: Work
    items: Sequence[Any]
    units: int = 1
    restore: Callable[[], object] = lambda: None
    wall: list[float] = field(default_factory=list)  # nanoseconds a unit, one a repeat
    cpu: list[float] = field(default_factory=list)

    def once(self) -> None:
        work, items = self.work, self.items
        cpu = time.process_time_ns()
        wall = time.perf_counter_ns()
        for item in items:
            work(item)
        wall = time.perf_counter_ns() - wall
        cpu = time.process_time_ns() - cpu
        self.restore()
        total = len(items) * self.units
        self.wall.append(wall / total)
        self.cpu.append(cpu / total)

    def forget(self) -> None:
        self.wall.clear()
        self.cpu.clear()


def alternate(runs: Sequence[Run], repeats: int, warm_up: int = 2) -> None:
    """Repeats the runs in turn, so that what disturbs the machine for a while disturbs all of them alike."""
    for _ in range(warm_up):
        for run in runs:
            run.once()
    for run in runs:
        run.forget()
    for _ in range(repeats):
        for run in runs:
            run.once()


def cost_of(name: str, unit: str, run: Run, **more: Any) -> Cost:
    return Cost(name, unit, min(run.wall), median(run.wall), median(run.cpu), **more)


def compare(cost: Cost, peer: str, ours: Run, theirs: Run) -> None:
    """Adds a peer that took its repeats in turn with ours: the ratio is the median over pairs of repeats."""
    pairs = zip(theirs.wall, ours.wall, strict=True)
    cost.peers[peer] = Ratio(median(theirs.wall), min(theirs.wall), median(theirs / ours for theirs, ours in pairs))


@contextmanager
def arena(**config: Any) -> Iterator[str]:
    """The name of a new arena that is destroyed afterwards."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    shmcache.create(name, shmcache.ArenaConfig(**config))
    try:
        yield name
    finally:
        shmcache.destroy(name, force=True)


def new_keys(count: int) -> list[bytes]:
    return [secrets.token_bytes(WIDTH) for _ in range(count)]


def write_all(cache: shmcache.Cache, keys: Sequence[bytes], nbytes: int) -> None:
    """Publishes an object a key without filling it. RuntimeError where one has no room."""
    for start in range(0, len(keys), 1024):
        with cache.reserve_write(keys[start : start + 1024], nbytes) as batch:
            if any(batch.status):
                raise RuntimeError(f"no room for the objects to be read: {max(batch.status).name}")
