"""What tests of stores to L2 share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from storage_support import (
    SIZE,
    MemoryStore,
    Request,
    data_of,
    fill,
)

import shmcache
from shmcache import ArenaConfig, Cache, Status
from shmcache.storage import StorageManager
from shmcache.storage.l1 import L1

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NO_SPACE, LOCKED = Status.NO_SPACE, Status.LOCKED

JOB_KEYS = 16  #: stored by one call
TRIES = 4  #: of one job
SHORT_S = 0.2  #: after which a call counts as hung
WIDE = ArenaConfig("8MiB", block_size="4KiB", lanes=16)


def write(cache: Cache, keys: Sequence[bytes], nbytes: int = SIZE, *, temporary: bool = False) -> shmcache.WriteBatch:
    """Reserves objects and fills them with the right bytes."""
    batch = cache.reserve_write(keys, nbytes, temporary=temporary)
    assert batch.status == [OK] * len(keys)
    for key, view in zip(keys, batch.views, strict=True):
        assert view is not None
        view[:] = data_of(key, nbytes)
    return batch


def stored(store: MemoryStore) -> list[bytes]:
    """Every key that it was asked to store, as often as it was asked."""
    return sorted(key for keys in store.asked("store") for key in keys)


def check_has(store: MemoryStore, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """It has the right bytes of these and of nothing else."""
    assert sorted(store.objects) == sorted(keys)
    assert all(store.objects[key] == data_of(key, nbytes) for key in keys)


def counted(cache: Cache, *names: str) -> tuple[int, ...]:
    """Counters, each named without its ``l2_``."""
    counters = cache.stats().counters
    return tuple(getattr(counters, "l2_" + name) for name in names)


def quietly(cache: Cache, storage: StorageManager, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """Puts objects that the manager is not told of."""
    L1(cache).ignore(storage._listener)
    fill(cache, keys, nbytes)
    L1(cache).listen(storage._listener)


def once(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """A fault at the first call only."""
    left = [answer]
    return lambda request: left.pop()(request) if left else request.go_on()


def by_put(cache: Cache, keys: list[bytes]) -> None:
    fill(cache, keys)


def by_finish_write(cache: Cache, keys: list[bytes]) -> None:
    batch = write(cache, keys)
    assert cache.finish_write(keys) == [OK] * len(keys)
    assert batch.abort() == [EXISTS] * len(keys)


def by_finish_write_and_reserve_read(cache: Cache, keys: list[bytes]) -> None:
    batch = write(cache, keys)
    assert cache.finish_write_and_reserve_read(keys) == [OK] * len(keys)
    assert batch.abort() == [EXISTS] * len(keys)


def by_publish(cache: Cache, keys: list[bytes]) -> None:
    assert write(cache, keys).publish() == [OK] * len(keys)


def by_publish_and_reserve_read(cache: Cache, keys: list[bytes]) -> None:
    assert write(cache, keys).publish_and_reserve_read() == [OK] * len(keys)


def by_leaving_a_batch(cache: Cache, keys: list[bytes]) -> None:
    with write(cache, keys):
        pass


PUBLISHERS = [
    by_put,
    by_finish_write,
    by_finish_write_and_reserve_read,
    by_publish,
    by_publish_and_reserve_read,
    by_leaving_a_batch,
]
