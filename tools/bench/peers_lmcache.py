"""LMCache's L1 manager, in its own process: reserve_read, the views, finish_read; and for N ranks so many read locks.

It serves one process, with a lock and a dict of Python, so there are no readers of other processes to compare. It is
not in the extra ``peers``, for its package wants CUDA's; it runs on a host without a GPU nevertheless.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peers_common import FOOTPRINT, Missing, Store, System, Work

_TAG = "bench"
_QUIET = {"LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}


class LMCache(System):
    name = "LMCache L1"
    about = "LMCache's L1Manager within one process: read locks and views; a put over is a delete and a put"
    api: Any
    torch: Any

    def start(self) -> None:
        os.environ.update(_QUIET)  # read at import
        try:
            self.manager = import_module("lmcache.v1.distributed.l1_manager")
            self.config = import_module("lmcache.v1.distributed.config")
            self.api = import_module("lmcache.v1.distributed.api")
            self.torch = import_module("torch")
        except ImportError as error:
            raise Missing(f"needs LMCache: pip install lmcache ({error})") from None

    def key(self, key: bytes) -> Any:
        return self.api.ObjectKey(key, "model", 0)

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        # Room for lists of free memory, and whole pages.
        room = len(keys) * len(value) + FOOTPRINT + (16 << 20)
        name = f"shmcache-bench-{os.getpid()}-{secrets.token_hex(4)}"
        memory = self.config.L1MemoryManagerConfig(room, use_lazy=False, shm_name=name)
        manager = self.manager.L1Manager(self.config.L1ManagerConfig(memory))
        try:
            for key in keys:
                self._put(manager, value, self.key(key))
            yield self._store(manager, value)
        finally:
            manager.clear(force=True)
            manager.close()

    def _store(self, manager: Any, value: bytes) -> Store:
        def put(key: Any) -> None:
            self._put(manager, value, key)

        def put_over(key: Any) -> None:
            manager.delete([key])
            self._put(manager, value, key)

        def hits(keys: Any) -> bool:
            views = [memory.byte_array for _, memory in manager.reserve_read(keys).values()]
            manager.finish_read(keys)
            return None not in views

        works: dict[str, Work] = {
            "hit": lambda key: hits([key]),
            "hits": hits,
            "miss": lambda key: manager.reserve_read([key]),
            "misses": manager.reserve_read,
            "put_new": put,
            "put_over": put_over,
        }
        return Store(works, manager.delete, self.key, lambda ranks: _cycle(manager, ranks))

    def _put(self, manager: Any, value: bytes, key: Any) -> None:
        layout = self.api.MemoryLayoutDesc([self.torch.Size([len(value)])], [self.torch.uint8])
        _, memory = manager.reserve_write([key], [False], layout, _TAG)[key]
        memory.byte_array.cast("B")[:] = value
        manager.finish_write([key], _TAG)


@contextmanager
def _cycle(manager: Any, ranks: int) -> Iterator[Work]:
    """The prefetch takes a read lock for each rank; each rank looks at the values and gives its own back."""

    def work(keys: Any) -> None:
        manager.reserve_read(keys, ranks)
        for _ in range(ranks):
            views = [memory.byte_array for _, memory in manager.unsafe_read(keys).values()]
            del views
            manager.finish_read(keys)

    yield work
