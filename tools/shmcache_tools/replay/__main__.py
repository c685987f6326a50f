"""Replays a trace of requests through an arena (L1) and a second tier (L2), and reports what each was good for.

    python -m shmcache_tools.replay --help

This file owns the program: options, the life of arena and L2, signals, the exit code. How requests are served
is told in ``engine``, what is counted and shown in ``report``. With ``--policy`` it is a study of eviction policies
instead: see ``policy_study``.

Nothing stays behind, however the run ends, but for a SIGKILL: then ``shmcache-cleanup --stale`` finds the
arena, and the next run removes the files of the default L2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, RenderableType

import shmcache
from shmcache.storage import StorageManager
from shmcache_tools.l2 import L2, add_l2_options, opened_l2
from shmcache_tools.program import (
    Display,
    Interrupted,
    Interrupts,
    RunError,
    UsageError,
    add_arena_options,
    arena_config,
    noted_interrupts,
    number,
    real,
    requests_of,
)
from shmcache_tools.replay.engine import Engine, Pace
from shmcache_tools.replay.policy_study import add_study_options, check_study_options, read_workload, run_study
from shmcache_tools.replay.report import Outcome, Tally, document, facts_of, progress, report
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    complain,
    count_text,
    make_console,
    make_parser,
    plural,
    printable,
)
from shmcache_tools.trace import TraceError, TraceRequest, best_hit_rate, distinct_chunks

PROG = "replay"

_GROUP = "replay"
_MAX_READERS = 128
#: Lanes beyond the scheduler and the readers, so that others may attach and look.
_SPARE_LANES = 7
_FLUSH_POLL_S = 0.1
_IN_DOCUMENT = ("capacity", "chunk_bytes", "in_flight", "io_threads", "readers", "seed", "speed")

_DESCRIPTION = """\
Replay a trace of requests, each a chain of KV chunks, through a shared-memory arena (L1) and a second
tier (L2). Each request's chain is prefetched with one share for every reader; the readers read the hits
in place, compare the bytes and give their shares back; what neither tier had is written, and stored to
L2 in the background. Says what each tier hit, what was moved, and how long requests waited.

With --policy: how much an arena of some of the trace's chunks hits under each of its eviction policies,
beside simulated ones and the best that is possible."""
_EXAMPLES = """\
  tools/replay trace.jsonl                             through 1 GiB of L1 and files as L2
  tools/replay trace.jsonl --capacity 4GiB --no-l2     the arena alone
  tools/replay trace.jsonl --l2 valkey://localhost     another L2; what is stored stays there
  tools/replay trace.jsonl --in-flight 8 --readers 4   8 requests at once, for 4 TP workers
  tools/replay trace.jsonl --speed 10 --requests 1000  at ten times the trace's own times
  tools/replay a.jsonl b.jsonl --policy                which eviction policy hits most, by the arena's size
  tools/replay a.jsonl --policy lru,arc,optimum --sizes 5,10 --halves --plot rates.svg

