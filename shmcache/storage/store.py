"""Stores: one thread an adapter copies published objects from the arena to L2, under shares held meanwhile.

Objects that wait to be stored cannot be evicted, so there is a limit to their bytes. Who publishes beyond it waits
for a slow L2, and not for one that is dead: then the object is not stored, and counted.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from shmcache import errors
from shmcache.batch import ReadBatch
from shmcache.layout import Layout
from shmcache.status import Status
from shmcache.storage.adapter import L2Adapter
from shmcache.storage.channel import describe
from shmcache.storage.l1 import L1

__all__ = ["StoreQueue"]

_TRIES: Final = 4
_BACKOFF_S: Final = 0.05  #: before the second try; doubled before each further one, and spread by chance

_log = logging.getLogger("shmcache.storage")


class _Job:
    """Objects that are held until every adapter has them or has given them up."""

    def __init__(self, batch: ReadBatch, layouts: list[Layout | None], adapters: int) -> None:
        found = [
            (key, view, layout) for key, view, layout in zip(batch.keys, batch.views, layouts, strict=True) if view
        ]
        self.batch = batch
        self.keys: list[bytes] = [key for key, _, _ in found]
        self.views: list[memoryview] = [view for _, view, _ in found]
        self.layouts: list[Layout | None] = [layout for _, _, layout in found]
        self.nbytes = sum(view.nbytes for view in self.views)
        self.left = adapters

    def release(self) -> None:
        self.views.clear()
        try:
            self.batch.release()
        except errors.ViewInUseError:
            _log.warning("an L2 adapter kept a view after store(); its share goes back when the view is gone")


class _Line:
    """The jobs of one adapter."""

    def __init__(self, adapter: L2Adapter) -> None:
        self.adapter: Final = adapter
        self.jobs: deque[_Job] = deque()
        self.since: float | None = None  # when the call in progress began
        self.failing = False  # the last job was given up
        self.thread: threading.Thread | None = None


class StoreQueue:
    """The objects on their way to L2. Its methods may be called by any thread."""

    def __init__(self, l1: L1, adapters: Sequence[L2Adapter], *, timeout_s: float, backlog_bytes: int) -> None:
        self._l1 = l1
        self._timeout_s = timeout_s
        self._backlog_bytes = backlog_bytes
        self._lines = [_Line(adapter) for adapter in adapters]
        self._changed = threading.Condition()  # guards all below, and the lines
        self._pending: set[bytes] = set()
        self._nbytes = 0
        self._jobs = 0
        self._closed = False

    def put(self, keys: list[bytes]) -> None:
        """Sends readable objects to every adapter, but those that are on their way already, or temporary."""
        with self._changed:
            keys = [key for key in dict.fromkeys(keys) if key not in self._pending]
            self._pending.update(keys)
        job = None
        try:
            job = self._hold(keys)
        finally:
            if job is None:
                with self._changed:
                    self._pending.difference_update(keys)

    def published(self, keys: list[bytes]) -> None:
        """:meth:`put`, for who publishes and must not fail because of L2."""
        try:
            self.put(keys)
        except errors.ShmcacheError as error:
            _log.warning("published objects are not stored to L2: %s", error)

    def flush(self, timeout_s: float | None) -> None:
        """Returns when nothing is on its way any more; TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._jobs == 0, timeout_s):
                raise TimeoutError(f"{self._jobs} stores to L2 are not finished after {timeout_s:g} s")

    def close(self) -> None:
        """Takes no more, and finishes what it has, unless an adapter hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._jobs and not any(self._stuck(line) for line in self._lines):
                self._changed.wait(self._timeout_s / 10)

    # Who puts

    def _hold(self, keys: list[bytes]) -> _Job | None:
        """Holds what is there and puts it in line; None where there is nothing to do."""
        if not keys or not self._lines:
            return None
        batch = self._l1.hold(keys)
        job = _Job(batch, self._l1.layouts_of(batch), len(self._lines))
        with self._changed:
            if job.keys and self._has_room(job.nbytes):
                self._pending.difference_update(set(keys) - set(job.keys))
                self._append(job)
                return job
        if job.keys:
            self._l1.count("l2_store_drops", len(job.keys))
        job.release()
        return None

    def _has_room(self, nbytes: int) -> bool:
        """Waits until the backlog takes ``nbytes``, or no longer makes headway."""
        deadline = time.monotonic() + self._timeout_s
        while not self._closed and self._nbytes and self._nbytes + nbytes > self._backlog_bytes:
            if any(line.failing or self._stuck(line) for line in self._lines) or time.monotonic() > deadline:
                return False
            self._changed.wait(self._timeout_s / 10)
        return not self._closed

    def _append(self, job: _Job) -> None:
        self._nbytes += job.nbytes
        self._jobs += 1
        self._l1.gauge("l2_backlog_bytes", job.nbytes)
        for line in self._lines:
            line.jobs.append(job)
            if line.thread is None:
                line.thread = threading.Thread(target=self._work, args=(line,), name="shmcache-store", daemon=True)
                line.thread.start()
        self._changed.notify_all()

    def _stuck(self, line: _Line) -> bool:
        return line.since is not None and time.monotonic() - line.since > self._timeout_s

    # The thread of a line

    def _work(self, line: _Line) -> None:
        while (job := self._next(line)) is not None:
            try:
                self._store(line, job)
            except Exception:  # noqa: BLE001 # the thread must outlive every job
                _log.exception("a store to L2 failed")
            self._leave(job)
            del job

    def _next(self, line: _Line) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: line.jobs or self._closed)
            return line.jobs.popleft() if line.jobs else None

    def _leave(self, job: _Job) -> None:
        with self._changed:
            job.left -= 1
            if job.left:
                return
        job.release()
        with self._changed:
            self._pending.difference_update(job.keys)
            self._nbytes -= job.nbytes
            self._jobs -= 1
            self._l1.gauge("l2_backlog_bytes", -job.nbytes)
            self._changed.notify_all()

    def _store(self, line: _Line, job: _Job) -> None:
        """Stores what the adapter does not have; tries again what fails, less often while it keeps failing."""
        left = list(range(len(job.keys)))
        there = False
        self._l1.gauge("l2_storing", len(left))
        error = None
        for attempt in range(1 if line.failing else _TRIES):
            if attempt:
                self._l1.count("l2_store_retries", len(left))
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                if not there:
                    left, there = self._missing(line, job, left), True
                left = self._store_once(line, job, left)
                error = f"{line.adapter!r}: store: not all were stored" if left else None
            except Exception as raised:  # noqa: BLE001 # whatever an adapter raises is its failure, not ours
                error = describe(line.adapter, raised)
            if not left:
                break
        self._l1.gauge("l2_storing", -len(job.keys))
        self._l1.count("l2_store_errors", len(left))
        if left and not line.failing:
            _log.warning("%d objects are not stored to L2: %s", len(left), error)
        line.failing = bool(left)

    def _missing(self, line: _Line, job: _Job, left: list[int]) -> list[int]:
        keys = [job.keys[i] for i in left]
        there = self._call(line, partial(line.adapter.lookup, keys), len(keys))
        self._l1.count("l2_store_skips", sum(map(bool, there)))
        return [i for i, found in zip(left, there, strict=True) if not found]

    def _store_once(self, line: _Line, job: _Job, left: list[int]) -> list[int]:
        """Those that must be tried again."""
        if not left:
            return []
        keys, views = [job.keys[i] for i in left], [job.views[i] for i in left]
        more = {"layouts": [job.layouts[i] for i in left]} if getattr(line.adapter, "keeps_layouts", False) else {}
        began = time.monotonic()
        found = self._call(line, partial(line.adapter.store, keys, views, **more), len(keys))
        self._l1.time("l2_store", time.monotonic() - began)
        stored = [view.nbytes for view, status in zip(views, found, strict=True) if status == Status.OK]
        self._l1.count("l2_stores", len(stored))
        self._l1.count("l2_stored_bytes", sum(stored))
        self._l1.count("l2_store_skips", sum(status == Status.EXISTS for status in found))
        self._l1.count("l2_store_no_space", sum(status == Status.NO_SPACE for status in found))
        over = (Status.OK, Status.EXISTS, Status.NO_SPACE)
        return [i for i, status in zip(left, found, strict=True) if status not in over]

    def _call(self, line: _Line, call: Callable[[], Any], n: int) -> list[Any]:
        line.since = time.monotonic()
        try:
            answer = call()
        finally:
            line.since = None
        if not isinstance(answer, (list, tuple)) or len(answer) != n:
            raise ValueError(f"expected a list of {n}, one a key")
        return list(answer)
