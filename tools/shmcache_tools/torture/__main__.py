"""Tortures an arena: processes do random operations, die and are stopped at any moment, and all they saw is checked.

    python -m shmcache_tools.torture --help

This file owns the program: options, rounds, the exit code. What a round is, is told in ``plan``; what its
processes do, in ``worker``; what is done to them, in ``crew``; what must hold of what they saw, in
``check``, ``shares`` and ``counts``.

Nothing stays behind, however the run ends, but for a SIGKILL: then ``shmcache-cleanup --stale`` finds the arena.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Final

from rich.console import RenderableType

import shmcache
from shmcache import Cache, Counters, Status
from shmcache_tools.program import Display, Interrupted, noted_interrupts, number, real
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console, make_parser
from shmcache_tools.torture.check import Violation, check
from shmcache_tools.torture.counts import check_counters
from shmcache_tools.torture.crew import Crew, CrewError
from shmcache_tools.torture.history import History, history_of, history_text
from shmcache_tools.torture.log import HEAD_COUNT, Log
from shmcache_tools.torture.plan import LEAST_PROCESSES, MOST_PROCESSES, Plan, plan_of
from shmcache_tools.torture.report import Finding, Tally, document, progress, report

PROG = "torture"

_AUDITS: Final = 3  #: a round
_MOST_FINDINGS: Final = 10  #: with their histories
_AROUND_NS: Final = 2_000_000  #: how much of the history before and after a violation is shown

_DESCRIPTION = """\
Torture an arena: processes of two groups, and some of their own, do random operations on a few keys in an
arena too small for them; one is killed every few milliseconds, others are stopped for a while, and those
that died are replaced. Each notes what it did and saw in a log that outlives it. After every round all
logs are checked: no reader may have seen bytes that were not published, or were removed; no share may be
lost or doubled; of the dead nothing may be left, and of those that were only stopped nothing may be taken."""
_EXAMPLES = """\
  tools/torture                                 30 seconds, another seed each time
  tools/torture --seconds 3600 --json >run.json an hour
  tools/torture --seed 7 --first-round 12       what round 12 of seed 7 did, and those behind it

