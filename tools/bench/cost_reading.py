"""What a key costs on the reading side: batches of 256 as list and as matrix, single keys, and lmdb beside them.

The batches are drawn at random from all objects, so that a batch finds its slots no warmer than a scheduler's
would be. The payload is not touched: views are made and released, as lmdb's buffers are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cost_peer
import numpy as np
from cost_common import WIDTH, Cost, Run, Work, alternate, arena, compare, cost_of, new_keys, write_all

import shmcache

BATCH = 256
BATCHES = 128  # a repeat
SINGLES = 2048  # a repeat
OBJECT = 4096  # bytes

LOOKUP_GOAL = 50.0
GRANT_GOAL = 50.0
READ_GOAL = 250.0
SINGLE_GOAL = 1500.0


def costs(objects: int, repeats: int) -> Iterator[list[Cost]]:
    """A list of costs for each shape of keys, as it is measured."""
    keys = new_keys(objects)
    lists = [random.sample(keys, BATCH) for _ in range(BATCHES)]
    matrices = [np.frombuffer(b"".join(batch), np.uint8).reshape(BATCH, WIDTH) for batch in lists]
    singles = [[key] for key in random.choices(keys, k=SINGLES)]
    with (
        arena(capacity=objects * OBJECT, block_size=OBJECT) as name,
        shmcache.attach(name) as cache,
        cost_peer.environment(objects * OBJECT) as env,
    ):
        write_all(cache, keys, OBJECT)
        if env is not None:
            cost_peer.fill(env, keys, bytes(OBJECT))
        yield _batch_costs(cache, "list", lists, _peers(env, lists), repeats)
        yield _batch_costs(cache, "matrix", matrices, _peers(env, lists), repeats)
        yield _single_costs(cache, singles, _peers(env, singles), repeats)


def _peers(env: Any, batches: Sequence[list[bytes]]) -> dict[str, Run]:
    """lmdb's two ways to get all keys of a batch in one transaction."""
    if env is None:
        return {}
    units = len(batches[0])

    def run(get: Callable[[Any, Sequence[bytes]], None]) -> Run:
        return Run(lambda batch: get(env, batch), batches, units)

    return {"lmdb get": run(cost_peer.get_each), "lmdb getmulti": run(cost_peer.get_many)}


def _grant_and_finish(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        cache.reserve_read(keys)
        cache.finish_read(keys)

    return work


def _read_views(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        batch = cache.read(keys)
        batch.views  # noqa: B018 # made at the first look
        batch.release()

    return work


def _with_read(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        with cache.read(keys):
            pass

    return work


def _with_read_view(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        with cache.read(keys) as batch:
            batch.views[0]

    return work


def _batch_costs(
    cache: shmcache.Cache, shape: str, batches: Sequence[Any], peers: dict[str, Run], repeats: int
) -> list[Cost]:
    works = (
        ("lookup", cache.lookup, LOOKUP_GOAL),
        ("reserve_read + finish_read", _grant_and_finish(cache), GRANT_GOAL),
        ("read + views + release", _read_views(cache), READ_GOAL),
    )
    labelled = [(f"{what}, {BATCH} as {shape}", Run(work, batches, BATCH), goal) for what, work, goal in works]
    return _measured(labelled, peers, repeats)


def _single_costs(
    cache: shmcache.Cache, singles: Sequence[list[bytes]], peers: dict[str, Run], repeats: int
) -> list[Cost]:
    works = (
        ("with cache.read([key])", _with_read(cache), SINGLE_GOAL),
        ("the same and its view", _with_read_view(cache), None),
        ("lookup([key])", cache.lookup, None),
        ("reserve_read + finish_read of one key", _grant_and_finish(cache), None),
    )
    return _measured([(what, Run(work, singles), goal) for what, work, goal in works], peers, repeats)


def _measured(labelled: Sequence[tuple[str, Run, float | None]], peers: dict[str, Run], repeats: int) -> list[Cost]:
    alternate([*(run for _, run, _ in labelled), *peers.values()], repeats)
    measured = []
    for label, run, goal in labelled:
        cost = cost_of(label, "key", run, goal=goal)
        for peer, theirs in peers.items():
            compare(cost, peer, run, theirs)
        measured.append(cost)
    return measured
