"""What one look at a large arena costs: by ``inspect``, as metrics, as the text of a scrape, beside bare reading.

The arena has many objects and lanes of one group that all hold shares and have some reserved. The limit is what no look
can beat: to read as many bytes of the same segment once as a look has to, by one sum of numpy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
from cost_common import Run, alternate, arena, write_all
from observe_engine import OBJECT, key_of
from prometheus_client import CollectorRegistry, generate_latest

import shmcache
from shmcache.metrics import Collector

LANES = 8
PART = 16  # each lane holds, and has reserved, one in so many of the objects
SLOT_BYTES, SHARE_BYTES, SINCE_BYTES = 128, 8, 4  # see native/layout.h
LOOKS = 10  # a repeat


@dataclass(frozen=True)
class Look:
    """One way to look. Times are nanoseconds."""

    name: str
    median: float
    best: float
    cpu: float
    times: float  # as much CPU time as the bare reading beside it


@contextmanager
def large_arena(objects: int) -> Iterator[str]:
    """Its name. It has room for one lane more."""
    keys = [key_of(number) for number in range(objects)]
    with ExitStack() as stack:
        name = stack.enter_context(arena(capacity=objects * OBJECT, block_size=OBJECT, lanes=LANES + 1))
        ranks = [_join(stack, name, rank) for rank in range(LANES)]
        write_all(ranks[0], keys, OBJECT)
        part = max(1, objects // PART)
        for number, rank in enumerate(ranks):
            stack.enter_context(rank.read(keys[number * part :][:part]))
        ranks[0].reserve_read(keys[-part:], extra_count=LANES - 1)
        yield name


def _join(stack: ExitStack, name: str, rank: int) -> shmcache.Cache:
    return stack.enter_context(shmcache.attach(name, group="engine", rank=rank, world_size=LANES))


def scrape_of(*names: str) -> Callable[[], bytes]:
    """What a Prometheus server causes by each of its scrapes, HTTP apart."""
    registry = CollectorRegistry()
    registry.register(Collector(*names))
    return lambda: generate_latest(registry)


def looks(objects: int, repeats: int, tick: Callable[[], object]) -> list[Look]:
    """Each way to look, and the bare reading last. ``tick`` is called after each repeat."""
    with large_arena(objects) as name, _segment(name) as segment:
        stats = shmcache.inspect(name).stats
        assert stats is not None  # noqa: S101 # the arena is ours
        if (stats.objects, stats.lanes_alive) != (objects, LANES) or not stats.held or not stats.reserved:
            raise RuntimeError(f"the arena is not as it should be: {stats}")
        nbytes = objects * (SLOT_BYTES + LANES * SHARE_BYTES) + stats.held * SINCE_BYTES
        words = segment[: nbytes // 8]
        collector, scrape = Collector(name), scrape_of(name)
        works = {
            "inspect": lambda: shmcache.inspect(name),
            "Collector.collect": collector.collect,
            "a scrape: its text, too": scrape,
            f"reading {nbytes / 1e6:.1f} MB once": lambda: int(words.sum()),
        }
        runs = {what: Run(_ignoring(work), range(LOOKS)) for what, work in works.items()}
        alternate(list(runs.values()), 1)
        for run in runs.values():
            run.forget()
        for _ in range(repeats):
            for run in runs.values():
                run.once()
            tick()
        return _compared(runs)


def _ignoring(work: Callable[[], object]) -> Callable[[object], object]:
    return lambda _: work()


def _compared(runs: dict[str, Run]) -> list[Look]:
    *_, limit = runs.values()
    return [
        Look(what, median(run.wall), min(run.wall), median(run.cpu), _times(run, limit)) for what, run in runs.items()
    ]


def _times(run: Run, limit: Run) -> float:
    return median(ours / theirs for ours, theirs in zip(run.cpu, limit.cpu, strict=True))


@contextmanager
def _segment(name: str) -> Iterator[np.ndarray]:
    """The segment's words, read-only."""
    fd = os.open(shmcache.inspect(name).path, os.O_RDONLY)
    try:
        mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    yield np.frombuffer(mapped, np.uint64)
