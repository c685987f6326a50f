"""StorageManager: what callers use to bring objects from L2 into the arena, and from the arena to L2."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

from shmcache import errors
from shmcache._keys import Keys
from shmcache.batch import ReadBatch
from shmcache.cache import Cache
from shmcache.config import MAX_SECONDS, check_bool, parse_size, shown
from shmcache.storage.adapter import L2Adapter, LayoutLike, open_adapter
from shmcache.storage.channel import Channel, describe
from shmcache.storage.l1 import L1
from shmcache.storage.prefetch import PrefetchController
from shmcache.storage.store import StoreQueue
from shmcache.storage.task import PrefetchResult, PrefetchTask

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StorageManager"]

_log = logging.getLogger("shmcache.storage")

_MOST: Final = 1024  #: tasks in flight, and threads an adapter


class StorageManager:
    """Prefetches into one cache, and stores out of it, by adapters asked in their order. A context manager that closes.

    ``l2``: adapters, or URLs as for :func:`open_adapter`; the manager closes them. ``max_in_flight``: prefetches
    worked on at once; the others queue. ``io_threads``: calls of one adapter at once. ``store``: "write_through"
    sends what this process publishes to L2 in the background; None only what :meth:`store` names.
    ``l2_timeout_s``: an adapter's call that takes longer is given up. ``contend_s``: how long a prefetch waits for a
    key that another writer has in hand. ``backlog``: bytes that may wait to be stored, by default an eighth of the
    arena; who publishes beyond waits for a slow L2, at most ``l2_timeout_s``; what a dead L2 does not take is dropped.

    TypeError or ValueError for bad arguments, in the caller's thread; ClosedError after close and in a forked child.
    """

    def __init__(
        self,
        cache: Cache,
        l2: Sequence[L2Adapter | str] = (),
        *,
        max_in_flight: int = 8,
        io_threads: int = 4,
        store: str | None = "write_through",
        l2_timeout_s: float = 30.0,
        contend_s: float = 5.0,
        backlog: int | str | None = None,
    ) -> None:
        self._closed = True  # until all is there
        if not isinstance(cache, Cache):
            raise TypeError(f"cache: expected a Cache, as from shmcache.attach, got {shown(cache)}")
        if store not in ("write_through", None):  # what has no hash is refused, too
            raise ValueError(f'store: expected "write_through" or None, got {shown(store)}')
        in_flight = _check_count(max_in_flight, "max_in_flight")
        threads = _check_count(io_threads, "io_threads")
        timeout_s, wait_s = _check_seconds(l2_timeout_s, "l2_timeout_s"), _check_seconds(contend_s, "contend_s")
        nbytes = cache.stats().capacity // 8 if backlog is None else parse_size(backlog, "backlog")
        self._l1 = L1(cache)
        self._l1.check_open()
        self._adapters = _open_all(l2, self._l1)
        self._pid = os.getpid()
        self._controller = PrefetchController(
            self._l1,
            [Channel(adapter, threads) for adapter in self._adapters],
            max_in_flight=in_flight,
            timeout_s=timeout_s,
            contend_s=wait_s,
        )
        self._stores = StoreQueue(self._l1, self._adapters, timeout_s=timeout_s, backlog_bytes=nbytes)
        self._listener = self._stores.published
        if store is not None and self._adapters:
            self._l1.listen(self._listener)
        self._end = partial(_end, self._l1, self._listener, self._controller, self._stores, self._adapters)
        self._closed = False

    def __repr__(self) -> str:
        return f"<StorageManager of arena {self._l1.name!r}, l2={self._adapters}{' closed' if self._closed else ''}>"

    # Prefetch

    def submit_prefetch_task(
        self,
        keys: Keys,
        layout: LayoutLike | Sequence[LayoutLike],
        extra_count: int = 0,
        *,
        skip_l2: bool = False,
        temporary: bool = False,
    ) -> PrefetchTask:
        """Begins to make a chain of keys readable, with one reserved share of each for ranks 0 to ``extra_count``.

        The longest prefix that the arena and L2 can serve together gets its shares, in order, each key as soon as it
        is there. ``layout``: of the objects to be loaded, as for ``reserve_write``; bytes that L2 has under another
        size are not found. ``skip_l2``: only what the arena has. ``temporary``: what is loaded is freed when its last
        share is given back. Returns at once. TypeError unless ``extra_count`` is an int (bool is not), ValueError
        unless 0 <= extra_count < world_size; ArenaSpaceError where the layout table is full.
        """
        self._check_open()
        chain = self._l1.check_keys(keys)
        extra = self._l1.check_extra_count(extra_count)
        use_l2 = not check_bool(skip_l2, "skip_l2") and bool(self._adapters)
        check_bool(temporary, "temporary")
        layouts = self._l1.check_layouts(layout, len(chain))
        task = PrefetchTask(self._controller, chain, layouts, extra, use_l2=use_l2, temporary=temporary)
        self._controller.submit(task)
        return task

    def query_prefetch_status(self, task: PrefetchTask) -> PrefetchResult | None:
        """The result, once: None while the prefetch runs, and None again after a query gave its result.

        So a loop that polls many tasks acts on each of them once. :meth:`wait_prefetch_status` gives the result
        as often as it is asked. Does not block.
        """
        self._check_not_forked()
        result = self._check_task(task).result
        if result is None or task.told:
            return None
        task.told = True
        return result

    def wait_prefetch_status(self, task: PrefetchTask, timeout_s: float | None = None) -> PrefetchResult:
        """The result, when it is there. TimeoutError after ``timeout_s``; the prefetch goes on."""
        self._check_task(task)
        self._check_not_forked()
        if timeout_s is not None:
            _check_seconds(timeout_s, "timeout_s", least=0.0)
        if not task.over.wait(timeout_s):
            raise TimeoutError(f"{task!r} is not finished after {timeout_s} s")
        assert task.result is not None  # noqa: S101 # it is over
        return task.result

    def cancel_prefetch(self, task: PrefetchTask) -> PrefetchResult:
        """Ends a prefetch, and gives back all that it had taken, also when it had finished: hits is 0 then.

        Shares that a reader has claimed already stay that reader's. Waits a second at most for loads that cannot be
        interrupted; their slots are given back when they return.
        """
        self._check_open()
        self._check_task(task)
        self._controller.cancel(task)
        assert task.result is not None  # noqa: S101 # it is over
        return task.result

    @contextmanager
    def read_prefetched_results(self, keys: Keys, extra_count: int = 0) -> Iterator[ReadBatch]:
        """For one consumer that reads for all ranks: on leaving, one share of each of ranks 0 to ``extra_count`` is
        back, for every key, also after an exception.

        Reads under shares of its own, so the batch is as that of ``Cache.read``. ViewInUseError on leaving while a
        tensor, an array or a slice of a view is alive keeps these, and only these.
        """
        self._check_open()
        chain = self._l1.check_keys(keys)
        extra = self._l1.check_extra_count(extra_count)
        try:
            with self._l1.read(chain) as batch:
                yield batch
        finally:
            self._l1.give_back(chain, extra)

    # Store

    def store(self, keys: Keys) -> None:
        """Sends objects to L2 in the background, as far as they are readable, not temporary, and L2 does not have
        them. Waits only where too much is on its way already."""
        self._check_open()
        self._stores.put(self._l1.check_keys(keys))

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns when all that was to be stored is stored, or was given up. TimeoutError after ``timeout_s``."""
        self._check_open()
        if timeout_s is not None:
            _check_seconds(timeout_s, "timeout_s", least=0.0)
        self._stores.flush(timeout_s)

    # The end

    def close(self) -> None:
        """Cancels prefetches that run, finishes stores (but does not wait for an adapter that hangs), and closes the
        adapters. Shares that finished prefetches granted stay granted. Again, and in a forked child: nothing.

        An adapter that hangs keeps the object that it is at: until it returns, ``Cache.close`` raises ViewInUseError.
        """
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():
            return
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and self._pid == os.getpid() and not sys.is_finalizing():
            # Perhaps this is a thread that the end would wait for, or one that has a lock which that needs.
            threading.Thread(target=self._end, name="shmcache-end", daemon=True).start()
            warnings.warn(f"{self!r} was dropped without close", ResourceWarning, stacklevel=2, source=self)

    def _check_task(self, task: PrefetchTask) -> PrefetchTask:
        if not isinstance(task, PrefetchTask):
            raise TypeError(f"expected what submit_prefetch_task gave, got {shown(task)}")
        if task.owner is not self._controller:
            raise ValueError(f"expected a task of this StorageManager, got one of another: {shown(task)}")
        return task

    def _check_open(self) -> None:
        self._check_not_forked()
        if self._closed:
            raise errors.ClosedError(f"arena {self._l1.name!r}: this StorageManager is closed; make another")
        self._l1.check_open()

    def _check_not_forked(self) -> None:
        if self._pid != os.getpid():
            raise errors.ClosedError(
                f"arena {self._l1.name!r}: this StorageManager belongs to the process that this one was forked from; "
                "attach again, and make another"
            )


