"""A rank's side of the connector: loads objects into its blocks, and saves blocks, as the scheduler's side says.

Small loads are made within the step that needs them, large ones and all saves by a thread each, so that the engine
computes on meanwhile. A rank's share is back as soon as that rank has copied.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final

import shmcache
from shmcache import ReadBatch, Status, WriteBatch
from shmcache.integrations.vllm.copier import Copier
from shmcache.integrations.vllm.counters import Counters
from shmcache.integrations.vllm.messages import Load, Report, Save, Shape, Step

__all__ = ["Worker"]

_log = logging.getLogger("vllm.shmcache")

_NO_EPOCH: Final = -1


class Worker:
    """Loads and saves of one rank. Its methods are called by the engine's thread."""

    def __init__(self, cache: shmcache.Cache, rank: int, shape: Shape, copier: Copier) -> None:
        self.counters = Counters()
        self._cache = cache
        self._shape = shape
        self._part = shape.part(rank)
        self._writes = shape.writes(rank)
        self._copier = copier
        self._loader = ThreadPoolExecutor(1, "shmcache-vllm-load")
        self._saver = ThreadPoolExecutor(1, "shmcache-vllm-save")
        self._saves: dict[int, Future[None]] = {}
        self._loads: dict[str, Future[None]] = {}
        self._lock = threading.Lock()  # of the two below, which the threads add to
        self._report = Report()
        self._load_errors: set[int] = set()
        self._mark: Any = None  # what wrote to the blocks that loads between steps write over

    def before(self, step: Step) -> None:
        """Before the step writes over blocks: what is to be copied out of them is."""
        if late := [self._saves[job] for job in step.flush if job in self._saves]:
            wait(late)
        self._mark = self._copier.mark() if any(load.between_steps for load in step.loads) else None

    def load(self, step: Step) -> None:
        """The loads of the step: those within it are done, or enqueued before what the engine computes next."""
        for load in step.loads:
            if load.between_steps:
                self._loads[load.request_id] = self._loader.submit(self._load_aside, load, self._mark)
            else:
                self._load(load, step.epoch)

    def save(self, step: Step) -> None:
        """The saves of the step, which has computed all that they need; they go on while the next step computes."""
        if not (self._writes and step.saves):
            return
        mark = self._copier.mark()
        for save in step.saves:
            self._saves[save.job] = self._saver.submit(self._save, save, mark)

    def received(self) -> set[str]:
        """The requests whose loads between steps are through since the last call, well or not."""
        over = {request_id for request_id, load in self._loads.items() if load.done()}
        for request_id in over:
            self._loads.pop(request_id).result()
        return over

    def load_errors(self) -> set[int]:
        """Blocks that hold no KV, as their objects were lost, since the last call."""
        with self._lock:
            errors, self._load_errors = self._load_errors, set()
        return errors

    def report(self) -> Report:
        """What the scheduler's side has not been told yet."""
        with self._lock:
            report, self._report = self._report, Report()
        for job in report.done:
            self._saves.pop(job).result()
        return report

    def close(self) -> None:
        """Waits for what is being copied. Nothing depends on this: a death does the same."""
        self._loader.shutdown(cancel_futures=True)
        self._saver.shutdown(cancel_futures=True)

    # Loads

    def _load_aside(self, load: Load, mark: Any) -> None:
        with self._copier.aside(mark):
            self._load(load, _NO_EPOCH)  # nobody computes from these blocks before the scheduler's side knows

    def _load(self, load: Load, epoch: int) -> None:
        """Claims the shares, copies, and gives them back once that is done."""
        began = time.perf_counter()
        good: list[int] = []
        try:
            with self._cache.read(load.keys) as batch:
                copied, stream = self._copy_in(load, batch)
                if stream is not None:
                    _release_after(batch, stream)
            good = copied
        except Exception:  # noqa: BLE001 # whatever it is, it costs these blocks, and not the engine
            _log.exception("request %s: could not load", load.request_id)
        if len(good) < len(load.keys):
            self._failed(load, good, epoch)
        self.counters.add(loaded_bytes=len(good) * self._shape.part_bytes, load_seconds=time.perf_counter() - began)

    def _copy_in(self, load: Load, batch: ReadBatch) -> tuple[list[int], Any]:
        """Which of the objects are copied, and the stream that does it."""
        # What is made of the views must be gone before the batch can be released: so this is a function of its own.
        views = batch.views
        parts = {i: view[self._part] for i, view in enumerate(views) if view is not None and self._is_whole(view)}
        return list(parts), self._copier.load([load.blocks[i] for i in parts], list(parts.values()))

    def _is_whole(self, view: memoryview) -> bool:
        """Whoever wrote it under this key: it has all parts."""
        return view.nbytes == self._shape.object_bytes

    def _failed(self, load: Load, good: list[int], epoch: int) -> None:
        bad = {block for i, block in enumerate(load.blocks) if i not in set(good)}
        self.counters.add(load_errors=len(bad))
        with self._lock:
            self._load_errors |= bad
            self._report.bad_epoch = max(self._report.bad_epoch, epoch)

    # Saves

    def _save(self, save: Save, mark: Any) -> None:
        began, good = time.perf_counter(), False
        try:
            good = self._write(save, mark)
        except Exception:  # noqa: BLE001 # as above; the scheduler's side must be told in any case
            _log.exception("%d blocks are not saved", len(save.keys))
        nbytes = len(save.keys) * self._shape.part_bytes if good else 0
        self.counters.add(saved_bytes=nbytes, save_seconds=time.perf_counter() - began)
        self.counters.add(save_errors=0 if good else len(save.keys))
        with self._lock:
            self._report.done[save.job] += 1
            if not good:
                self._report.failed.add(save.job)

    def _write(self, save: Save, mark: Any) -> bool:
        """Whether this rank's part of every object is in place. The scheduler's side decides what becomes of them."""
        batch = self._cache.reserve_write(save.keys, self._shape.object_bytes, writers=self._shape.writers)
        try:
            good = all(code is Status.OK for code in batch.status)
            if good:
                self._copy_out(save, batch, mark)
        finally:
            batch.publish()  # whatever it holds: to abort would free the keys while others of the group join
        return good

    def _copy_out(self, save: Save, batch: WriteBatch, mark: Any) -> None:
        parts = [view[self._part] for view in batch.views if view is not None]
        self._copier.save(save.blocks, parts, mark)


def _release_after(batch: ReadBatch, stream: Any) -> None:
    """The shares go back once the stream has copied; at once where the driver cannot tell that (no cuda-bindings)."""
    try:
        batch.release_after(stream)
    except shmcache.DeviceError:
        stream.synchronize()
