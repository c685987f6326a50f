"""What the memory of an arena costs: the page faults of a process that reads all of it once after it attached, and
``create`` with ``populate`` beside the same bytes of this process's own memory, touched by as many threads.

Memory of a tmpfs comes in pages of 4 KiB unless it is mounted with ``huge=``, so the limit is memory in such pages;
beside it stands the same in huge pages, where the kernel has them.
"""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from statistics import median

import cost_limits
from cost_common import (
    Cost,
    Report,
    Run,
    alternate,
    arena,
    compare,
    cost_of,
    lacks_room,
    matrix,
    share,
    write_all,
)
from cost_reading import BATCH, OBJECT

import shmcache
from shmcache_tools.text import plural, size_text

OBJECTS = 65_536
STEP = 64 << 20  # bytes that a thread touches at a time, as populate does
THREADS = min(16, os.cpu_count() or 1)
SMALL, HUGE = "own memory, 4 KiB pages", "own memory, huge pages"
POPULATE_SPEED = 90  # percent of the limit's


def touch_costs(repeats: int) -> list[Cost]:
    """The first byte of each object, the first time after attach and once more."""
    with arena(capacity=OBJECTS * OBJECT, block_size=OBJECT) as name:
        keys = matrix(OBJECTS)
        with shmcache.attach(name) as cache:
            write_all(cache, keys, OBJECT)
        caches: list[shmcache.Cache] = []
        faults: list[int] = []

        def work(_: object) -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for start in range(0, OBJECTS, BATCH):
                with caches[0].read(keys[start : start + BATCH]) as batch:
                    for view in batch.views:
                        view[0]  # type: ignore[index] # a miss would be an error
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        first, again = Run(work, [None], OBJECTS), Run(work, [None], OBJECTS)
        for _ in range(repeats):
            caches.append(shmcache.attach(name))
            first.once()
            again.once()
            caches.pop().close()
    what = f"first byte of {OBJECTS:,} objects"
    side = {"again": again}
    return [
        compare(cost_of(f"{what} after attach", "object", first, note=_faults(faults[::2])), first, {}, side),
        cost_of("the same again", "object", again, note=_faults(faults[1::2])),
    ]


def _faults(counted: list[int]) -> str:
    return plural(round(median(counted)), "page fault")


def populate_costs(nbytes: int, repeats: int) -> Report:
    """To create an arena with all its memory. Its metadata is part of what create makes."""
    reason = lacks_room(2 * nbytes)
    if reason is not None:
        yield f"whole: no arena of {size_text(nbytes)} populated: {reason}"
        return
    name = f"bench-{os.getpid()}-populate"
    config = shmcache.ArenaConfig(capacity=nbytes, populate=True)

    def destroy() -> None:
        shmcache.destroy(name, force=True)

    run = Run(lambda _: shmcache.create(name, config), [None], nbytes >> 20, destroy)
    limits = {} if cost_limits.load()[0] is None else {SMALL: _own(nbytes, huge=False), HUGE: _own(nbytes, huge=True)}
    try:
        alternate([run, *limits.values()], repeats, warm_up=1)
    finally:
        with suppress(shmcache.ArenaNotFoundError):  # unless it was interrupted
            destroy()
    label = f"create with populate, {size_text(nbytes)}, {plural(THREADS, 'thread')}"
    yield [compare(cost_of(label, "MiB", run, goals=[share(POPULATE_SPEED, SMALL)], by_cpu=False), run, {}, limits)]


def _own(nbytes: int, *, huge: bool) -> Run:
    """Anonymous memory that as many threads touch for the first time."""
    lib = cost_limits.load()[0].lib
    mapped = []

    def work(_: object) -> None:
        start = lib.limit_map(nbytes, huge)
        if not start:
            raise RuntimeError(f"no memory for {size_text(nbytes)} beside the arena")
        mapped.append(start)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda at: lib.limit_touch(start + at, min(STEP, nbytes - at)), range(0, nbytes, STEP)))

    return Run(work, [None], nbytes >> 20, lambda: lib.limit_unmap(mapped.pop(), nbytes))
