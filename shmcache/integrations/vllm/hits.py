"""What can be loaded for a request: found, fetched from L2, and granted to the ranks before vLLM is told of it.

A hit is told only once every rank has its reserved share, so that nobody can evict the object before all have loaded
it. vLLM may ask for a request as often as it likes, as a request that finds no room waits on: it is told of the same
shares again, and they are granted anew before their lease is over. Shares are the ranks' from the step on in which the
load is sent to them; before that, whatever ends the request gives them back.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import shmcache
from shmcache import Status
from shmcache.integrations.vllm.messages import Shape

if TYPE_CHECKING:
    from shmcache.integrations.vllm.counters import Counters
    from shmcache.integrations.vllm.tier import Tier
    from shmcache.storage.task import PrefetchTask

__all__ = ["Hits"]

_log = logging.getLogger("shmcache.vllm")


@dataclass(slots=True)
class _Wanted:
    """What one request could load: leading ``keys``, of which ``hits`` are granted."""

    keys: list[bytes]
    since: float
    hits: int = 0
    from_l2: int = 0
    task: PrefetchTask | None = None  # running: then nothing is granted but what it grants


class Hits:
    """Of the requests that wait: which shares are granted for them, and which prefetches run."""

    def __init__(
        self,
        cache: shmcache.Cache,
        shape: Shape,
        tier: Tier | None,
        counters: Counters,
        *,
        lease_s: float,
        prefetch_timeout_s: float,
    ) -> None:
        self._cache = cache
        self._shape = shape
        self._extra_count = shape.ranks - 1
        self._tier = tier
        self._counters = counters
        self._renew_s = lease_s / 2
        self._timeout_s = prefetch_timeout_s
        self._wanted: dict[str, _Wanted] = {}

    def find(self, request_id: str, keys: list[bytes]) -> int | None:
        """How many leading keys every rank has a share of; None while L2 is asked."""
        wanted = self._wanted.get(request_id)
        if wanted is not None and wanted.keys != keys:
            self.drop(request_id)
            wanted = None
        if wanted is None:
            return self._begin(request_id, keys)
        if wanted.task is not None:
            return self._ask(wanted)
        if self._is_stale(wanted):
            self._grant(wanted)
        return wanted.hits

    def take(self, request_id: str, count: int) -> int:
        """The request will load ``count`` keys: their shares are the ranks' now, the others are given back. How many of
        the ``count`` came from L2."""
        wanted = self._wanted.get(request_id)
        if wanted is None:
            return 0
        kept, wanted.keys = wanted.keys[:count], wanted.keys[count:]
        wanted.hits -= min(wanted.hits, len(kept))
        self.drop(request_id)
        return min(wanted.from_l2, len(kept))

    def drop(self, request_id: str) -> None:
        """The request loads nothing: all shares are given back, a prefetch ends."""
        wanted = self._wanted.pop(request_id, None)
        if wanted is None:
            return
        if wanted.task is not None and self._tier is not None:
            self._tier.cancel(wanted.task)
        self._give_back(wanted)

    def _begin(self, request_id: str, keys: list[bytes]) -> int | None:
        wanted = _Wanted(keys, time.monotonic())
        self._wanted[request_id] = wanted
        if self._tier is None or self._cache.lookup(keys) == len(keys):
            self._grant(wanted)
            return wanted.hits
        wanted.task = self._tier.prefetch(keys, self._shape.object_bytes, self._shape.ranks)
        self._counters.add(prefetches=1)
        return self._ask(wanted)

    def _ask(self, wanted: _Wanted) -> int | None:
        """Whether the prefetch is through."""
        assert wanted.task is not None and self._tier is not None  # noqa: S101, PT018 # its callers looked
        result = self._tier.result(wanted.task)
        if result is None and time.monotonic() < wanted.since + self._timeout_s:
            return None
        task, wanted.task, wanted.since = wanted.task, None, time.monotonic()
        if result is None:
            _log.warning("L2 has not answered within %s s; a request goes on without", self._timeout_s)
            self._counters.add(prefetch_timeouts=1)
            self._tier.cancel(task)
            self._grant(wanted)
        else:
            wanted.hits, wanted.from_l2 = result.hits, result.l2_hits
            if result.error is not None:
                _log.warning("a prefetch ended early: %s", result.error)
        return wanted.hits

    def _is_stale(self, wanted: _Wanted) -> bool:
        """The lease of its shares is half over, or the arena has more of its keys by now."""
        if wanted.hits and time.monotonic() > wanted.since + self._renew_s:
            return True
        return wanted.hits < len(wanted.keys) and self._cache.lookup(wanted.keys[wanted.hits :]) > 0

    def _grant(self, wanted: _Wanted) -> None:
        """Grants what the arena has of the chain, and gives back what was granted before."""
        before, wanted.hits = wanted.hits, 0
        there = wanted.keys[: self._cache.lookup(wanted.keys)]
        wanted.since = time.monotonic()
        granted = self._cache.reserve_read(there, self._extra_count) if there else []
        hits = next((i for i, code in enumerate(granted) if code is not Status.OK), len(granted))
        behind_the_gap = [key for key, code in zip(there[hits:], granted[hits:], strict=True) if code is Status.OK]
        for keys in (behind_the_gap, wanted.keys[:before]):
            if keys:
                self._cache.cancel_read(keys, self._extra_count)
        wanted.hits = hits

    def _give_back(self, wanted: _Wanted) -> None:
        if wanted.hits:
            self._cache.cancel_read(wanted.keys[: wanted.hits], self._extra_count)