Ctrl-C ends it and leaves nothing behind.
exit codes: 0 no violation; 1 a violation, or failed; 2 usage; 128 + n ended by signal n"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    options = _parser().parse_args(argv)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    tally = Tally(seed, options.seconds, options.processes)
    console = make_console(sys.stderr if options.json else sys.stdout)
    console.print(f"seed {seed}, {options.processes} processes, {options.seconds:g} s")
    try:
        with noted_interrupts() as interrupts:
            run = Run(tally, options)
            display = Display(console, run.show)

            def tick() -> None:
                interrupts.check()
                display.tick()

            with display:
                run.rounds(tick)
    except Interrupted as interrupted:
        complain(PROG, f"ended by {interrupted}; nothing is left behind")
        return 128 + interrupted.signum
    except (shmcache.ShmcacheError, OSError) as error:
        complain(PROG, f"{error} (to repeat: {tally.command})")
        return EXIT_FAILED
    if options.json:
        json.dump(document(tally), sys.stdout, indent=2)
        print()
    else:
        console.print(report(tally), soft_wrap=True)
    return EXIT_FAILED if tally.findings else EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--seconds", type=real(0.5, 1e6, "s"), default=30.0, metavar="S", help="default 30")
    parser.add_argument("--seed", type=number(0, 2**63), metavar="N", help="of all that is random; default: a new one")
    parser.add_argument(
        "--processes",
        type=number(LEAST_PROCESSES, MOST_PROCESSES),
        default=8,
        metavar="N",
        help=f"at a time, {LEAST_PROCESSES} to {MOST_PROCESSES}; default 8",
    )
    parser.add_argument(
        "--round-seconds", type=real(0.2, 60, "s"), default=2.5, metavar="S", help="of one round; default 2.5"
    )
    parser.add_argument(
        "--first-round", type=number(0, sys.maxsize), default=0, metavar="N", help="begin with this one; default 0"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


class Run:
    """All rounds."""

    def __init__(self, tally: Tally, options: argparse.Namespace) -> None:
        self._tally = tally
        self._options = options
        self._orders = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._logs = [Log(slot) for slot in range(options.processes)]

    def rounds(self, tick: Callable[[], None]) -> None:
        """One after the other, until the time is over or there is a violation."""
        tally, options = self._tally, self._options
        while tally.rounds == 0 or (tally.elapsed_s < tally.seconds and not tally.findings):
            tick()
            index = options.first_round + tally.rounds
            plan = plan_of(tally.seed, index, options.processes)
            tally.round_text = plan.text
            tally.command = (
                f"tools/torture --seed {tally.seed} --processes {options.processes} --first-round {index}"
                f" --round-seconds {options.round_seconds:g}"
            )
            seconds = min(options.round_seconds, max(0.5, tally.seconds - tally.elapsed_s))
            self._round(plan, seconds, tick)
            tally.rounds += 1

    def show(self) -> RenderableType:
        """How far it is."""
        return progress(self._tally, [int(log.words[HEAD_COUNT]) for log in self._logs])

    def _round(self, plan: Plan, seconds: float, tick: Callable[[], None]) -> None:
        arena = f"torture-{os.getpid()}"
        for log in self._logs:
            log.clear()
        shmcache.create(arena, plan.config)
        faults: list[str] = []
        counters: Counters | None = None
        try:
            with Crew(arena, plan, self._logs, self._orders, self._tally.toll) as crew:
                try:
                    for _ in range(_AUDITS - 1):
                        crew.work(seconds / _AUDITS, tick)
                        crew.hold()
                    crew.work(seconds / _AUDITS, tick)
                    crew.drain()
                    counters, faults = _settle(arena, plan)
                except CrewError as error:
                    faults = [str(error)]
        finally:
            with contextlib.suppress(shmcache.ArenaNotFoundError):
                shmcache.destroy(arena, force=True)
        tick()
        history = history_of(plan, [log.data() for log in self._logs], crew.audits)
        self._conclude(history, counters, [*crew.faults, *faults])

    def _conclude(self, history: History, counters: Counters | None, faults: list[str]) -> None:
        self._tally.add(history, counters)
        violations = [*(Violation(fault) for fault in faults), *check(history)]
        if counters is not None:
            violations += check_counters(history, counters)
        for i, violation in enumerate(violations):
            lines: list[str] = []
            if violation.key is not None and i < _MOST_FINDINGS:
                begin, end = violation.begin - _AROUND_NS, violation.end + _AROUND_NS
                lines = history_text(history, violation.key, begin, end)
            self._tally.findings.append(Finding(violation.text, lines))


def _settle(arena: str, plan: Plan) -> tuple[Counters, list[str]]:
    """When all have left: of the dead nothing is left once they are reaped, and all of the arena can be used."""
    with shmcache.attach(arena) as cache:
        cache.reap()
        stats = cache.stats()
        faults = [f"at the end, verify(): {finding}" for finding in cache.verify()]
        left = {name: getattr(stats, name) for name in ("reserved", "held", "writing", "lanes_dead")}
        faults += [f"at the end, after a reap, stats() says: {name} {count}" for name, count in left.items() if count]
        cache.clear()
        used = cache.stats()
        if used.used_bytes or used.objects:
            faults.append(f"nobody has any share, and clear() left {used.objects} objects, {used.used_bytes} bytes")
        faults += _fill(cache, plan)
    return stats.counters, faults


def _fill(cache: Cache, plan: Plan) -> list[str]:
    """Uses every slot and every block."""
    small = [b"%d" % i for i in range(min(plan.slots, plan.blocks))]
    found = cache.reserve_write(small, cache.stats().block_size).publish()
    faults = [] if found == [Status.OK] * len(small) else [f"{len(small)} objects of a block: {found}"]
    if cache.clear() != len(small):
        faults.append(f"clear() did not delete {len(small)} objects that nobody reads")
    if (status := cache.put(b"all", bytes(cache.stats().capacity))) != Status.OK:
        faults.append(f"an object of all blocks: {status.name}")
    return faults + [f"after filling it, verify(): {finding}" for finding in cache.verify()]


if __name__ == "__main__":
    sys.exit(main())
