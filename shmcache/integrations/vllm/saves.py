"""Which blocks are stored: reserved here, copied by the ranks, done when each of them says so.

The scheduler is a writer of every object, besides the rank of each part: it reserves, and its own part is done at once.
So it is the scheduler that learns that the arena has no room, before any rank copies; the last rank publishes, and a
rank that gives up leaves nothing behind. A block must stay as it is until the ranks are through with it: whoever writes
over it first makes them finish (``flushed``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import shmcache
from shmcache import Status
from shmcache.integrations.vllm.counters import Counters
from shmcache.integrations.vllm.messages import Report, Save, Shape

__all__ = ["Saves"]


@dataclass(slots=True)
class _Job:
    request_id: str
    keys: list[bytes]
    blocks: list[int]
    waiting: int  # ranks that have not said that they are through


class Saves:
    """Stores on their way."""

    def __init__(self, cache: shmcache.Cache, shape: Shape, counters: Counters) -> None:
        self._cache = cache
        self._shape = shape
        self._counters = counters
        self._next = 0
        self._jobs: dict[int, _Job] = {}
        self._blocks: dict[int, int] = {}  # block of the engine: the job that reads it

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def reserve(self, request_id: str, keys: list[bytes], blocks: list[int]) -> tuple[int, Save | None]:
        """How many leading keys are in the arena or on their way there now, and what the ranks have to do for it. Fewer
        than all: the arena has no room, as all of it is in use."""
        with self._cache.reserve_write(keys, self._shape.object_bytes, writers=self._shape.writers) as batch:
            status = batch.status
        if there := [key for key, code in zip(keys, status, strict=True) if code is Status.EXISTS]:
            self._cache.touch(there)
        handled = status.index(Status.NO_SPACE) if Status.NO_SPACE in status else len(keys)
        chosen = [i for i, code in enumerate(status) if code is Status.OK]
        return handled, self._begin(request_id, keys, blocks, chosen) if chosen else None

    def flushed(self, written: Iterable[int]) -> list[int]:
        """The jobs that must be through before these blocks are written over."""
        return sorted({self._blocks[block] for block in written if block in self._blocks})

    def done(self, report: Report) -> tuple[list[list[bytes]], set[str]]:
        """The keys that are stored now, a list a job, and the requests of which a rank could not store something."""
        stored, spoilt = [], set()
        for number, ranks in report.done.items():
            job = self._jobs[number]
            job.waiting -= ranks
            if number in report.failed:
                spoilt.add(job.request_id)
                job.keys = []
            if not job.waiting:
                self._end(number)
                stored.append(job.keys)
        return [keys for keys in stored if keys], spoilt

    def _begin(self, request_id: str, keys: list[bytes], blocks: list[int], chosen: list[int]) -> Save:
        save = Save(self._next, [keys[i] for i in chosen], [blocks[i] for i in chosen])
        self._next += 1
        self._jobs[save.job] = _Job(request_id, save.keys, save.blocks, self._shape.parts)
        self._blocks.update(dict.fromkeys(save.blocks, save.job))
        return save

    def _end(self, number: int) -> None:
        job = self._jobs.pop(number)
        for block in job.blocks:
            if self._blocks.get(block) == number:
                del self._blocks[block]
        self._counters.add(saved_blocks=len(job.keys))
