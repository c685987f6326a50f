"""What a key costs among 1,000 to 1,000,000 objects, and in arenas of 64 MiB to 8 GiB with the same objects.

All arenas are there at once and take their repeats in turn. Batches of 256 keys come from all objects in random order,
so that large arenas are read past what the processor's caches hold, or from a hot set of 1,000. What the same loops
in C (limits.c) lose with as many objects is what the caches allow. Payloads are neither filled nor touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import cost_limits
import numpy as np
from cost_common import (
    Cost,
    Point,
    Report,
    Run,
    Work,
    alternate,
    arena,
    compare,
    cost_of,
    lacks_room,
    matrix,
    no_more,
    write_all,
)
from cost_limits import LOOKUP, READ
from cost_reading import BATCH, OBJECT, read_and_release

import shmcache
from shmcache_tools.text import size_text

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
CAPACITIES = tuple(size << 20 for size in (64, 512, 8192))
FEW = 10_000  # objects in each of those
HOT = 1_000
BATCHES = 32  # a repeat
RESERVED = 4  # batches a repeat of those that evict
LANES = 8
WRITE = "reserve_write + publish, evicting"
MOST = 1.1  # times the cost in the smallest arena
LIMITS = {"lookup": LOOKUP, "read + release": READ}

Runs = dict[str, Run]  # by what is done


def costs(repeats: int) -> Report:
    yield from _by_objects(repeats)
    yield from _by_capacity(repeats)


def _by_objects(repeats: int) -> Report:
    counts = [count for count in COUNTS if lacks_room(sum(each for each in COUNTS if each <= count) * OBJECT) is None]
    if counts != list(COUNTS):
        yield f"objects: no more than {max(counts, default=0):,}: {lacks_room(sum(COUNTS) * OBJECT)}"
    if not counts:
        return
    with ExitStack() as stack:
        filled = {count: _filled(stack, count, count * OBJECT) for count in counts}
        tables = {count: stack.enter_context(cost_limits.table(keys)) for count, (_, keys) in filled.items()}
        limits = {count: _limits(table, filled[count][1]) for count, table in tables.items() if table is not None}
        reading = {count: _reading(cache, keys) for count, (cache, keys) in filled.items()}
        _alternate([*reading.values(), *limits.values()], repeats)
        yield _grown(reading, limits) + _grown(limits, {})
        writing = {count: {WRITE: _evicting(cache, count)} for count, (cache, _) in filled.items()}
        _alternate(list(writing.values()), repeats)
        yield _grown(writing, {})


def _by_capacity(repeats: int) -> Report:
    """Payload that no object has ever had takes no memory, but an arena wants it to be free."""
    capacities = [capacity for capacity in CAPACITIES if lacks_room(capacity + FEW * OBJECT) is None]
    if capacities != list(CAPACITIES):
        yield f"objects: no arena of {size_text(CAPACITIES[-1])}: {lacks_room(CAPACITIES[-1])}"
    if not capacities:
        return
    with ExitStack() as stack:
        reading = {capacity: _reading(*_filled(stack, FEW, capacity)) for capacity in capacities}
        _alternate(list(reading.values()), repeats)
        yield [_in(capacity, what, reading) for what in reading[capacities[0]] for capacity in capacities]


def _in(capacity: int, what: str, reading: Mapping[int, Runs]) -> Cost:
    """One line of the report, beside the same in the smallest arena."""
    smallest, name = min(reading), f"{what}, {FEW:,} objects in {size_text(capacity)}"
    point = Point(what, capacity, "bytes of capacity")
    if capacity == smallest:
        return _cost(name, reading[capacity][what], {}, point=point)
    side = size_text(smallest)
    sides, goals = {side: reading[smallest][what]}, [no_more(MOST, side)]
    return _cost(name, reading[capacity][what], sides, goals=goals, point=point)


def _filled(stack: ExitStack, count: int, capacity: int) -> tuple[shmcache.Cache, Any]:
    """So many objects of one block, in an arena that has slots for no more."""
    name = stack.enter_context(arena(capacity=capacity, block_size=OBJECT, slots=count, lanes=LANES, regions=0))
    cache = stack.enter_context(shmcache.attach(name))
    keys = matrix(count)
    write_all(cache, keys, OBJECT)
    return cache, keys


def _evicting(cache: shmcache.Cache, count: int) -> Run:
    """Among other objects, which nobody has read: what was read again and again would be kept before what is new."""
    cache.clear()
    write_all(cache, matrix(count), OBJECT)
    return reserving(cache, min(RESERVED, max(1, count // BATCH // 4)))


def _passes(keys: Any, batches: int) -> Iterator[Any]:
    """Over and over all keys in one random order, each time so many batches as one matrix."""
    shuffled = np.random.default_rng(1).permutation(keys)
    step = batches * BATCH
    if len(shuffled) < step:
        shuffled = np.tile(shuffled, (-(-step // len(shuffled)), 1))
    whole = len(shuffled) // step * step
    return itertools.cycle(np.split(shuffled[:whole], whole // step))


def _run(work: Work, keys: Any) -> Run:
    passes = _passes(keys, 1)
    return Run(lambda _: work(next(passes)), range(BATCHES), BATCH)


def _reading(cache: shmcache.Cache, keys: Any) -> Runs:
    read, hot = read_and_release(cache), keys[:HOT]
    return {
        "lookup": _run(cache.lookup, keys),
        "read + release": _run(read, keys),
        "lookup, hot set": _run(cache.lookup, hot),
        "read + release, hot set": _run(read, hot),
    }


def _limits(table: cost_limits.Table, keys: Any) -> Runs:
    runs = table.by_keys(_passes(keys, BATCHES), BATCHES * BATCH)
    return {name: runs[name] for name in (LOOKUP, READ)}


def reserving(cache: shmcache.Cache, batches: int) -> Run:
    """So many batches of new objects a repeat, each in an old one's place where there is no other."""
    items = fresh(batches)

    def renew() -> None:
        items[:] = fresh(batches)

    return Run(lambda keys: write_all(cache, keys, OBJECT), items, BATCH, renew)


def fresh(batches: int) -> list[Any]:
    """Keys that nobody had before."""
    return list(np.split(matrix(batches * BATCH), batches))


def _alternate(sets: Sequence[Runs], repeats: int) -> None:
    alternate([run for runs in sets for run in runs.values()], repeats)


def _grown(measured: Mapping[int, Runs], limits: Mapping[int, Runs]) -> list[Cost]:
    """A line for each thing that is done, beside the same among the fewest objects and beside its limit."""
    if not measured:
        return []
    first = min(measured)
    costs = []
    for what in measured[first]:
        limit = LIMITS.get(what, "")
        for count, runs in measured.items():
            sides = {} if count == first else {f"{first:,} objects": measured[first][what]}
            if limit in limits.get(count, {}):
                sides[limit] = limits[count][limit]
            costs.append(_cost(f"{what}, {count:,} objects", runs[what], sides, point=Point(what, count, "objects")))
    return costs


def _cost(name: str, run: Run, limits: Mapping[str, Run], **more: Any) -> Cost:
    return compare(cost_of(name, "key", run, **more), run, {}, limits)