def _end(
    l1: L1,
    listener: Callable[[list[bytes]], None],
    controller: PrefetchController,
    stores: StoreQueue,
    adapters: list[L2Adapter],
) -> None:
    l1.ignore(listener)
    controller.close()
    stores.close()
    _close_all(adapters)


def _open_all(l2: Sequence[L2Adapter | str], l1: L1) -> list[L2Adapter]:
    """The adapters, open and bound to the arena; all of them, or none is left open."""
    if isinstance(l2, (str, bytes)) or not isinstance(l2, Sequence):
        raise TypeError(f"l2: expected a list of adapters or URLs, got {shown(l2)}")
    for adapter in l2:
        if not isinstance(adapter, (str, L2Adapter)):
            raise TypeError(f"l2: expected adapters (lookup, load, store, delete, close) or URLs, got {shown(adapter)}")
    adapters: list[L2Adapter] = []
    try:
        for adapter in l2:
            adapters.append(open_adapter(adapter) if isinstance(adapter, str) else adapter)
            if (bind := getattr(adapters[-1], "bind", None)) is not None:
                bind(l1.payload(), l1.count)
    except BaseException:
        _close_all(adapters)
        raise
    return adapters


def _close_all(adapters: list[L2Adapter]) -> None:
    for adapter in adapters:
        try:
            adapter.close()
        except Exception as error:  # noqa: BLE001 # whatever an adapter raises is its failure, and the others' none
            _log.warning("an L2 could not be closed: %s", describe(adapter, error))


def _check_count(value: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected int, got {shown(value)}")
    if not 1 <= value <= _MOST:
        raise ValueError(f"{what}: expected 1 to {_MOST}, got {shown(value)}")
    return value


def _check_seconds(value: float, what: str, *, least: float = 1e-3) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected seconds, got {shown(value)}")
    if not least <= value <= MAX_SECONDS:
        raise ValueError(f"{what}: expected {least:g} to {MAX_SECONDS:g} seconds, got {shown(value)}")
    return float(value)
