"""The demo's prefetches: chains on their way into the arena, some requests ahead of the one that is handed out.

Each carries shares for all workers as soon as it is there. So prefetches ahead can take the room that the
request in front of them needs: then they are cancelled, and submitted again when their turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shmcache import Layout
from shmcache.storage import PrefetchResult, PrefetchTask, StorageManager

AHEAD = 4  #: requests

_POLL_S = 0.01


@dataclass(slots=True)
class Chain:
    """One request's chain; ``task`` is None while no prefetch is under way."""

    request: int
    keys: NDArray[np.uint8]
    task: PrefetchTask | None = None


class Prefetches:
    """The chains ahead, in the order of their requests."""

    def __init__(self, storage: StorageManager, layout: Layout, extra_count: int) -> None:
        self._storage = storage
        self._layout = layout
        self._extra_count = extra_count
        self._chains: deque[Chain] = deque()

    def __len__(self) -> int:
        return len(self._chains)

    def submit(self, request: int, keys: NDArray[np.uint8]) -> None:
        """Begin to bring a chain in."""
        self._chains.append(Chain(request, keys, self._begin(keys)))

    def next(self, on_wait: Callable[[], None]) -> tuple[Chain, PrefetchResult]:
        """The first chain, and what its prefetch achieved. ``on_wait`` is called often until it has."""
        chain = self._chains.popleft()
        task = chain.task or self._begin(chain.keys)
        while True:
            try:
                return chain, self._storage.wait_prefetch_status(task, _POLL_S)
            except TimeoutError:
                on_wait()

    def give_room(self) -> bool:
        """Cancel them all; whether there were any."""
        cancelled = False
        for chain in self._chains:
            if chain.task is not None:
                self._storage.cancel_prefetch(chain.task)
                chain.task = None
                cancelled = True
        return cancelled

    def _begin(self, keys: NDArray[np.uint8]) -> PrefetchTask:
        return self._storage.submit_prefetch_task(keys, self._layout, self._extra_count)
