"""Which blocks are saved: reserved here, copied by the ranks, published here when each of them has said that it is
through.

The scheduler is a writer of every object, besides the rank of each part, and the first to come and the last to go: it
learns that the arena has no room before any rank copies; a rank that is late still joins the write that is meant; and
nothing is published that any rank could not copy, or that was computed from blocks that were never loaded. A block must
stay as it is until the ranks are through with it: whoever writes over it first makes them finish (``flushed``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import shmcache
from shmcache import Status, WriteBatch
from shmcache.integrations.vllm.counters import Counters
from shmcache.integrations.vllm.messages import Report, Save, Shape

__all__ = ["Saves"]

_log = logging.getLogger("vllm.shmcache")
_NONE = range(0)


@dataclass(slots=True)
class _Job:
    request_id: str
    epoch: int
    batch: WriteBatch  # the scheduler's part: open as long as the job
    blocks: list[int]
    waiting: int  # ranks that have not said that they are through
    failed: bool = False


class Saves:
    """Saves on their way."""

    def __init__(self, cache: shmcache.Cache, shape: Shape, counters: Counters) -> None:
        self._cache = cache
        self._shape = shape
        self._counters = counters
        self._next = 0
        self._jobs: dict[int, _Job] = {}
        self._blocks: dict[int, int] = {}  # block of the engine: the job that reads it
        self._failed: list[WriteBatch] = []  # to be aborted, which may have to wait for the arena lock
        self._bad_epoch = -1  # what was computed in it, and before, may come from blocks that were never loaded

    def __bool__(self) -> bool:
        return bool(self._jobs or self._failed)

    def reserve(
        self, request_id: str, keys: list[bytes], blocks: list[int], epoch: int, granted: range = _NONE
    ) -> tuple[int, Save | None]:
        """How many leading keys are in the arena or on their way there now, and what the ranks have to do for it.

        Fewer than all: the arena has no room, as all of it is in use. ``granted``: indices of keys that this request
        was granted shares of; the others that are there count as used by it from now on.
        """
        batch = self._cache.reserve_write(keys, self._shape.object_bytes, writers=self._shape.writers)
        status = batch.status
        handled = status.index(Status.NO_SPACE) if Status.NO_SPACE in status else len(keys)
        if used := [keys[i] for i in range(handled) if status[i] is Status.EXISTS and i not in granted]:
            self._cache.touch(used)
        save = self._begin(request_id, batch, blocks, epoch) if Status.OK in status else None
        return handled, save

    def flushed(self, written: Iterable[int]) -> list[int]:
        """The jobs that must be through before these blocks are written over."""
        return sorted({self._blocks[block] for block in written if block in self._blocks})

    def done(self, report: Report) -> tuple[list[list[bytes]], set[str]]:
        """The keys that are saved now, a list a job, and the requests of which something is not."""
        self._bad_epoch = max(self._bad_epoch, report.bad_epoch)
        saved, spoilt = [], set()
        for number, ranks in report.done.items():
            job = self._jobs[number]
            job.waiting -= ranks
            job.failed |= number in report.failed
            if job.waiting:
                continue
            keys = self._end(number)
            if len(keys) < len(job.blocks):
                spoilt.add(job.request_id)
            if keys:
                saved.append(keys)
        return saved, spoilt

    def abort_failed(self) -> None:
        """Frees what failed; until then its keys are in flight."""
        while self._failed:
            batch = self._failed.pop()
            try:
                batch.abort()
            except shmcache.ArenaBusyError:
                self._failed.append(batch)
                raise

    def close(self) -> None:
        """Nothing that is on its way will be published."""
        self._failed += [job.batch for job in self._jobs.values()]
        self._jobs.clear()
        self.abort_failed()

    def _begin(self, request_id: str, batch: WriteBatch, blocks: list[int], epoch: int) -> Save:
        chosen = [
            (key, block) for key, block, code in zip(batch.keys, blocks, batch.status, strict=True) if code is Status.OK
        ]
        save = Save(self._next, [key for key, _ in chosen], [block for _, block in chosen])
        self._next += 1
        self._jobs[save.job] = _Job(request_id, epoch, batch, save.blocks, self._shape.parts)
        self._blocks.update(dict.fromkeys(save.blocks, save.job))
        return save

    def _end(self, number: int) -> list[bytes]:
        """All ranks are through with a job: the keys that are published."""
        job = self._jobs.pop(number)
        for block in job.blocks:
            if self._blocks.get(block) == number:
                del self._blocks[block]
        if job.failed or job.epoch <= self._bad_epoch:
            self._failed.append(job.batch)
            return []
        chosen = job.batch.status
        try:
            found = job.batch.publish()
        except shmcache.ShmcacheError as error:
            _log.error("%d blocks are not saved: %s", len(job.blocks), error)
            self._failed.append(job.batch)
            return []
        keys = [key for key, had, has in zip(job.batch.keys, chosen, found, strict=True) if had is has is Status.OK]
        self._counters.add(saved_blocks=len(keys))
        return keys
