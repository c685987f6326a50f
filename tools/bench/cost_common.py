"""What the cost programs share: how a cost is timed, what is known of it, and arenas that are gone afterwards.

A cost is measured in repeats of some milliseconds each. Its wall time is ``perf_counter_ns``, its CPU time
``process_time_ns`` (all threads of this process). The best repeat is what the code costs when nobody is in
the way; the median is what it costs on this machine at this hour. Goals and ratios are of CPU time wherever one
thread does the work, as other programs take the processor away in the middle of it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import shmcache
from shmcache_tools.text import size_text, time_text

WIDTH = 32  # bytes a key: what a SHA-256 of a prefix has
SPARE = 1 << 30  # bytes of memory for tables, and for others
TICK = 1e-3  # nanoseconds: shorter than anything that is measured


@dataclass(frozen=True)
class Goal:
    """At most ``ns`` nanoseconds a unit; or, where ``beside`` names a peer or a limit, at least ``times`` as fast."""

    text: str
    ns: float = 0.0
    beside: str = ""
    times: float = 0.0

    @property
    def full(self) -> str:
        return f"{self.text} ({self.beside})" if self.beside else self.text


def at_most(ns: float) -> Goal:
    return Goal(time_text(ns / 1e9), ns)


def faster(times: float, peer: str) -> Goal:
    return Goal(f"{times:g} x faster", beside=peer, times=times)


def share(percent: float, limit: str) -> Goal:
    return Goal(f"{percent:g} % of its speed", beside=limit, times=percent / 100)


def no_more(times: float, other: str) -> Goal:
    return Goal(f"{times:g} x its time", beside=other, times=1 / times)


@dataclass
class Ratio:
    """What does the same work, or the least of it: nanoseconds for one unit, and ``times`` as long as ours."""

    median: float
    best: float
    times: float


@dataclass(frozen=True)
class Point:
    """Where a cost that is measured over some size stands, in a plot: on which line, and at how many of what."""

    line: str
    at: int
    of: str


@dataclass
class Cost:
    """One line of the report. Times are nanoseconds for one ``unit``."""

    name: str
    unit: str  # "key", "put", ...
    best: float = 0.0  # of the times that goals are about
    median: float = 0.0  # wall time
    cpu: float = 0.0  # median over the repeats
    goals: Sequence[Goal] = ()
    peers: dict[str, Ratio] = field(default_factory=dict)
    limits: dict[str, Ratio] = field(default_factory=dict)  # what cannot be beaten
    by_cpu: bool = True  # what goals and ratios are of; False where threads or the kernel do the work: of wall time
    note: str = ""
    point: Point | None = None

    @property
    def judged(self) -> float:
        """The time that goals are about."""
        return self.cpu if self.by_cpu else self.median

    def met(self, goal: Goal) -> bool | None:
        """None where what the goal is about was not measured."""
        if not goal.beside:
            return self.judged <= goal.ns
        ratio = self.peers.get(goal.beside) or self.limits.get(goal.beside)
        return None if ratio is None else ratio.times >= goal.times


# What a part of the report gives, as soon as it is measured: costs that belong together, or why there are none.
Report = Iterator["list[Cost] | str"]

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

    def times(self, by_cpu: bool) -> list[float]:
        return self.cpu if by_cpu else self.wall

    def forget(self) -> None:
        self.wall.clear()
        self.cpu.clear()


def alternate(runs: Sequence[Run], repeats: int, warm_up: int = 2) -> None:
    """Repeats the runs in turn, so that what disturbs the machine for a while disturbs all of them alike."""
    for _ in range(warm_up):
        for run in runs:
            run.once()
    for run in runs:
        run.forget()  # also what an earlier comparison left
    for _ in range(repeats):
        for run in runs:
            run.once()


def cost_of(name: str, unit: str, run: Run, *, by_cpu: bool = True, **more: Any) -> Cost:
    return Cost(name, unit, min(run.times(by_cpu)), median(run.wall), median(run.cpu), by_cpu=by_cpu, **more)


def compare(cost: Cost, ours: Run, peers: Mapping[str, Run], limits: Mapping[str, Run] | None = None) -> Cost:
    """Adds what took its repeats in turn with ours; gives the cost."""
    cost.peers.update({name: ratio_of(cost, ours, theirs) for name, theirs in peers.items()})
    cost.limits.update({name: ratio_of(cost, ours, theirs) for name, theirs in (limits or {}).items()})
    return cost


def ratio_of(cost: Cost, ours: Run, theirs: Run) -> Ratio:
    """The median over pairs of repeats."""
    our_times, their_times = ours.times(cost.by_cpu), theirs.times(cost.by_cpu)
    pairs = zip(their_times, our_times, strict=True)
    return Ratio(
        median(their_times), min(their_times), median(max(their, TICK) / max(our, TICK) for their, our in pairs)
    )


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


def matrix(count: int) -> Any:
    """So many new keys as a matrix, one a row."""
    return np.random.default_rng(secrets.randbits(64)).integers(0, 256, (count, WIDTH), np.uint8)


def write_all(cache: shmcache.Cache, keys: Any, nbytes: int) -> None:
    """Publishes an object a key without filling it. RuntimeError where one has no room."""
    for start in range(0, len(keys), 1024):
        with cache.reserve_write(keys[start : start + 1024], nbytes) as batch:
            if any(batch.status):
                raise RuntimeError(f"no room for the objects to be read: {max(batch.status).name}")


def lacks_room(nbytes: int) -> str | None:
    """Why so many bytes of shared memory should not be taken here; None where there is room."""
    shm = os.statvfs("/dev/shm")  # noqa: S108 # where arenas lie
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = min(shm.f_bavail * shm.f_frsize, int(fields["MemAvailable"].split()[0]) << 10)
    needed = nbytes + SPARE
    return None if needed <= free else f"it needs {size_text(needed)} of shared memory, and {size_text(free)} are free"
