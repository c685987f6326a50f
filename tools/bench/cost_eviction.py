"""What it costs to evict an object, by CPU time, amortised over many: by evict, and by writes into a full arena.

Half of the objects, drawn at random, have been read, so that those that go lie anywhere. For the second, batches of 256
are reserved and published in a full arena, and then in the same arena after as many objects were evicted in advance;
the difference is what making room costs while one writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from cost_common import Cost, Point, Report, Run, alternate, arena, at_most, cost_of, lacks_room, matrix, write_all
from cost_objects import LANES, reserving
from cost_reading import BATCH, OBJECT

import shmcache

COUNTS = (1_024, 65_536, 1_048_576)
GOAL_COUNT, GOAL_NS = 65_536, 1000.0
MOST = 8_192  # objects that a repeat evicts
BATCHES = 8  # written a repeat, at most


def costs(repeats: int) -> Report:
    yield from _skipped()
    evicted, made = [], []
    for count in (one for one in COUNTS if lacks_room(one * OBJECT) is None):
        with _full(count) as cache:
            evicted.append(_evict_cost(cache, count, repeats))
            made += _write_costs(cache, count, repeats)
    yield evicted
    yield made


def _skipped() -> Iterator[str]:
    for count in COUNTS:
        reason = lacks_room(count * OBJECT)
        if reason is not None:
            yield f"eviction: not among {count:,} objects: {reason}"


@contextmanager
def _full(count: int) -> Iterator[shmcache.Cache]:
    with (
        arena(capacity=count * OBJECT, block_size=OBJECT, slots=count, lanes=LANES, regions=0) as name,
        shmcache.attach(name) as cache,
    ):
        keys = matrix(count)
        write_all(cache, keys, OBJECT)
        for batch in np.split(np.random.default_rng(1).permutation(keys)[: count // 2], count // 2 // BATCH):
            cache.touch(batch)
        yield cache


def _evict_cost(cache: shmcache.Cache, count: int, repeats: int) -> Cost:
    victims = min(MOST, count // 8)

    def work(_: object) -> None:
        if cache.evict(victims * OBJECT) != victims * OBJECT:
            raise RuntimeError(f"expected {victims:,} objects to be evicted; somebody else uses the arena")

    run = Run(work, [None], victims, lambda: write_all(cache, matrix(victims), OBJECT))
    alternate([run], repeats)
    return _cost(f"evict an eighth, at most {MOST:,}", run, count, judged=True)


def _write_costs(cache: shmcache.Cache, count: int, repeats: int) -> list[Cost]:
    batches = min(BATCHES, count // BATCH // 4)
    full, room = reserving(cache, batches), reserving(cache, batches)
    for _ in range(repeats + 1):
        full.once()
        cache.evict(batches * BATCH * OBJECT)
        room.once()
    difference = Run(full.work, [])
    difference.wall = [more - less for more, less in zip(full.wall, room.wall, strict=True)]
    difference.cpu = [more - less for more, less in zip(full.cpu, room.cpu, strict=True)]
    costs = [_cost("write, no room", full, count), _cost("write, room made before", room, count)]
    made = _cost("the difference: making room", difference, count, judged=True)
    made.best = max(0.0, costs[0].best - costs[1].best)  # the least difference is mere noise
    return [*costs, made]


def _cost(what: str, run: Run, count: int, *, judged: bool = False) -> Cost:
    goals = [at_most(GOAL_NS)] if judged and count == GOAL_COUNT else []
    return cost_of(f"{what}, {count:,} objects", "object", run, goals=goals, point=Point(what, count, "objects"))
