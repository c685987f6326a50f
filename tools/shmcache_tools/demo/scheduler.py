"""The demo's scheduler: makes each request's chain readable, grants shares, hands the keys out.

The chains of the next few requests are prefetched meanwhile: each gets its shares of what the arena or L2
has.  What neither has is written, and goes to L2 behind it.

A request is open from the moment its keys are handed out until every worker has said Done; at most
``OPEN_REQUESTS`` are.  Where the arena has no room because the workers still have shares of everything, the
scheduler waits for them, and where the prefetches ahead have them, it cancels these.  Nothing is dropped.

When a worker dies, its shares are reaped and go back to the cache.  So the scheduler takes shares of
its own (guards) of the chains that the dead worker had not finished, and hands the same keys to the
worker that takes its place.  Chunks that were evicted in between come back as missing in the worker's
answer, and are written again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from signal import SIGKILL

import numpy as np
from numpy.typing import NDArray

import shmcache
from shmcache import Status
from shmcache.storage import StorageManager
from shmcache_tools.chunks import Pattern, keys_of, words_of
from shmcache_tools.demo.crew import Crew, Death, describe_exit
from shmcache_tools.demo.prefetch import AHEAD, Prefetches
from shmcache_tools.demo.report import (
    ARRAYS,
    FILL,
    GRANT,
    PUBLISH,
    READ,
    RELEASE,
    RESERVE,
    Loss,
    Tally,
)
from shmcache_tools.demo.wire import Done, Failed, Ready, Task
from shmcache_tools.program import RunError
from shmcache_tools.text import plural
from shmcache_tools.trace import TraceRequest

OPEN_REQUESTS = 16

_POLL_S = 0.05
_WRITER_POLL_S = 0.001
_START_TIMEOUT_S = 60.0

Keys = NDArray[np.uint8]


@dataclass(slots=True)
class Job:
    """What one worker still has to do for one request; ``guards`` are the scheduler's own shares."""

    request: int
    keys: Keys
    guards: list[shmcache.ReadBatch] = field(default_factory=list)

    def drop_guards(self) -> None:
        for guard in self.guards:
            guard.release()
        self.guards.clear()


