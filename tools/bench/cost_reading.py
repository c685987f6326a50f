"""What a key costs on the reading side: batches of 256 as list and as matrix, single keys, and beside them lmdb and the
limits.

The batches are drawn at random from all objects, so that a batch finds its slots no warmer than a scheduler's
would be. The payload is not touched: views are made and released, as lmdb's buffers are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cost_limits
import cost_peer
import numpy as np
from cost_common import (
    WIDTH,
    Cost,
    Goal,
    Report,
    Run,
    Work,
    alternate,
    arena,
    at_most,
    compare,
    cost_of,
    faster,
    new_keys,
    write_all,
)

import shmcache

BATCH = 256
BATCHES = 128  # a repeat
SINGLES = 2048  # a repeat
OBJECT = 4096  # bytes

# Ratios first: they travel, nanoseconds do not.
LOOKUP_GOALS = (faster(10, "lmdb get"), at_most(15.0))
GRANT_GOALS = (faster(10, "lmdb get"), at_most(25.0))
READ_GOALS = (faster(3, "lmdb get"), at_most(200.0))
SINGLE_GOALS = (at_most(1000.0),)

GRANTING = "reserve_read + finish_read"


class Row(NamedTuple):
    name: str
    run: Run
    goals: Sequence[Goal] = ()
    limits: Sequence[str] = ()


def costs(objects: int, repeats: int) -> Report:
    """A list of costs for each shape of keys, as it is measured."""
    keys = new_keys(objects)
    lists = [random.sample(keys, BATCH) for _ in range(BATCHES)]
    every = _matrix([key for batch in lists for key in batch])
    matrices = np.split(every, BATCHES)
    singles = [[key] for key in random.choices(keys, k=SINGLES)]
    with (
        arena(capacity=objects * OBJECT, block_size=OBJECT) as name,
        shmcache.attach(name) as cache,
        cost_peer.environment(objects * OBJECT) as env,
        cost_limits.table(_matrix(keys)) as table,
    ):
        write_all(cache, keys, OBJECT)
        if env is not None:
            cost_peer.fill(env, keys, bytes(OBJECT))
        limits = _limits(table, every)
        yield _measured(_batch_rows(cache, "matrix", matrices), _peers(env, lists), limits, repeats)
        yield _measured(_batch_rows(cache, "list", lists), _peers(env, lists), limits, repeats)
        calls = {} if table is None else table.calls(SINGLES)
        yield _measured(_single_rows(cache, singles), _peers(env, singles), calls, repeats)


def _matrix(keys: Sequence[bytes]) -> Any:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), WIDTH)


def _limits(table: cost_limits.Table | None, every: Any) -> dict[str, Run]:
    """The same keys, in batches as large."""
    if table is None:
        return {}
    slots = np.random.default_rng(1).integers(0, table.objects, len(every))
    return {**table.by_keys(itertools.repeat(every), len(every)), **table.by_slots(slots)}


def _peers(env: Any, batches: Sequence[list[bytes]]) -> dict[str, Run]:
    """lmdb's two ways to get all keys of a batch in one transaction."""
    if env is None:
        return {}
    units = len(batches[0])

    def run(get: Callable[[Any, Sequence[bytes]], None]) -> Run:
        return Run(lambda batch: get(env, batch), batches, units)

    return {"lmdb get": run(cost_peer.get_each), "lmdb getmulti": run(cost_peer.get_many)}


def grant_and_finish(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        cache.reserve_read(keys)
        cache.finish_read(keys)

    return work


def read_and_release(cache: shmcache.Cache) -> Work:
    def work(keys: Any) -> None:
        cache.read(keys).release()

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


def _batch_rows(cache: shmcache.Cache, shape: str, batches: Sequence[Any]) -> list[Row]:
    words = cost_limits.WORDS
    works: tuple[tuple[str, Work, Sequence[Goal], Sequence[str]], ...] = (
        ("lookup", cache.lookup, LOOKUP_GOALS, (cost_limits.LOOKUP,)),
        (GRANTING, grant_and_finish(cache), GRANT_GOALS, (cost_limits.GRANT, words)),
        ("read + release", read_and_release(cache), (), (cost_limits.READ, words)),
        ("read + views + release", _read_views(cache), READ_GOALS, (cost_limits.READ, words)),
    )
    return [
        Row(f"{what}, {BATCH} as {shape}", Run(work, batches, BATCH), goals, limits)
        for what, work, goals, limits in works
    ]


def _single_rows(cache: shmcache.Cache, singles: Sequence[list[bytes]]) -> list[Row]:
    one, two = (cost_limits.CALL,), (cost_limits.TWO_CALLS,)
    return [
        Row("with cache.read([key])", Run(_with_read(cache), singles), SINGLE_GOALS, two),
        Row("the same and its view", Run(_with_read_view(cache), singles), (), two),
        Row("lookup([key])", Run(cache.lookup, singles), (), one),
        Row(f"{GRANTING} of one key", Run(grant_and_finish(cache), singles), (), two),
    ]


def _measured(rows: Sequence[Row], peers: Mapping[str, Run], limits: Mapping[str, Run], repeats: int) -> list[Cost]:
    alternate([*(row.run for row in rows), *peers.values(), *limits.values()], repeats)
    return [
        compare(
            cost_of(row.name, "key", row.run, goals=row.goals),
            row.run,
            peers,
            {name: limits[name] for name in row.limits if name in limits},
        )
        for row in rows
    ]
