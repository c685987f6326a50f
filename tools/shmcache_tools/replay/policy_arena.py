"""Real arenas under the requests of a trace: one an eviction policy and a size, all in one run, through the public API.

The arena's scores use the machine's clock. So requests come at the trace's own times, so many times as fast, and the
eviction window shrinks alike. An object is one chunk, in a block of 4 KiB whose bytes nobody writes: the arena cannot
tell.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

import shmcache
from shmcache import Status
from shmcache.config import MAX_SLOTS
from shmcache_tools.chunks import keys_of
from shmcache_tools.replay.policies import WINDOW_S, Request
from shmcache_tools.text import plural

CHUNK_BYTES = 4096
MAX_CHUNKS = MAX_SLOTS  #: of an arena
_LANES = 8  # so that others may attach and look
_WAIT_S = 0.02

Keys = NDArray[np.uint8]

_numbers = count()


class TriedArena:
    """An arena of ``slots`` chunks, and what it hit."""

    def __init__(self, cache: shmcache.Cache, slots: int) -> None:
        self._cache = cache
        self._slots = slots
        self._hits = 0
        self._chunks = 0
        self._refused = 0

    @property
    def hit_rate(self) -> float:
        return self._hits / self._chunks

    def serve(self, keys: Keys) -> int:
        """As an engine does: what is there is granted, read and given back, the rest is written. How much was there."""
        hits = self._cache.lookup(keys)
        if hits:
            self._cache.reserve_read(keys[:hits])
            self._cache.finish_read(keys[:hits])
        if hits < len(keys):
            with self._cache.reserve_write(keys[hits:], CHUNK_BYTES) as batch:
                full = batch.status.count(Status.NO_SPACE)
            self._refused += full if len(keys) <= self._slots else 0
        self._hits += hits
        self._chunks += len(keys)
        return hits

    def faults(self) -> list[str]:
        """What should not be, in words; the arena is as the run left it."""
        stats = self._cache.stats()
        found = [f"verify(): {problem}" for problem in self._cache.verify()]
        if stats.reserved + stats.held:
            found.append(f"{plural(stats.reserved + stats.held, 'share')} left")
        if self._refused:
            found.append(f"no room for {plural(self._refused, 'chunk')}: is /dev/shm full?")
        return found


@contextlib.contextmanager
def tried_arena(slots: int, eviction: str, window_s: float) -> Iterator[TriedArena]:
    """An arena for the time of the block."""
    name = f"replay-{os.getpid()}-{next(_numbers)}"
    config = shmcache.ArenaConfig(
        slots * CHUNK_BYTES,
        block_size=CHUNK_BYTES,
        slots=slots,
        lanes=_LANES,
        eviction=eviction,
        eviction_window_s=window_s,
    )
    shmcache.create(name, config)
    try:
        with shmcache.attach(name) as cache:
            yield TriedArena(cache, slots)
    finally:
        with contextlib.suppress(shmcache.ArenaNotFoundError):
            shmcache.destroy(name, force=True)


@dataclass(frozen=True, slots=True)
class ArenaRun:
    """What came of one run, by eviction policy and slots."""

    hit_rates: dict[tuple[str, int], float]
    late_s: float  #: the most that a request came behind its time
    faults: list[str]


def run_arenas(
    requests: Sequence[Request],
    evictions: Sequence[str],
    slots: Sequence[int],
    speed: float,
    on_request: Callable[[int], None],
) -> ArenaRun:
    """Serve the requests by an arena of each policy and size. ``on_request`` is told often how many were served.

    It may raise to end the run: no arena stays behind.
    """
    chains = [(time_ms, keys_of(np.array(chain, dtype=np.uint64))) for time_ms, chain in requests]
    with contextlib.ExitStack() as stack:
        arenas = {
            (eviction, size): stack.enter_context(tried_arena(size, eviction, WINDOW_S / speed))
            for eviction in evictions
            for size in slots
        }
        late_s = _serve_all(chains, list(arenas.values()), speed, on_request)
        return ArenaRun(
            {which: arena.hit_rate for which, arena in arenas.items()},
            late_s,
            [
                f"arena, {eviction}, {plural(size, 'slot')}: {fault}"
                for (eviction, size), arena in arenas.items()
                for fault in arena.faults()
            ],
        )


def _serve_all(
    chains: Sequence[tuple[int, Keys]], arenas: Sequence[TriedArena], speed: float, on_request: Callable[[int], None]
) -> float:
    """How late the latest request was."""
    began, first_ms = time.perf_counter(), chains[0][0]
    late_s = 0.0
    for number, (time_ms, keys) in enumerate(chains):
        on_request(number)
        due = began + (time_ms - first_ms) / 1000 / speed
        while (left := due - time.perf_counter()) > 0:
            time.sleep(min(left, _WAIT_S))
            on_request(number)
        late_s = max(late_s, -left)
        for arena in arenas:
            arena.serve(keys)
    return late_s
