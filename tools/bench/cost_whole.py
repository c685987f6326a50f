"""What an arena as a whole costs: to attach to it, its memory, and to go on after a death with the arena lock held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cost_holder
import cost_pages
from cost_common import Cost, Goal, Report, Run, arena, at_most, cost_of, write_all

import shmcache

ATTACH_GOALS = (at_most(2e6),)  # nanoseconds
DEATH_GOALS = (at_most(20e6),)
OBJECTS = 65536
BLOCK = 4096  # bytes
SPARE = 64  # blocks and slots for what is written during the measurement
HOLDER = Path(cost_holder.__file__)


def attach_costs(repeats: int) -> list[Cost]:
    """To attach to an arena of 4 GiB, and to have a first view of an object in it as well."""
    with arena(capacity="4GiB") as name:
        with shmcache.attach(name) as cache:
            cache.put(b"first", bytes(4096))
        return [
            _attach_cost(name, "attach to 4 GiB", lambda _: None, repeats, ATTACH_GOALS),
            _attach_cost(name, "the same and a first view", _first_view, repeats, ()),
        ]


def _first_view(cache: shmcache.Cache) -> None:
    with cache.read([b"first"]) as batch:
        batch.views[0]


def _attach_cost(
    name: str, label: str, then: Callable[[shmcache.Cache], None], repeats: int, goals: Sequence[Goal]
) -> Cost:
    caches: list[shmcache.Cache] = []

    def work(_: object) -> None:
        caches.append(shmcache.attach(name))
        then(caches[-1])

    run = Run(work, [None], restore=lambda: caches.pop().close())
    for _ in range(repeats):
        run.once()
    return cost_of(label, "attach", run, goals=goals, by_cpu=False)


def death_costs(repeats: int) -> list[Cost]:
    """The first put after a lock holder's death, which steals the lock and rebuilds what is derived from the slots;
    and reap, which takes the dead lane's shares back."""
    with arena(capacity=(OBJECTS + SPARE) * BLOCK, block_size=BLOCK) as name, shmcache.attach(name) as cache:
        write_all(cache, [cost_holder.key_of(number) for number in range(OBJECTS)], BLOCK)
        put = Run(lambda _: cache.put(b"after the death", b"x"), [None])
        reap = Run(lambda _: cache.reap(), [None])
        for _ in range(repeats):
            _die_with_lock(name)
            put.once()
            reap.once()
            cache.delete([b"after the death"])
        steals = cache.stats().counters.lock_steals
    if steals != repeats:
        raise RuntimeError(f"expected {repeats} thefts of the arena lock, counted {steals}")
    both = Run(lambda _: None, [None])
    both.wall = [sum(pair) for pair in zip(put.wall, reap.wall, strict=True)]
    both.cpu = [sum(pair) for pair in zip(put.cpu, reap.cpu, strict=True)]
    return [
        cost_of(f"put that rebuilds, {OBJECTS:,} objects", "death", put, by_cpu=False),
        cost_of(f"reap of {cost_holder.SHARES:,} shares", "death", reap, by_cpu=False),
        cost_of("both: reap and rebuild", "death", both, goals=DEATH_GOALS, by_cpu=False),
    ]


def _die_with_lock(name: str) -> None:
    command = [sys.executable, str(HOLDER), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None  # noqa: S101 # as asked for above
            said = holder.stdout.readline()
        finally:
            holder.kill()
    if said != "holding\n":
        raise RuntimeError("the process that was to die with the arena lock could not take it; see its message above")


def costs(repeats: int, populated: int) -> Report:
    """A list of costs for each part, as it is measured."""
    yield attach_costs(10 * repeats)
    yield cost_pages.touch_costs(max(3, repeats // 3))
    yield from cost_pages.populate_costs(populated, max(3, repeats // 6))
    yield death_costs(max(3, repeats // 3))