class Scheduler:
    """Replays requests over one arena; ``on_tick`` is called often, and may raise to end the run."""

    def __init__(
        self,
        cache: shmcache.Cache,
        storage: StorageManager,
        crew: Crew,
        pattern: Pattern,
        tally: Tally,
        on_tick: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._storage = storage
        self._crew = crew
        self._pattern = pattern
        self._tally = tally
        self._on_tick = on_tick
        self._extra_count = crew.world_size - 1
        self._prefetches = Prefetches(storage, pattern.layout, self._extra_count)
        self._jobs: list[dict[int, Job]] = [{} for _ in range(crew.world_size)]  # a rank: by request
        self._open: dict[int, int] = {}  # request: workers that are not done with it
        self._again: deque[tuple[int, Job]] = deque()  # (rank, job) whose chunks were missing
        self._answers = 0  # Dones and deaths: each may have made room
        self._flushed = False  # nothing was written since all had been stored

    def start_workers(self) -> None:
        """Start the workers and wait until all have attached."""
        self._crew.start()
        deadline = time.perf_counter() + _START_TIMEOUT_S
        while not all(worker.ready for worker in self._crew.workers):
            if time.perf_counter() > deadline:
                raise RunError(f"the workers have not attached within {_START_TIMEOUT_S:.0f} s")
            self._pump(_POLL_S)

    def replay(self, trace: Iterable[TraceRequest]) -> None:
        """Hand every request out; returns when all of them are finished."""
        self._tally.began = time.perf_counter()
        for number, request in enumerate(trace):
            self._prefetches.submit(number, keys_of(request.hash_ids))
            if len(self._prefetches) > AHEAD:
                self._serve_next()
        while len(self._prefetches):
            self._serve_next()
        self._settle(0)

    def unfinished(self) -> list[int]:
        """Requests that each worker still has to finish."""
        return [len(jobs) for jobs in self._jobs]

    def drop_guards(self) -> None:
        """Give back what the scheduler itself has shares of."""
        for jobs in self._jobs:
            for job in jobs.values():
                job.drop_guards()

    # Making a chain readable, with one share for each worker

    def _serve_next(self) -> None:
        """Make the first of the chains ahead readable, and hand it out."""
        self._settle(OPEN_REQUESTS - 1)
        chain, result = self._prefetches.next(lambda: self._pump(0))
        self._tally.prefetched(result, len(chain.keys))
        wanting = chain.keys[result.hits :]
        while len(wanting):
            wanting = self._write(wanting, grant=True)
        self._hand_out(chain.request, chain.keys)
        self._pump(0)

    def _grant(self, keys: Keys) -> Keys:
        """Grant every worker a share of each; the keys that are not readable."""
        if not len(keys):
            return keys
        began = time.perf_counter()
        status = self._cache.reserve_read(keys, self._extra_count)
        self._sample(GRANT, began, len(keys))
        gone = keys[_where_not(status, Status.OK)]
        self._tally.l1_hits += len(keys) - len(gone)
        return gone

    def _write(self, keys: Keys, *, grant: bool) -> Keys:
        """Write the chunks that are not there; the keys that are still wanting.

        With ``grant`` every chunk written, and every one that proves to be there, has shares granted;
        without it every chunk is still wanting, for the caller to read.
        """
        began = time.perf_counter()
        batch = self._cache.reserve_write(keys, self._pattern.layout)
        self._sample(RESERVE, began, len(keys))
        with batch:
            status = _codes(batch.status)
            _expect(status, Status.OK, Status.EXISTS, Status.IN_FLIGHT, Status.NO_SPACE)
            self._fill(batch, words_of(keys))
            self._publish(batch, grant, int((status == Status.OK).sum()))
        self._flushed = self._flushed and not (status == Status.OK).any()
        if (status == Status.NO_SPACE).any():
            self._wait_for_room()
        elif (status == Status.IN_FLIGHT).any():  # a prefetch ahead loads it
            self._pump(_WRITER_POLL_S)
        if not grant:
            return keys
        unwritten = (status == Status.IN_FLIGHT) | (status == Status.NO_SPACE)
        return np.concatenate([self._grant(keys[status == Status.EXISTS]), keys[unwritten]])

    def _fill(self, batch: shmcache.WriteBatch, words: NDArray[np.int64]) -> None:
        began = time.perf_counter()
        filled = 0
        for chunk, word in zip(batch.arrays(), words, strict=True):
            if chunk is not None:
                self._pattern.fill(chunk, word)
                filled += 1
        self._sample(FILL, began, filled)

    def _publish(self, batch: shmcache.WriteBatch, grant: bool, chunks: int) -> None:
        began = time.perf_counter()
        if grant:
            batch.publish_and_reserve_read(self._extra_count)
            self._sample(PUBLISH, began, chunks)
        else:
            batch.publish()

    def _wait_for_room(self) -> None:
        """Wait until shares are given back: by a worker, by the prefetches ahead, by what is stored to L2."""
        self._tally.waits += 1
        if any(self._jobs):
            before = self._answers
            while self._answers == before and any(self._jobs):
                self._pump(_POLL_S)
        elif not self._prefetches.give_room():
            if self._flushed:
                raise RunError("the arena has no room for one request: pass a larger --capacity")
            self.flush()

    def flush(self) -> None:
        """Wait until L2 has all that was written."""
        while not self._flushed:
            self._on_tick()
            with contextlib.suppress(TimeoutError):
                self._storage.flush(_POLL_S)
                self._flushed = True

    # Handing out, and what comes back

    def _hand_out(self, number: int, keys: Keys) -> None:
        self._tally.handed_out += 1
        self._open[number] = self._crew.world_size
        for rank in range(self._crew.world_size):
            self._assign(rank, Job(number, keys))

    def _assign(self, rank: int, job: Job) -> None:
        """Give a worker a job; one that is starting gets it when it has attached."""
        self._jobs[rank][job.request] = job
        if self._crew.workers[rank].ready:
            self._crew.tell(rank, Task(job.request, job.keys))

    def _settle(self, limit: int) -> None:
        """Wait until at most ``limit`` requests are open."""
        self._repeat_missing()
        while len(self._open) > limit:
            self._pump(_POLL_S)
            self._repeat_missing()

    def _pump(self, timeout_s: float) -> None:
        """Hear what the workers have to say."""
        self._on_tick()
        for event in self._crew.listen(timeout_s):
            if isinstance(event, Death):
                self._on_death(event)
                continue
            rank, answer = event
            if isinstance(answer, Done):
                self._on_done(rank, answer)
            elif isinstance(answer, Ready):
                self._on_ready(rank)
            elif isinstance(answer, Failed):
                raise RunError(f"worker {rank} failed:\n{answer.text}")

    def _on_ready(self, rank: int) -> None:
        for job in self._jobs[rank].values():
            self._crew.tell(rank, Task(job.request, job.keys))

    def _on_done(self, rank: int, done: Done) -> None:
        self._answers += 1
        job = self._jobs[rank].pop(done.request)
        job.drop_guards()
        self._tally.mismatches += done.mismatches
        self._tally.sample(READ, done.read_s, len(job.keys))
        self._tally.sample(ARRAYS, done.arrays_s, done.chunks)
        self._tally.sample(RELEASE, done.release_s, done.chunks)
        if done.missing:
            self._tally.missing += done.missing
            self._again.append((rank, job))
            return
        self._tally.read_chunks[rank] += done.chunks
        self._open[done.request] -= 1
        if not self._open[done.request]:
            del self._open[done.request]
            self._tally.finished += 1

    # Deaths

    def _on_death(self, death: Death) -> None:
        """Take back the dead worker's shares, guard what it had not finished, start a new one."""
        if death.exit_code != -SIGKILL:
            raise RunError(f"worker {death.rank} ended: {describe_exit(death.exit_code)}")
        self._answers += 1
        began = time.perf_counter()
        self._cache.reap()
        ended = time.perf_counter()
        left = self._shares_left(death.rank)
        self._tally.losses.append(Loss(death.rank, ended - death.at, ended - began, left))
        for job in self._jobs[death.rank].values():
            job.guards.append(self._cache.read(job.keys))
        self._crew.restart(death.rank)

    def _shares_left(self, rank: int) -> int:
        """Shares that the dead worker still has. What a vacant lane has reserved is its successor's.

        Such are granted where somebody who needed room reaped the lane before we heard of the death."""
        lanes = shmcache.inspect(self._crew.arena).lanes
        mine = [lane for lane in lanes if lane.role == "rank" and lane.rank == rank]
        return sum(lane.held + (lane.reserved if lane.state == "dead" else 0) for lane in mine)

    def _repeat_missing(self) -> None:
        """Write again what a worker found missing, and hand it the request once more."""
        while self._again:
            rank, job = self._again.popleft()
            wanting = job.keys
            while len(wanting):
                guard = self._cache.read(wanting)
                job.guards.append(guard)
                wanting = wanting[_where_not(guard.status, Status.OK)]
                if len(wanting):
                    self._write(wanting, grant=False)
            self._assign(rank, job)

    def _sample(self, operation: str, began: float, chunks: int) -> None:
        self._tally.sample(operation, time.perf_counter() - began, chunks)


def _codes(status: Sequence[Status]) -> NDArray[np.int64]:
    return np.array(status, dtype=np.int64)


def _where_not(status: Sequence[Status], wanted: Status) -> NDArray[np.bool_]:
    return np.not_equal(_codes(status), wanted)


def _expect(status: NDArray[np.int64], *allowed: Status) -> None:
    """A scheduler sees no other status; anything else is a fault of the arena."""
    strange = status[~np.isin(status, allowed)]
    if len(strange):
        names = ", ".join(sorted({Status(code).name for code in strange.tolist()}))
        raise RunError(f"reserve_write gave {names} for {plural(len(strange), 'chunk')}")
