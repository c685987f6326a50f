"""The second tier as the scheduler's side uses it: nothing here makes the scheduler wait for L2."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Final

import shmcache
from shmcache.storage import StorageManager
from shmcache.storage.task import PrefetchResult, PrefetchTask

__all__ = ["Tier"]

_log = logging.getLogger("shmcache.vllm")

_BACKLOG: Final = 4096  #: batches of keys that may wait to be stored; what comes beyond is not stored


class Tier:
    """Prefetches by request, and stores in the background by a thread of its own, as L2 may make it wait."""

    def __init__(self, cache: shmcache.Cache, urls: tuple[str, ...]) -> None:
        self._manager = StorageManager(cache, urls, store=None)
        self._waiting: queue.Queue[list[bytes] | None] = queue.Queue(_BACKLOG)
        self._thread = threading.Thread(target=self._work, name="shmcache-vllm-store", daemon=True)
        self._thread.start()

    def prefetch(self, keys: list[bytes], nbytes: int, ranks: int) -> PrefetchTask:
        """Begins to make a chain of objects of ``nbytes`` readable, with a share of each for every rank."""
        return self._manager.submit_prefetch_task(keys, nbytes, ranks - 1)

    def result(self, task: PrefetchTask) -> PrefetchResult | None:
        """None while it runs; a result is told once."""
        return self._manager.query_prefetch_status(task)

    def cancel(self, task: PrefetchTask) -> None:
        """Gives back all that a prefetch has taken."""
        self._manager.cancel_prefetch(task)

    def store(self, keys: list[bytes]) -> int:
        """Objects to be stored some time: how many of them are not, as L2 does not keep up."""
        try:
            self._waiting.put_nowait(keys)
        except queue.Full:
            return len(keys)
        return 0

    def close(self) -> None:
        """Stores that have not begun are forgotten."""
        with self._waiting.mutex:
            self._waiting.queue.clear()
        self._waiting.put(None)
        self._manager.close()
        self._thread.join()

    def _work(self) -> None:
        while (keys := self._waiting.get()) is not None:
            try:
                self._manager.store(keys)
            except shmcache.ClosedError:
                return
            except shmcache.ShmcacheError as error:
                _log.warning("%d objects are not stored in L2: %s", len(keys), error)
