"""An arena that is full of small objects, whose costs are looked at while more and more lanes are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cost_holder
import numpy as np
from cost_common import WIDTH, arena
from scale_layout import MAX_LANES, STALE_S

import shmcache

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = 4096
BATCHES = (1, 32, 256, 1024)
MOST = max(BATCHES)
AGED = 256  # objects that are touched at one time: ages in no order of slots, as after hours of use
SCANS = 3
Keys = Any  # a uint8 matrix, one key a row


@dataclass(frozen=True)
class Held:
    """A call that reserves keys, as measured: seconds a key."""

    slots: int
    lanes: int
    batch: int
    evicts: bool
    seconds: float


def best(work: Callable[[], object], repeats: int) -> float:
    """CPU time of this thread, the smallest of some."""
    return min(timed(work)[0] for _ in range(repeats))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time_ns()
    made = work()
    return (time.thread_time_ns() - start) / 1e9, made


class Filled:
    """A context manager. Points of ``scans``, ``looks`` and ``verifies`` are lanes and seconds for one slot."""

    def __init__(self, slots: int, repeats: int) -> None:
        self.slots = slots
        self.keys: Keys = np.empty((0, WIDTH), np.uint8)
        self.held: list[Held] = []
        self.scans: list[tuple[float, float]] = []
        self.looks: list[tuple[float, float]] = []
        self.verifies: list[tuple[float, float]] = []
        self._repeats = repeats
        self._rng = np.random.default_rng(slots)
        self._stack = ExitStack()
        self._attached = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            config = {"capacity": self.slots * BLOCK, "block_size": BLOCK, "lanes": MAX_LANES}
            self.name = stack.enter_context(arena(**config))
            self._stack = stack.pop_all()
        self.cache = self._attach()
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, where)

    def look_at(self, lanes: int) -> None:
        """Measures with so many lanes taken."""
        while self._attached < lanes:
            self._attach()
        self._reserve_free(lanes)
        self._reserve_evicting(lanes)
        self.scans.append((lanes, min(self._scan() for _ in range(SCANS)) / self.slots))
        self.looks.append((lanes, best(lambda: shmcache.inspect(self.name), 2) / self.slots))
        self.verifies.append((lanes, best(self._verify, 2) / self.slots))

    def rebuild(self) -> float:
        """The first change after a lock holder's death: the lock is stolen, and what is derived made anew."""
        return min(self._rebuild_once() for _ in range(3))

    def _attach(self) -> shmcache.Cache:
        self._attached += 1
        return self._stack.enter_context(shmcache.attach(self.name))

    def _new_keys(self, count: int) -> Keys:
        return self._rng.integers(0, 256, (count, WIDTH), np.uint8)

    def _publish(self, count: int) -> Keys:
        """Room is made where there is none."""
        keys = self._new_keys(count)
        with self.cache.reserve_write(keys, BLOCK) as batch:
            if any(batch.status):
                raise RuntimeError(f"expected room for every object, got {max(batch.status).name}")
        return keys

    def _fill(self) -> None:
        self.keys = np.concatenate([self._publish(min(MOST, self.slots)) for _ in range(self.slots // MOST)])
        for some in np.array_split(self._rng.permutation(self.slots), self.slots // AGED):
            time.sleep(0.001)  # the next ones are younger
            self.cache.touch(self.keys[some])

    def _reserve_free(self, lanes: int) -> None:
        """Into room that was made before."""
        freed = self._publish(MOST)
        self.cache.delete(freed)
        for batch in BATCHES:
            self._note(lanes, batch, evicts=False)
        self._publish(MOST)

    def _reserve_evicting(self, lanes: int) -> None:
        for batch in BATCHES:
            self._note(lanes, batch, evicts=True)

    def _note(self, lanes: int, batch: int, *, evicts: bool) -> None:
        before = self.cache.stats().counters.evictions
        seconds = min(self._reserve(batch, evicts=evicts) for _ in range(self._repeats))
        evicted = self.cache.stats().counters.evictions - before
        if evicted != self._repeats * batch * evicts:
            raise RuntimeError(f"counted {evicted} evictions in {self._repeats} batches of {batch}, evicting: {evicts}")
        self.held.append(Held(self.slots, lanes, batch, evicts, seconds / batch))

    def _reserve(self, count: int, *, evicts: bool) -> float:
        keys = self._new_keys(count)
        seconds, batch = timed(lambda: self.cache.reserve_write(keys, BLOCK))
        if any(batch.status):
            raise RuntimeError(f"expected room for every object, got {max(batch.status).name}")
        if evicts:
            batch.publish()
        else:
            batch.abort()
        return seconds

    def _scan(self) -> float:
        """An eviction that makes its list of victims anew, less one that does not."""
        time.sleep(1.2 * STALE_S * self.slots)
        first = self._reserve(1, evicts=True)
        return max(first - min(self._reserve(1, evicts=True) for _ in range(2)), 0.0)

    def _verify(self) -> None:
        found = self.cache.verify()
        if found:
            raise RuntimeError(f"the arena is damaged: {found[0]}")

    def _rebuild_once(self) -> float:
        steals = self.cache.stats().counters.lock_steals
        with shmcache.attach(self.name) as holder:
            lane = holder.lane
        cost_holder.hold_lock(self.name, lane)  # by a lane in which nobody lives any more
        seconds, _ = timed(lambda: self._publish(1))
        if self.cache.stats().counters.lock_steals != steals + 1:
            raise RuntimeError("the arena lock of a dead lane was not stolen")
        return seconds
