"""What a hit costs where several processes read at once: the same object, an object each of one arena, an arena each.

Where readers do not slow each other down, all of these cost the same. Readers that have an arena each share nothing but
the machine: what they lose with their number is its doing (caches, clocks, threads of one core, other programs), and
not that of shares. A machine may have fewer CPUs than readers, so goals are about the CPU time of a hit. To make a hit
as dear as its shares and not as Python, each call takes 256 shares of the object, and gives them back.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import cost_reader
from cost_common import Cost, Point, Report, Run, arena, compare, cost_of, no_more
from cost_reader import EACH, ONE, OWN

import shmcache
from shmcache_tools.text import plural

COUNTS = (1, 2, 4)
LASTING_NS = 60_000_000
AHEAD_NS = 5_000_000  # from the word to the start
CONFIG = {"capacity": 16 * cost_reader.OBJECT, "block_size": cost_reader.OBJECT, "lanes": 16}
MOST = 1.1  # of the CPU time of a hit of one reader

Reader: TypeAlias = "subprocess.Popen[str]"


def costs(repeats: int) -> Report:
    runs = {(what, count): Run(lambda _: None, []) for what in (ONE, EACH, OWN) for count in COUNTS}
    with _readers(max(COUNTS)) as readers:
        for repeat in range(-1, repeats):  # the first warms up
            for (what, count), run in runs.items():
                _read(readers[:count], what, run)
                if repeat < 0:
                    run.forget()
    yield [_cost(what, count, runs) for what, count in runs]


def _cost(what: str, count: int, runs: dict[tuple[str, int], Run]) -> Cost:
    """Beside one reader of the same, and beside as many readers of an arena each."""
    run, first = runs[what, count], plural(COUNTS[0], "reader")
    goals = [no_more(MOST, first)] if count == max(COUNTS) and what != OWN else []
    limits = {} if count == COUNTS[0] else {first: runs[what, COUNTS[0]]}
    if what != OWN and count > 1:
        limits[OWN] = runs[OWN, count]
    return compare(
        cost_of(f"{plural(count, 'reader')}, {what}", "hit", run, goals=goals, point=Point(what, count, "readers")),
        run,
        {},
        limits,
    )


@contextmanager
def _readers(count: int) -> Iterator[list[Reader]]:
    """Processes that are attached to one arena, and to one of their own."""
    with ExitStack() as stack:
        shared = stack.enter_context(arena(**CONFIG))
        owns = [stack.enter_context(arena(**CONFIG)) for _ in range(count)]
        for name, objects in [(shared, count), *((own, 1) for own in owns)]:
            with shmcache.attach(name) as cache:
                for number in range(objects):
                    cache.put(cost_reader.key_of(number), bytes(cost_reader.OBJECT))
        readers = [stack.enter_context(_reader(shared, own, number)) for number, own in enumerate(owns)]
        for reader in readers:
            _answer(reader)
        yield readers


@contextmanager
def _reader(shared: str, own: str, number: int) -> Iterator[Reader]:
    command = [sys.executable, cost_reader.__file__, shared, own, str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _read(readers: Sequence[Reader], what: str, run: Run) -> None:
    """Lets them read at the same time. The times are of one reader's hit, over all hits."""
    begin = time.monotonic_ns() + AHEAD_NS
    for reader in readers:
        assert reader.stdin is not None  # noqa: S101 # as asked for
        print(what, begin, LASTING_NS, sep="\t", file=reader.stdin, flush=True)
    hits, wall, cpu = (
        sum(numbers) for numbers in zip(*(map(int, _answer(one).split()) for one in readers), strict=True)
    )
    run.wall.append(wall / hits)
    run.cpu.append(cpu / hits)


def _answer(reader: Reader) -> str:
    assert reader.stdout is not None  # noqa: S101 # as asked for
    line = reader.stdout.readline()
    if not line:
        raise RuntimeError(f"a reader ended with {reader.wait()}; see its message above")
    return line
