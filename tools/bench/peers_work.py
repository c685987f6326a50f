"""The workloads: what each system is asked to do, how much of it a repeat, and in which order.

The systems take their repeats in turn, all on one host in one run. A repeat takes some milliseconds, so a slow system
does less in it; what is compared is the time for one unit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import peers_readers
from cost_common import Run, alternate, new_keys
from peers_common import BATCH, FOOTPRINT, Finding, Store, System, Work, found
from peers_loop import READERS, Timing

SIZES = {"4 KiB": 4 << 10, "256 KiB": 256 << 10, "4 MiB": 4 << 20}
READ_BYTES = 256 << 10  # an object of the readers
CYCLE_BYTES, CYCLE_BATCH = 256 << 10, 32
RANKS = (1, 2, 4, 8)
READER_COUNTS = (1, 2, READERS)


@dataclass(frozen=True)
class Workload:
    """A table of the report."""

    name: str
    title: str
    unit: str
    short: str  # over a panel of the plot


FEW = f"{BATCH} keys ({FOOTPRINT // SIZES['4 MiB']} of 4 MiB)"
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("hit", "hit: one key, its value in hand and given back", "hit", "hit, one key"),
        Workload("hits", f"hits in a batch of {FEW}", "key", f"hits in a batch of {BATCH}, a key"),
        Workload("miss", "miss: one key that is not there", "miss", "miss, one key"),
        Workload("misses", f"misses in a batch of {FEW}", "key", f"misses in a batch of {BATCH}, a key"),
        Workload("put_new", "put of a new object", "put", "put of a new object"),
        Workload("put_over", "put over an old object", "put", "put over an old object"),
        Workload(
            "readers_same",
            "readers, a process each, of one object of 256 KiB",
            "hit",
            "N readers of one object, CPU a hit",
        ),
        Workload(
            "readers_apart",
            "readers, a process each, of an object of 256 KiB each",
            "hit",
            "N readers, an object each, CPU a hit",
        ),
        Workload(
            "cycle",
            f"grant, read, release: {CYCLE_BATCH} objects of 256 KiB, N ranks",
            "cycle",
            f"grant, read, release: {CYCLE_BATCH} objects, N ranks",
        ),
    )
}
ALONE = ("hit", "hits", "miss", "misses", "put_new", "put_over")
TOGETHER = ("readers_same", "readers_apart")


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    repeats: int
    warm_up: int
    repeat_s: float  # that a repeat of one system should take
    room_s: float
    reader_repeats: int
    reader_s: float


FULL = Effort(repeats=17, warm_up=2, repeat_s=0.005, room_s=0.5, reader_repeats=7, reader_s=0.06)
QUICK = Effort(repeats=5, warm_up=1, repeat_s=0.002, room_s=0.15, reader_repeats=3, reader_s=0.03)

Tell = Callable[[str], None]


def measure(systems: Sequence[System], names: Sequence[str], effort: Effort, tell: Tell) -> Iterator[list[Finding]]:
    """The findings of some tables at a time, as they are measured. ``tell`` is told what is going on."""
    alone = [name for name in names if name in ALONE]
    if alone:
        yield [
            finding for column, size in SIZES.items() for finding in _alone(systems, alone, column, size, effort, tell)
        ]
    together = [name for name in names if name in TOGETHER]
    if together:
        yield list(_together(systems, together, effort, tell))
    if "cycle" in names:
        yield list(_cycles(systems, effort, tell))


def _opened(stack: ExitStack, systems: Sequence[System], keys: Sequence[bytes], size: int) -> dict[System, Store]:
    value = random.Random(1).randbytes(size)
    return {system: stack.enter_context(system.store(keys, value)) for system in systems}


# One process


def _alone(
    systems: Sequence[System], names: Sequence[str], column: str, size: int, effort: Effort, tell: Tell
) -> Iterator[Finding]:
    keys = new_keys(min(BATCH, FOOTPRINT // size))
    with ExitStack() as stack:
        tell(f"{column}: filling")
        stores = _opened(stack, systems, keys, size)
        if any(name.startswith("put") for name in names):
            for store in stores.values():
                _go_through_room(store, size, effort)
        for name in names:
            runs = {
                system: _run(name, store, keys, size, effort) for system, store in stores.items() if name in store.works
            }
            tell(f"{WORKLOADS[name].title.partition(':')[0]}, {column}")
            alternate(list(runs.values()), effort.repeats, effort.warm_up)
            yield from found(name, column, runs)


def _run(name: str, store: Store, keys: Sequence[bytes], size: int, effort: Effort) -> Run:
    work = store.works[name]
    if name == "put_new":
        return _run_of_new(store, FOOTPRINT // size // 2, effort)
    wanted = new_keys(len(keys)) if name in {"miss", "misses"} else keys
    native = [store.native(key) for key in wanted]
    if name == "hit" and not work(native[0]):
        raise RuntimeError("expected a hit, and there was none")
    if name in {"hits", "misses"}:
        batches = [random.sample(native, len(native)) for _ in range(8)]
        return Run(work, _repeated(work, batches, effort), len(native))
    return Run(work, _repeated(work, native, effort))


def _repeated(work: Work, items: Sequence[Any], effort: Effort) -> list[Any]:
    """As many items, in turn, as a repeat has time for."""
    times = []
    for item in (items * 3)[:3]:
        began = time.perf_counter()
        work(item)
        times.append(time.perf_counter() - began)
    count = min(2048, max(1, int(effort.repeat_s / median(times))))
    return [items[i % len(items)] for i in range(count)]


def _go_through_room(store: Store, size: int, effort: Effort) -> None:
    """Writes to all free memory once, as far as there is CPU time: its pages are there when the clock runs."""
    if "put_new" in store.works:
        until = time.process_time() + effort.room_s
        done = []
        for key in map(store.native, new_keys(FOOTPRINT // size)):
            if time.process_time() > until:
                break
            store.works["put_new"](key)
            done.append(key)
        store.forget(done)


def _run_of_new(store: Store, most: int, effort: Effort) -> Run:
    """New objects in free room, which are taken away again after each repeat."""
    keys = [store.native(key) for key in new_keys(min(most, 2048))]
    store.works["put_new"](keys[0])
    began = time.perf_counter()
    store.works["put_new"](keys[1])
    count = max(2, int(effort.repeat_s / (time.perf_counter() - began)))
    store.forget(keys[:2])
    return Run(store.works["put_new"], keys[:count], restore=lambda: store.forget(keys[:count]))


# Readers in processes of their own


def _together(systems: Sequence[System], names: Sequence[str], effort: Effort, tell: Tell) -> Iterator[Finding]:
    keys = new_keys(READERS)
    with ExitStack() as stack:
        tell("readers: starting")
        stores = _opened(stack, [system for system in systems if not system.limit], keys, READ_BYTES)
        reads = _reads(stack, stores)
        for name in names:
            for count in READER_COUNTS:
                column = f"{count} reader{'s' * (count > 1)}"
                tell(f"{WORKLOADS[name].title.partition(' of ')[0]}: {column}")
                wanted = keys[:1] * count if name == "readers_same" else keys[:count]
                yield from found(name, column, _read_in_turn(reads, wanted, effort))


Read = Callable[[Sequence[bytes], float], list[Timing]]


def _reads(stack: ExitStack, stores: dict[System, Store]) -> dict[System, Read]:
    joined = {system.module: store.address for system, store in stores.items() if system.module}
    crew = stack.enter_context(peers_readers.crew(joined))
    reads: dict[System, Read] = {}
    for system, store in stores.items():
        own = system.crew(store)
        if own is not None:
            reads[system] = stack.enter_context(own).read
        elif system.module:
            reads[system] = lambda keys, lasts_s, module=system.module: crew.read(module, keys, lasts_s)
    return reads


def _read_in_turn(reads: dict[System, Read], keys: Sequence[bytes], effort: Effort) -> dict[System, Run]:
    """A run whose times are the mean over the readers of a repeat."""
    runs = {system: Run(lambda _: None, ()) for system in reads}
    for repeat in range(effort.reader_repeats + 1):
        for system, read in reads.items():
            timings = read(keys, effort.reader_s)
            if repeat:  # the first warms up
                runs[system].wall.append(sum(timing.wall for timing in timings) / len(timings))
                runs[system].cpu.append(sum(timing.cpu for timing in timings) / len(timings))
    return runs


# The cycle


def _cycles(systems: Sequence[System], effort: Effort, tell: Tell) -> Iterator[Finding]:
    """One process plays the scheduler and all ranks: what is compared is their work, not who wakes whom."""
    keys = new_keys(CYCLE_BATCH)
    with ExitStack() as stack:
        stores = _opened(stack, systems, keys, CYCLE_BYTES)
        for ranks in RANKS:
            tell(f"cycle: {ranks} ranks")
            with ExitStack() as cycles:
                runs = {}
                for system, store in stores.items():
                    if store.cycle is not None:
                        work = cycles.enter_context(store.cycle(ranks))
                        batch = [store.native(key) for key in keys]
                        runs[system] = Run(work, _repeated(work, [batch], effort))
                alternate(list(runs.values()), effort.repeats, effort.warm_up)
                yield from found("cycle", f"TP {ranks}", runs)