A trace has one JSON object a line: timestamp (milliseconds) and hash_ids, the request's chain.
Ctrl-C ends it and leaves nothing behind.
exit codes: 0 every chunk right, no share left, the arena sound; 1 not so, or failed; 2 usage;
128 + n ended by signal n"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be replayed."""

    options: argparse.Namespace
    trace: Sequence[TraceRequest]
    config: shmcache.ArenaConfig

    @property
    def arena(self) -> str:
        """A name that no other replay has."""
        return f"replay-{os.getpid()}"

    @property
    def headline(self) -> str:
        readers = plural(self.options.readers, "reader")
        return (
            f"{count_text(len(self.trace))} requests of {printable(str(self.options.traces[0]))}, {readers}\n"
            f"To look at the arena meanwhile: shmcache-stat {self.arena}\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the replay, or the study; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        check_study_options(options, parser)
        run = _study(options) if options.policy else _replay_of(options)
    except (OSError, TraceError, UsageError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    try:
        with noted_interrupts() as interrupts:
            return run(interrupts)
    except Interrupted as interrupted:
        complain(PROG, f"ended by {interrupted}; nothing is left behind")
        return 128 + interrupted.signum
    except UsageError as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    except (RunError, shmcache.ShmcacheError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED


def _study(options: argparse.Namespace) -> Callable[[Interrupts], int]:
    workloads = [read_workload(path, options) for path in options.traces]
    return lambda interrupts: run_study(workloads, options, interrupts)


def _replay_of(options: argparse.Namespace) -> Callable[[Interrupts], int]:
    trace = requests_of(options.traces[0], options.requests)
    plan = Plan(options, trace, _paced(arena_config(options, trace, options.readers + 1 + _SPARE_LANES), options.speed))

    def run(interrupts: Interrupts) -> int:
        with opened_l2(options, distinct_chunks(trace)) as l2:
            return _run(plan, l2, interrupts)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="JSON lines")
    parser.add_argument("--requests", type=number(1, sys.maxsize), metavar="N", help="the first N only; default all")
    add_arena_options(parser, "1GiB", 65536)
    add_l2_options(parser, "16GiB")
    parser.add_argument(
        "--in-flight",
        type=number(1, 1024),
        default=1,
        metavar="N",
        help="requests prefetched and served at once; default 1, where each time is the request's own",
    )
    parser.add_argument(
        "--io-threads", type=number(1, 1024), default=4, metavar="N", help="calls of L2 at once; default 4"
    )
    parser.add_argument(
        "--readers", type=number(1, _MAX_READERS), default=1, metavar="N", help="TP workers of a request; default 1"
    )
    parser.add_argument(
        "--speed",
        type=real(1e-3, 1e6, "times"),
        metavar="X",
        help="X times the trace's speed; default: all speed, where the arena evicts by time alone (lru)",
    )
    parser.add_argument(
        "--seed", type=number(0, 2**63), default=0, metavar="N", help="for which reader compares which chunk"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_study_options(parser)
    return parser


def _paced(config: shmcache.ArenaConfig, speed: float | None) -> shmcache.ArenaConfig:
    """The window of the eviction is a time of the trace. At all speed there is none, and the order is by time alone."""
    if speed is None:
        return replace(config, eviction="lru")
    return replace(config, eviction_window_s=config.eviction_window_s / speed)


def _run(plan: Plan, l2: L2, interrupts: Interrupts) -> int:
    """Create the arena, replay, report; the exit code."""
    console = make_console(sys.stderr if plan.options.json else sys.stdout)
    shmcache.create(plan.arena, plan.config)
    try:
        if not plan.options.json:
            console.print(plan.headline, soft_wrap=True)
        outcome = _replay(plan, l2, console, interrupts)
    finally:
        with contextlib.suppress(shmcache.ArenaNotFoundError):
            shmcache.destroy(plan.arena, force=True)
    if plan.options.json:
        options = {"trace": str(plan.options.traces[0]), **facts_of(plan.options, _IN_DOCUMENT)}
        json.dump(document(outcome, options), sys.stdout, indent=2)
        print()
    else:
        console.print(report(outcome))
    return EXIT_FAILED if outcome.faults else EXIT_DONE


def _replay(plan: Plan, l2: L2, console: Console, interrupts: Interrupts) -> Outcome:
    """One replay over an arena that is there; nobody is attached when this returns or raises."""
    options = plan.options
    readers, in_flight = options.readers, options.in_flight
    tally = Tally(len(plan.trace), readers, options.chunk_bytes, best_hit_rate(plan.trace), options.speed is not None)
    with contextlib.ExitStack() as stack:

        def attach(rank: int | None) -> shmcache.Cache:
            return stack.enter_context(shmcache.attach(plan.arena, group=_GROUP, rank=rank, world_size=readers))

        cache = attach(None)
        lanes = [attach(rank) for rank in range(readers)]
        storage = stack.enter_context(
            StorageManager(cache, l2.adapters, max_in_flight=in_flight, io_threads=options.io_threads)
        )
        engine = Engine(cache, lanes, storage, tally, in_flight=in_flight, pace=Pace(options.speed), seed=options.seed)

        def show() -> RenderableType:
            return progress(tally, cache.stats())

        def tick() -> None:
            interrupts.check()
            display.tick()

        display = Display(console, show)
        with display:
            engine.replay(plan.trace, tick)
            ended = time.perf_counter()
            _flush(storage, tick)
        flush_s = time.perf_counter() - ended
        return Outcome(tally, l2.text, ended - tally.began, flush_s, cache.stats(), cache.verify())


def _flush(storage: StorageManager, tick: Callable[[], None]) -> None:
    """Wait until L2 has all that was written."""
    while True:
        tick()
        with contextlib.suppress(TimeoutError):
            storage.flush(_FLUSH_POLL_S)
            return


if __name__ == "__main__":
    sys.exit(main())
