"""Stores: one thread an adapter copies published objects from the arena to L2, under shares held meanwhile.

Objects that wait to be stored cannot be evicted, so there is a limit to their bytes. Who publishes beyond it waits
for a slow L2, and not for one that is dead: then the object is not stored, and counted. What waits for an adapter that
hangs is given up, and what is published meanwhile goes to the others.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import numpy as np

from shmcache import errors
from shmcache.batch import ReadBatch
from shmcache.config import shown
from shmcache.layout import Layout
from shmcache.status import Status
from shmcache.storage.adapter import L2Adapter
from shmcache.storage.channel import answers, describe
from shmcache.storage.l1 import L1, Notes

__all__ = ["StoreQueue"]

_JOB_KEYS: Final = 16  #: stored by one call, and let go together
_TRIES: Final = 4
_BACKOFF_S: Final = 0.05  #: before the second try; doubled before each further one, and spread by chance

_log = logging.getLogger("shmcache.storage")


class _Job:
    """Objects that are held until every adapter has them or has given them up."""

    def __init__(self, batch: ReadBatch, layouts: list[Layout | None]) -> None:
        found = [
            (key, view, layout) for key, view, layout in zip(batch.keys, batch.views, layouts, strict=True) if view
        ]
        self.batch = batch
        self.keys: list[bytes] = [key for key, _, _ in found]
        self.views: list[memoryview] = [view for _, view, _ in found]
        self.layouts: list[Layout | None] = [layout for _, _, layout in found]
        self.nbytes = sum(view.nbytes for view in self.views)
        self.left = 0  # adapters

    def release(self) -> None:
        self.views.clear()
        try:
            self.batch.release()
        except errors.ViewInUseError:
            _log.warning("an L2 adapter kept a view after store(); its share goes back when the view is gone")


class _Line:
    """The jobs of one adapter."""

    def __init__(self, adapter: L2Adapter, l1: L1) -> None:
        self.notes: Final = Notes(l1)  # of its thread
        self.adapter: Final = adapter
        self.name: Final = shown(adapter)
        self.jobs: deque[_Job] = deque()
        self.job: _Job | None = None  # being stored
        self.since: float | None = None  # when the call in progress began
        self.failing = False  # the last job was given up
        self.thread: threading.Thread | None = None


class StoreQueue:
    """The objects on their way to L2. Its methods may be called by any thread."""

    def __init__(self, l1: L1, adapters: Sequence[L2Adapter], *, timeout_s: float, backlog_bytes: int) -> None:
        self._l1 = l1
        self._timeout_s = timeout_s
        self._backlog_bytes = backlog_bytes
        self._lines = [_Line(adapter, l1) for adapter in adapters]
        self._changed = threading.Condition()  # guards all below, and the lines
        self._notes = Notes(l1)
        self._pending: set[bytes] = set()
        self._nbytes = 0
        self._jobs = 0
        self._closed = False  # takes no more
        self._over = False  # tries nothing again

    def put(self, keys: list[bytes]) -> None:
        """Sends readable objects to every adapter, but those that are on their way already, or temporary."""
        keys = list(dict.fromkeys(keys))
        for i in range(0, len(keys), _JOB_KEYS):
            self._put(keys[i : i + _JOB_KEYS])

    def published(self, keys: list[bytes]) -> None:
        """:meth:`put`, for who publishes and must not fail because of L2."""
        try:
            self.put(keys)
        except errors.ShmcacheError as error:
            _log.warning("published objects are not stored to L2: %s", error)

    def flush(self, timeout_s: float | None) -> None:
        """Returns when nothing is on its way any more, unless to an adapter that hangs; TimeoutError."""
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._give_up_stuck() and any(map(self._works, self._lines)):
                left_s = end - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"{self._jobs} stores to L2 are not finished after {timeout_s:g} s")
                self._changed.wait(min(left_s, self._timeout_s / 10))

    def close(self) -> None:
        """Takes no more, and finishes what it has, unless an adapter hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._give_up_stuck() and any(map(self._works, self._lines)):
                self._changed.wait(self._timeout_s / 10)
            self._over = True

    # Who puts

    def _put(self, keys: list[bytes]) -> None:
        with self._changed:
            # Held under the lock: who publishes one of them later finds that it is on its way, or puts it himself.
            job = self._hold([key for key in keys if key not in self._pending])
            if job is None:
                return
            self._pending.update(job.keys)
            room = False
            try:
                room = self._has_room(job.nbytes) and self._append(job)
                if room:
                    return
            finally:
                if not room:
                    self._pending.difference_update(job.keys)
                    self._notes.count("l2_store_drops", len(job.keys) * len(self._lines))
                self._notes.flush()
        job.release()

    def _hold(self, keys: list[bytes]) -> _Job | None:
        """Holds what is there; None where nothing is."""
        if not keys or not self._lines:
            return None
        batch = self._l1.hold(keys)
        job = _Job(batch, self._l1.layouts_of(batch))
        return job if job.keys else None

    def _has_room(self, nbytes: int) -> bool:
        """Waits until the backlog takes ``nbytes``, or no longer makes headway."""
        deadline = time.monotonic() + self._timeout_s
        while not self._closed and self._give_up_stuck():
            if not self._nbytes or self._nbytes + nbytes <= self._backlog_bytes:
                return True
            slow = any(self._works(line) and not line.failing for line in self._lines)
            if not slow or time.monotonic() > deadline:
                return False
            self._changed.wait(self._timeout_s / 10)
        return False

    def _append(self, job: _Job) -> bool:
        """Sends a job to the adapters that do not hang; False where none can take it."""
        lines = [line for line in self._lines if not self._stuck(line) and self._begin(line)]
        if not lines:
            return False
        self._notes.count("l2_store_drops", len(job.keys) * (len(self._lines) - len(lines)))
        job.left = len(lines)
        self._nbytes += job.nbytes
        self._jobs += 1
        self._notes.gauge("l2_backlog_bytes", job.nbytes)
        for line in lines:
            line.jobs.append(job)
        self._changed.notify_all()
        return True

    def _begin(self, line: _Line) -> bool:
        """Whether a line has its thread."""
        if line.thread is None:
            thread = threading.Thread(target=self._work, args=(line,), name="shmcache-store", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process has all that it may have
                _log.warning("objects are not stored to L2: %s: %s", line.name, error)
                return False
            line.thread = thread
        return True

    def _stuck(self, line: _Line) -> bool:
        since = line.since
        return since is not None and time.monotonic() - since > self._timeout_s

    def _works(self, line: _Line) -> bool:
        """Whether a line will get on."""
        return bool(line.jobs or line.job) and not self._stuck(line)

    def _give_up_stuck(self) -> bool:
        """Lets go of what waits for adapters that hang; False where all do."""
        stuck = [line for line in self._lines if self._stuck(line)]
        for line in stuck:
            while line.jobs:
                job = line.jobs.popleft()
                self._notes.count("l2_store_drops", len(job.keys))
                self._leave(job)
        return len(stuck) < len(self._lines)

    # The thread of a line

    def _work(self, line: _Line) -> None:
        while (job := self._next(line)) is not None:
            try:
                self._store(line, job)
            except BaseException:  # noqa: BLE001 # the thread must outlive every job
                _log.exception("a store to L2 failed")
            line.notes.flush()
            with self._changed:
                line.job = None
                self._leave(job)
                self._changed.notify_all()
            del job

    def _next(self, line: _Line) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: line.jobs or self._closed)
            line.job = line.jobs.popleft() if line.jobs else None
            return line.job

    def _leave(self, job: _Job) -> None:
        """For who holds the lock: one adapter is done with a job."""
        job.left -= 1
        if job.left:
            return
        self._pending.difference_update(job.keys)  # first: what is published under one of them from now on is new
        job.release()
        self._nbytes -= job.nbytes
        self._jobs -= 1
        self._notes.gauge("l2_backlog_bytes", -job.nbytes)
        self._notes.flush()
        self._changed.notify_all()

    def _store(self, line: _Line, job: _Job) -> None:
        """Stores what the adapter does not have; tries again what fails, less often while it keeps failing."""
        left = list(range(len(job.keys)))
        there = False
        line.notes.gauge("l2_storing", len(left))
        error = None
        for attempt in range(1 if line.failing else _TRIES):
            if attempt:
                line.notes.count("l2_store_retries", len(left))
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                if not there:
                    left, there = self._missing(line, job, left), True
                if self._over:  # the look-up hung, and its adapter is closed
                    error = f"{line.name}: the StorageManager was closed"
                    break
                left = self._store_once(line, job, left)
                error = f"{line.name}: store: not all were stored" if left else None
            except BaseException as raised:  # noqa: BLE001 # whatever an adapter raises is its failure, not ours
                error = describe(line.adapter, raised)
            if not left or self._over:
                break
        line.notes.gauge("l2_storing", -len(job.keys))
        line.notes.count("l2_store_errors", len(left))
        if left and not line.failing:
            _log.warning("%d objects are not stored to L2: %s", len(left), error)
        if line.failing and not left:
            _log.warning("stores to L2 work again: %s", line.name)
        line.failing = bool(left)

    def _missing(self, line: _Line, job: _Job, left: list[int]) -> list[int]:
        keys = [job.keys[i] for i in left]
        there = self._call(line, partial(line.adapter.lookup, keys), len(keys), bool, np.bool_)
        line.notes.count("l2_store_skips", sum(map(bool, there)))
        return [i for i, found in zip(left, there, strict=True) if not found]

    def _store_once(self, line: _Line, job: _Job, left: list[int]) -> list[int]:
        """Those that must be tried again."""
        if not left:
            return []
        keys = [job.keys[i] for i in left]
        views = tuple(job.views[i][:] for i in left)  # the adapter's own: it may release them
        more = {"layouts": [job.layouts[i] for i in left]} if getattr(line.adapter, "keeps_layouts", False) else {}
        began = time.monotonic()
        try:
            found = self._call(line, partial(line.adapter.store, keys, list(views), **more), len(left), Status)
        finally:
            for view in views:  # an error's traceback may keep them
                with suppress(BufferError):
                    view.release()
        line.notes.time("l2_store", time.monotonic() - began)
        stored = [job.views[i].nbytes for i, status in zip(left, found, strict=True) if status is Status.OK]
        line.notes.count("l2_stores", len(stored))
        line.notes.count("l2_stored_bytes", sum(stored))
        line.notes.count("l2_store_skips", sum(status is Status.EXISTS for status in found))
        line.notes.count("l2_store_no_space", sum(status is Status.NO_SPACE for status in found))
        over = (Status.OK, Status.EXISTS, Status.NO_SPACE)
        return [i for i, status in zip(left, found, strict=True) if status not in over]

    def _call(self, line: _Line, call: Callable[[], Any], n: int, *kinds: type) -> list[Any]:
        line.notes.flush()
        line.since = time.monotonic()
        try:
            answer = call()
        finally:
            line.since = None
        if not answers(answer, n, *kinds):
            raise ValueError(f"expected a list of {n}, one a key")
        return list(answer)
