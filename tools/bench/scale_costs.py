"""Unit costs of the machine that this runs on: what a key, a slot, a lane and a byte cost, in CPU time of one thread.

Work under the arena lock is timed as whole calls of ``reserve_write``, so what such a call does outside the lock counts
as lock, too: never less than the truth. What a slot costs is measured in the larger of two arenas, with up to 256
lanes, and taken to be the same for more slots: with 2**20 a scan took 0.9 to 1.3 times as long as that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from cost_common import arena, new_keys
from scale_arena import BATCHES, BLOCK, Filled, Held, best, timed
from scale_layout import check, victims

import shmcache

LANES = (1, 16, 64, 256)
SLOTS, QUICK_SLOTS = (16384, 65536), (4096, 16384)
REPEATS, QUICK_REPEATS = 7, 3
BATCH = 256
POPULATED = 256 << 20
HANDOVERS = 300
ECHO = "import os\nwhile os.read(0, 1): os.write(1, b'x')"


@dataclass(frozen=True)
class Line:
    """Seconds, as a straight line over the lanes ever taken."""

    base: float
    a_lane: float = 0.0

    def at(self, lanes: int) -> float:
        return self.base + self.a_lane * lanes


@dataclass(frozen=True)
class UnitCosts:
    """Seconds, but for ``populate_rate``: bytes a second of one thread."""

    reserve_key: float
    join_key: float  # a further writer of an object that is being written
    evict_key: Line  # beside reserve_key; without the scan
    scan_slot: Line  # a list of victims made anew
    lookup_key: float
    grant_share: float
    read_key: float  # read and release
    rebuild_slot: float  # what a lock holder's death costs
    inspect_slot: Line  # one look of shmcache-stat, without a lock
    verify_slot: Line  # under the lock; of an arena that has room for 256 lanes, taken or not
    attach: float
    populate_rate: float
    wake: float  # until a process that slept for the lock runs
    held: tuple[Held, ...] = ()


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line through points of lanes and seconds that never falls. It is fitted to relative errors: a few lanes
    matter as much as many."""
    lanes, seconds = np.array(points, float).T
    weights = 1 / np.maximum(seconds, 1e-12)
    slope = max(float(np.polyfit(lanes, seconds, 1, w=weights)[0]), 0.0)
    base = float(np.average(seconds - slope * lanes, weights=weights**2))
    return Line(max(base, 0.0), slope)


def measure(*, quick: bool = False) -> UnitCosts:
    """RuntimeError where the machine or the core is not as this program supposes."""
    check()
    repeats = QUICK_REPEATS if quick else REPEATS
    with ExitStack() as stack:
        arenas = [stack.enter_context(Filled(slots, repeats)) for slots in (QUICK_SLOTS if quick else SLOTS)]
        full = arenas[-1]
        reading = _reading(full.cache, full.keys, repeats)
        rebuilds = [one.rebuild() for one in arenas]
        attach = best(lambda: shmcache.attach(full.name).close(), repeats)
        for lanes in LANES:
            for one in arenas:
                one.look_at(lanes)
    held = tuple(row for one in arenas for row in one.held)
    reserve = min(row.seconds for row in held if not row.evicts and row.batch == BATCH)
    return UnitCosts(
        **reading,
        reserve_key=reserve,
        join_key=_join(),
        evict_key=fit(_evictions(held, full.slots)),
        scan_slot=fit(full.scans),
        inspect_slot=fit(full.looks),
        verify_slot=fit(full.verifies),
        rebuild_slot=max(rebuilds[1] - rebuilds[0], 0.0) / (full.slots - arenas[0].slots),
        attach=attach,
        populate_rate=_populate_rate(),
        wake=_wake(),
        held=held,
    )


def _evictions(held: Sequence[Held], slots: int) -> list[tuple[float, float]]:
    """Lanes, and what a key takes beyond one that finds room: in batches so short that the best of them met no scan."""
    batch = max(batch for batch in BATCHES if batch <= victims(slots) / 2)
    rows = [row for row in held if row.slots == slots and row.batch == batch]
    free = min(row.seconds for row in rows if not row.evicts)
    return [(row.lanes, max(row.seconds - free, 1e-9)) for row in rows if row.evicts]


def _reading(cache: shmcache.Cache, keys: np.ndarray, repeats: int) -> dict[str, float]:
    """Seconds a key, in batches drawn at random."""
    rng = np.random.default_rng(1)
    batches = [keys[rng.integers(0, len(keys), BATCH)] for _ in range(32)]

    def grant_and_finish() -> None:
        for batch in batches:
            cache.reserve_read(batch)
            cache.finish_read(batch)

    def read() -> None:
        for batch in batches:
            cache.read(batch).release()

    total = len(batches) * BATCH
    return {
        "lookup_key": best(lambda: [cache.lookup(batch) for batch in batches], repeats) / total,
        "grant_share": best(grant_and_finish, repeats) / total,
        "read_key": best(read, repeats) / total,
    }


def _join() -> float:
    """A second rank that reserves what the first is writing."""
    with arena(capacity=BATCH * BLOCK, block_size=BLOCK) as name, ExitStack() as stack:
        ranks = [stack.enter_context(shmcache.attach(name, group="tp", rank=rank, world_size=2)) for rank in range(2)]
        return min(_join_once(*ranks) for _ in range(8)) / BATCH


def _join_once(first: shmcache.Cache, second: shmcache.Cache) -> float:
    keys = new_keys(BATCH)
    with first.reserve_write(keys, BLOCK, writers=2):
        seconds, joined = timed(lambda: second.reserve_write(keys, BLOCK, writers=2))
        joined.publish()
    first.clear()
    return seconds


def _populate_rate() -> float:
    """Bytes for a second of CPU time, however many threads share the work."""
    start = time.process_time()
    with arena(capacity=POPULATED, populate=True):
        return POPULATED / (time.process_time() - start)


def _wake() -> float:
    """Half a round trip of a byte between two processes, each asleep until it comes; a tenth are faster."""
    with subprocess.Popen(
        [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as echo:
        assert echo.stdin is not None and echo.stdout is not None  # noqa: S101, PT018 # as asked for above
        ends = echo.stdin.fileno(), echo.stdout.fileno()
        trips = sorted(_trip(*ends) for _ in range(HANDOVERS))
        echo.stdin.close()
    return trips[len(trips) // 10] / 2


def _trip(to: int, back: int) -> float:
    start = time.perf_counter()
    os.write(to, b"x")
    os.read(back, 1)
    return time.perf_counter() - start
