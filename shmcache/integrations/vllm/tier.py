"""The second tier as the scheduler's side uses it: nothing here makes the scheduler wait for L2."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

import shmcache
from shmcache.storage import StorageManager
from shmcache.storage.task import PrefetchResult, PrefetchTask

__all__ = ["Tier"]

_log = logging.getLogger("vllm.shmcache")

_BACKLOG: Final = 4096  #: batches of keys that may wait to be stored; what comes beyond is not stored


class Tier:
    """Prefetches by request, and stores in the background. What L2 may make one wait for, threads wait for."""

    def __init__(self, cache: shmcache.Cache, urls: tuple[str, ...]) -> None:
        self._manager = StorageManager(cache, urls, store=None)
        self._stores = _Line("shmcache-vllm-store", _BACKLOG)
        self._ends = _Line("shmcache-vllm-cancel")

    def prefetch(self, keys: list[bytes], nbytes: int, ranks: int) -> PrefetchTask:
        """Begins to make a chain of objects of ``nbytes`` readable, with a share of each for every rank."""
        return self._manager.submit_prefetch_task(keys, nbytes, ranks - 1)

    def result(self, task: PrefetchTask) -> PrefetchResult | None:
        """None while it runs; a result is told once."""
        return self._manager.query_prefetch_status(task)

    def cancel(self, task: PrefetchTask) -> None:
        """All that a prefetch has taken will be given back."""
        self._ends.put(partial(self._manager.cancel_prefetch, task))

    def store(self, keys: list[bytes]) -> int:
        """Objects to be stored some time: how many of them are not, as L2 does not keep up."""
        return 0 if self._stores.put(partial(self._manager.store, keys)) else len(keys)

    def close(self) -> None:
        """Stores that have not begun are forgotten."""
        self._stores.end()
        self._ends.end()
        self._manager.close()


class _Line:
    """Calls that a thread makes one after the other. It is a daemon: nobody's exit waits for a call."""

    def __init__(self, name: str, most: int = 0) -> None:
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(most)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, call: Callable[[], object]) -> bool:
        """False: there are too many already."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def end(self) -> None:
        """Calls that have not begun are never made."""
        with self._calls.mutex:
            self._calls.queue.clear()
            self._calls.queue.append(None)
            self._calls.not_empty.notify()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except shmcache.ClosedError:
                return
            except Exception:  # noqa: BLE001 # an adapter's, say: it costs this call alone
                _log.exception("L2")
