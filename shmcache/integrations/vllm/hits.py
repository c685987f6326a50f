"""What can be loaded for a request: found, fetched from L2, and granted to the ranks before vLLM is told of it.

A hit is told only once every rank has its reserved share, so that nobody can evict the object before all have loaded
it. vLLM may ask for a request as often as it likes, as a request that finds no room waits on: it is told of the same
shares again, and they are granted anew before their lease is over. Shares are the ranks' from the step on in which the
load is sent to them; before that, whatever ends the request gives them back.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import shmcache
from shmcache import Status
from shmcache.integrations.vllm.messages import Shape

if TYPE_CHECKING:
    from shmcache.integrations.vllm.counters import Counters
    from shmcache.integrations.vllm.tier import Tier
    from shmcache.storage.task import PrefetchTask

__all__ = ["Hits"]

_log = logging.getLogger("vllm.shmcache")


_MOST_PREFETCHES = 16  #: at a time; each has shares of what it has found, which nobody can evict meanwhile


@dataclass(slots=True)
class _Wanted:
    """What one request could load: leading ``keys``, of which ``hits`` are granted."""

    keys: list[bytes]
    since: float  # it is asked for, or its shares were granted, then or later
    hits: int = 0
    from_l2: int = 0
    queued: bool = False  # L2 is to be asked, once others are through
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
        self._lease_s = lease_s
        self._timeout_s = prefetch_timeout_s
        self._wanted: dict[str, _Wanted] = {}
        self._running = 0  # prefetches

    def waits(self, request_id: str) -> bool:
        """Whether ``find`` would say None. vLLM asks for every request of its queue in every step: so this is quick."""
        wanted = self._wanted.get(request_id)
        if wanted is None:
            return False
        if wanted.queued:
            return self._running >= _MOST_PREFETCHES and not self._is_overdue(wanted)
        return not self._is_settled(wanted)

    def find(self, request_id: str, keys: list[bytes]) -> int | None:
        """How many leading keys every rank has a share of; None while L2 is asked."""
        wanted = self._wanted.get(request_id)
        if wanted is not None and wanted.keys != keys:
            self.drop(request_id)
            wanted = None
        if not keys:
            return 0
        if wanted is None:
            wanted = self._wanted[request_id] = _Wanted(keys, time.monotonic())
            wanted.queued = self._tier is not None and self._cache.lookup(keys) < len(keys)
        if wanted.queued and self._is_overdue(wanted):
            self._go_without(wanted)
        elif wanted.queued and self._running < _MOST_PREFETCHES:
            self._prefetch(wanted)
        if wanted.queued or not self._is_settled(wanted):
            return None
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
        if wanted.task is not None:
            self._cancel(wanted)
        self._give_back(wanted)

    def _prefetch(self, wanted: _Wanted) -> None:
        assert self._tier is not None  # noqa: S101 # without, nothing is queued
        wanted.queued = False
        wanted.task = self._tier.prefetch(wanted.keys, self._shape.object_bytes, self._shape.ranks)
        self._running += 1
        self._counters.add(prefetches=1)

    def _is_settled(self, wanted: _Wanted) -> bool:
        """Whether no prefetch runs for it; one that is through, or takes too long, is settled here."""
        if wanted.task is None:
            return True
        assert self._tier is not None  # noqa: S101 # it has made the task
        result = self._tier.result(wanted.task)
        if result is not None:
            wanted.task = None
            self._running -= 1
            wanted.hits, wanted.from_l2 = result.hits, result.l2_hits
            if result.error is not None:
                _log.warning("a prefetch ended early: %s", result.error)
        elif self._is_overdue(wanted):
            self._cancel(wanted)
            self._go_without(wanted)
        return wanted.task is None

    def _is_overdue(self, wanted: _Wanted) -> bool:
        return time.monotonic() > wanted.since + self._timeout_s

    def _go_without(self, wanted: _Wanted) -> None:
        _log.warning("L2 has not answered within %s s; a request goes on without", self._timeout_s)
        self._counters.add(prefetch_timeouts=1)
        wanted.queued = False

    def _cancel(self, wanted: _Wanted) -> None:
        assert self._tier is not None and wanted.task is not None  # noqa: S101, PT018 # its callers looked
        self._tier.cancel(wanted.task)
        wanted.task = None
        self._running -= 1

    def _is_stale(self, wanted: _Wanted) -> bool:
        """The lease of its shares is half over, or the arena has more of its keys by now."""
        if wanted.hits and time.monotonic() > wanted.since + self._lease_s / 2:
            return True
        return wanted.hits < len(wanted.keys) and self._cache.lookup(wanted.keys[wanted.hits :]) > 0

    def _grant(self, wanted: _Wanted) -> None:
        """Grants what the arena has of the chain, and gives back what was granted before."""
        old = replace(wanted)
        there = wanted.keys[: self._cache.lookup(wanted.keys)]
        wanted.hits, wanted.since = 0, time.monotonic()
        granted = self._cache.reserve_read(there, self._extra_count) if there else []
        hits = next((i for i, code in enumerate(granted) if code is not Status.OK), len(granted))
        if behind_the_gap := [key for key, code in zip(there[hits:], granted[hits:], strict=True) if code is Status.OK]:
            self._cache.cancel_read(behind_the_gap, self._extra_count)
        wanted.hits = hits
        self._give_back(old)

    def _give_back(self, wanted: _Wanted) -> None:
        # Once the lease is over its shares may have been revoked, and those that are there be another request's.
        if wanted.hits and time.monotonic() < wanted.since + self._lease_s:
            self._cache.cancel_read(wanted.keys[: wanted.hits], self._extra_count)
