"""What tests of prefetch share: to submit and wait, to consume what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arena_support import TIMEOUT_S, contents
from storage_support import (
    SIZE,
    data_of,
)

from shmcache import ArenaConfig, Cache, Status
from shmcache.storage import PrefetchResult, StorageManager

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT

RANKS = 4
TINY = ArenaConfig("16KiB", block_size="4KiB")  #: room for four objects of a block


def prefetch(
    storage: StorageManager, keys: Sequence[bytes], layout: Any = SIZE, extra_count: int = 0, **how: Any
) -> PrefetchResult:
    """Submits and waits."""
    task = storage.submit_prefetch_task(keys, layout, extra_count, **how)
    return storage.wait_prefetch_status(task, TIMEOUT_S)


def consume(cache: Cache, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """Reads the right bytes under this lane's reserved shares, and gives them back."""
    before = cache.stats().counters.claims
    with cache.read(keys) as batch:
        assert contents(batch) == [data_of(key, nbytes) for key in keys]
    assert cache.stats().counters.claims == before + len(keys)
