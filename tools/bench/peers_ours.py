"""shmcache itself, by the same protocol as its peers: one cache, and a group of ranks for the cycle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cost_common import arena
from peers_common import FOOTPRINT, OURS, Store, System, Work

import shmcache

BLOCK = 64 << 10


class Ours(System):
    name = OURS
    about = "read in place: shares claimed, views in hand, shares given back; a put over is a delete and a put"
    module = "peers_ours"

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        block = min(len(value), BLOCK)
        room = len(keys) * len(value) + FOOTPRINT
        with arena(capacity=room, block_size=block, slots=room // len(value)) as name, shmcache.attach(name) as cache:
            for key in keys:
                _check(cache.put(key, value))
            works: dict[str, Work] = {
                "hit": _read_one(cache),
                "hits": _read_many(cache),
                "miss": lambda key: cache.lookup([key]),
                "misses": cache.status,
                "put_new": lambda key: _check(cache.put(key, value)),
                "put_over": _put_over(cache, value),
            }
            yield Store(works, forget=cache.delete, cycle=lambda ranks: _cycle(name, ranks), address=name)


@contextmanager
def join(address: str) -> Iterator[Work]:
    with shmcache.attach(address) as cache:
        yield _read_one(cache)


def _read_one(cache: shmcache.Cache) -> Work:
    def work(key: bytes) -> bool:
        with cache.read([key]) as batch:
            return batch.views[0] is not None

    return work


def _read_many(cache: shmcache.Cache) -> Work:
    def work(keys: Sequence[bytes]) -> None:
        with cache.read(keys) as batch:
            batch.views  # noqa: B018 # made at the first look

    return work


def _put_over(cache: shmcache.Cache, value: bytes) -> Work:
    def work(key: bytes) -> None:
        cache.delete([key])
        _check(cache.put(key, value))

    return work


@contextmanager
def _cycle(name: str, ranks: int) -> Iterator[Work]:
    """The scheduler grants a share of each object to each rank; each rank claims its own, looks, and gives it back."""
    group = f"cycle-{ranks}"
    with ExitStack() as stack:
        scheduler = stack.enter_context(shmcache.attach(name, group=group, world_size=ranks))
        workers = [
            stack.enter_context(shmcache.attach(name, group=group, rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        reads = [_read_many(worker) for worker in workers]

        def work(keys: Any) -> None:
            scheduler.reserve_read(keys, extra_count=ranks - 1)
            for read in reads:
                read(keys)

        yield work


def _check(status: shmcache.Status) -> None:
    if status:
        raise RuntimeError(f"expected every write to succeed, got {status.name}")
