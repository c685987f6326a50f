"""The engine of a replay: threads that take the trace's requests one after the other, and serve each as an engine does.

A request's chain is prefetched with a share for every reader; each reader, a lane of its own, claims its shares,
compares bytes in place and gives the shares back; what neither tier had is written, and goes to L2 behind it.
There are as many threads as requests may be in flight. They submit in the order of the trace; with one thread
the whole replay happens in that order, and every number but the times is the same in each run.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import shmcache
from shmcache import Status
from shmcache.storage import PrefetchResult, PrefetchTask, StorageManager
from shmcache_tools.chunks import Pattern, keys_of, words_of
from shmcache_tools.program import RunError
from shmcache_tools.replay.report import Served, Tally
from shmcache_tools.trace import TraceRequest

_TICK_S = 0.02
_RETRY_S = 0.001
_NO_ROOM_S = 120.0

Keys = NDArray[np.uint8]


class Stopped(Exception):  # noqa: N818 # not an error: the run ends
    """Another thread failed, or the run was interrupted."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When each request comes: at the trace's own times, so many times as fast; None: as fast as possible."""

    speed: float | None

    def due_s(self, request: TraceRequest, first: TraceRequest) -> float:
        """Seconds after the first."""
        return 0.0 if self.speed is None else (request.timestamp_ms - first.timestamp_ms) / 1000 / self.speed


class Engine:
    """Replays a trace over one arena. ``readers``: one cache a rank of the group that ``cache`` controls."""

    def __init__(
        self,
        cache: shmcache.Cache,
        readers: Sequence[shmcache.Cache],
        storage: StorageManager,
        tally: Tally,
        *,
        in_flight: int,
        pace: Pace,
        seed: int,
    ) -> None:
        self._cache = cache
        self._readers = readers
        self._storage = storage
        self._tally = tally
        self._layout = Pattern(tally.chunk_bytes).layout
        self._in_flight = in_flight
        self._pace = pace
        self._seed = seed
        self._turn = threading.Lock()  # guards the two below
        self._next = 0  # request
        self._trace: Sequence[TraceRequest] = ()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._first_key_s = 0.0  # the sum over all requests, as the arena counts it

    def replay(self, trace: Sequence[TraceRequest], on_tick: Callable[[], None]) -> None:
        """Serve all requests. ``on_tick`` is called often, and may raise to end the replay."""
        self._trace = trace
        self._tally.began = time.perf_counter()
        threads = [
            threading.Thread(target=self._run, args=(number,), name=f"replay-{number}")
            for number in range(self._in_flight)
        ]
        for thread in threads:
            thread.start()
        try:
            while alive := [thread for thread in threads if thread.is_alive()]:
                on_tick()
                alive[0].join(_TICK_S)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, number: int) -> None:
        """What a thread does."""
        pattern, chance = Pattern(self._tally.chunk_bytes), random.Random(f"{self._seed}-{number}")
        try:
            while (submitted := self._submit_next()) is not None:
                self._tally.add(self._serve(*submitted, pattern, chance))
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 # raised by replay()
            self._error = self._error or error
            self._stop.set()

    def _submit_next(self) -> tuple[Keys, PrefetchTask, float, float] | None:
        """The next request's keys, its prefetch, when it was submitted, and by how much too late. None: no more."""
        with self._turn:
            if self._next == len(self._trace):
                return None
            request = self._trace[self._next]
            self._next += 1
            due = self._tally.began + self._pace.due_s(request, self._trace[0])
            if self._stop.wait(max(0.0, due - time.perf_counter())):
                raise Stopped
            keys = keys_of(request.hash_ids)
            began = time.perf_counter()
            task = self._storage.submit_prefetch_task(keys, self._layout, len(self._readers) - 1)
            return keys, task, began, began - due

    def _serve(
        self, keys: Keys, task: PrefetchTask, began: float, late_s: float, pattern: Pattern, chance: random.Random
    ) -> Served:
        result = self._wait(task)
        prefetch_s = time.perf_counter() - began
        first_key_s = self._first_key(result)
        wrong = self._read(keys[: result.hits], pattern, chance)
        written, there = self._write(keys[result.hits :], pattern)
        return Served(
            chunks=len(keys),
            l1_hits=result.l1_hits,
            l2_hits=result.l2_hits,
            written=written,
            there=there,
            wrong=wrong,
            prefetch_s=prefetch_s,
            first_key_s=first_key_s,
            late_s=late_s,
            error=result.error,
        )

    def _wait(self, task: PrefetchTask) -> PrefetchResult:
        while True:
            try:
                return self._storage.wait_prefetch_status(task, timeout_s=_TICK_S)
            except TimeoutError:
                if self._stop.is_set():
                    self._storage.cancel_prefetch(task)
                    raise Stopped from None

    def _first_key(self, result: PrefetchResult) -> float | None:
        """From submit to the first readable key: by so much the arena's sum grew, if this request is alone."""
        if self._in_flight > 1 or not result.hits:
            return None
        before, self._first_key_s = self._first_key_s, self._cache.stats().histograms.prefetch_first_key.sum_s
        return self._first_key_s - before

    def _read(self, keys: Keys, pattern: Pattern, chance: random.Random) -> int:
        """Every reader claims and gives back its shares; each chunk is compared by one of them. The wrong ones."""
        wrong = 0
        if len(keys):
            words = words_of(keys)
            turns = np.array([chance.randrange(len(self._readers)) for _ in range(len(keys))])
            for rank, reader in enumerate(self._readers):
                with reader.read(keys) as batch:
                    if batch.hits < len(keys):
                        raise RunError(
                            f"reader {rank} found {batch.hits} of {len(keys)} chunks that had a share for it"
                        )
                    wrong += _compare(batch, np.flatnonzero(turns == rank), words, pattern)
        return wrong

    def _write(self, keys: Keys, pattern: Pattern) -> tuple[int, int]:
        """Write what is not there: how many chunks were written, and how many were there."""
        written = there = 0
        headway = time.monotonic()
        while len(keys):
            with self._cache.reserve_write(keys, pattern.layout) as batch:
                status = np.array(batch.status)
                _fill(batch, words_of(keys), pattern)
            written += int((status == Status.OK).sum())
            there += int((status == Status.EXISTS).sum())
            rest = keys[(status == Status.NO_SPACE) | (status == Status.IN_FLIGHT)]
            if len(rest) < len(keys):
                headway = time.monotonic()
            elif time.monotonic() - headway > _NO_ROOM_S:
                raise RunError(f"no room for a chunk within {_NO_ROOM_S:.0f} s: is L2 stuck?")
            if (status == Status.NO_SPACE).any():
                self._tally.waited()
            if len(rest) and self._stop.wait(_RETRY_S):
                raise Stopped
            keys = rest
        return written, there


def _compare(batch: shmcache.ReadBatch, places: NDArray[np.int64], words: NDArray[np.int64], pattern: Pattern) -> int:
    """How many of the chunks at these places hold other bytes than they should."""
    arrays = batch.arrays()
    right = sum(pattern.matches(arrays[place], words[place]) for place in places)
    return len(places) - right


def _fill(batch: shmcache.WriteBatch, words: NDArray[np.int64], pattern: Pattern) -> None:
    for chunk, word in zip(batch.arrays(), words, strict=True):
        if chunk is not None:
            pattern.fill(chunk, word)
