"""The demo: a scheduler and TP workers, processes of their own, read one arena's objects in place.

    python -m shmcache_tools.demo --help

This file owns the program: options, the arena's life, signals, the live display, the exit code.  What
happens in a run is told in ``scheduler`` (who grants what when), ``prefetch`` (what is brought in
ahead), ``worker`` (who reads and verifies), ``crew`` (processes and pipes) and ``report`` (what
is counted).

Nothing stays behind, however the run ends: workers end with their pipe, and the arena and the files of L2
are removed on every way out but a SIGKILL of the demo itself. After that ``shmcache-cleanup --stale`` finds
the arena, and the next run removes the files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

import shmcache
from shmcache.storage import StorageManager
from shmcache_tools.chunks import Pattern
from shmcache_tools.demo.crew import Crew, Killer, describe_exit
from shmcache_tools.demo.report import Outcome, Tally, progress, report
from shmcache_tools.demo.scheduler import Scheduler
from shmcache_tools.demo.worker import GROUP
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
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    complain,
    count_text,
    make_console,
    make_parser,
    plural,
)
from shmcache_tools.trace import (
    TraceError,
    TraceRequest,
    best_hit_rate,
    distinct_chunks,
    make_conversations,
)

PROG = "demo"

_MADE_UP_REQUESTS = 1500
_MAX_WORKERS = 128
_CAPACITY = "384MiB"
_CHUNK_BYTES = 262144
_L2_CAPACITY = "4GiB"
#: Lanes beyond the scheduler and its workers, so that others may attach and look.
_SPARE_LANES = 7

_DESCRIPTION = """\
A scheduler and tensor-parallel workers replay a stream of requests over one shared-memory arena and
a second tier (L2). The scheduler prefetches each request's chunks, with a share of each for every
worker, and writes what neither tier has, to the arena and behind it to L2; every worker reads the
chunks in place, compares every byte, and gives its own shares back."""
_EXAMPLES = """\
  tools/demo                               made-up conversations, 4 workers
  tools/demo --kill                        the same, and a random worker is SIGKILLed every second
  tools/demo --trace trace.jsonl           replay a trace: JSON lines with timestamp and hash_ids
  tools/demo --capacity 4GiB --workers 8   a larger arena, more workers
  tools/demo --no-l2                       the arena alone: what is evicted is written again
  tools/demo --l2 valkey://localhost       another L2 than files in a temporary directory

Ctrl-C ends it and leaves nothing behind.
exit codes: 0 every chunk right, no share left, the arena sound; 1 not so, or failed; 2 usage;
128 + n ended by signal n"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run."""

    options: argparse.Namespace
    seed: int
    trace: Sequence[TraceRequest]
    config: shmcache.ArenaConfig

    @property
    def arena(self) -> str:
        """A name that no other demo has."""
        return f"demo-{os.getpid()}"

    @property
    def headline(self) -> str:
        source = self.options.trace or "made-up conversations"
        workers = plural(self.options.workers, "worker")
        return (
            f"{count_text(len(self.trace))} requests of {source}, {workers}, seed {self.seed}\n"
            f"To look at the arena meanwhile: shmcache-stat {self.arena}\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    try:
        trace = _requests(options, seed)
        plan = Plan(options, seed, trace, arena_config(options, trace, options.workers + 1 + _SPARE_LANES))
    except (OSError, TraceError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    try:
        with noted_interrupts() as interrupts, opened_l2(options, distinct_chunks(trace)) as l2:
            return _run(plan, l2, interrupts)
    except Interrupted as interrupted:
        complain(PROG, f"ended by {interrupted}; nothing is left behind")
        return 128 + interrupted.signum
    except UsageError as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    except (RunError, shmcache.ShmcacheError, subprocess.TimeoutExpired) as error:
        # Its lines are a worker's traceback: not to be squeezed into one.
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--workers", type=number(1, _MAX_WORKERS), default=4, metavar="N", help="default 4")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay this; else made-up conversations")
    parser.add_argument(
        "--requests",
        type=number(1, sys.maxsize),
        metavar="N",
        help=f"the first N requests only; default all of a trace, {_MADE_UP_REQUESTS} made-up ones",
    )
    add_arena_options(parser, _CAPACITY, _CHUNK_BYTES)
    add_l2_options(parser, _L2_CAPACITY)
    parser.add_argument(
        "--kill",
        type=real(0.05, 3600, "seconds"),
        nargs="?",
        const=1.0,
        metavar="S",
        help="SIGKILL a random worker every S seconds (1) and start it again",
    )
    parser.add_argument("--seed", type=number(0, 2**63), metavar="N", help="for what is made up, who is killed")
    parser.add_argument("--keep", action="store_true", help="leave the arena there when the run has ended")
    return parser


def _requests(options: argparse.Namespace, seed: int) -> list[TraceRequest]:
    if options.trace is None:
        return make_conversations(seed, options.requests or _MADE_UP_REQUESTS)
    return requests_of(options.trace, options.requests)


def _run(plan: Plan, l2: L2, interrupts: Interrupts) -> int:
    """Create the arena, replay, report; the exit code."""
    console = make_console()
    keep = False
    shmcache.create(plan.arena, plan.config)
    try:
        console.print(plan.headline, soft_wrap=True)
        outcome = _replay(plan, l2, console, interrupts)
        console.print(report(outcome))
        keep = plan.options.keep
    finally:
        if not keep:
            with contextlib.suppress(shmcache.ArenaNotFoundError):
                shmcache.destroy(plan.arena, force=True)
    if keep:
        console.print(f"Kept: shmcache-stat {plan.arena} shows it, shmcache-cleanup {plan.arena} removes it.")
    return EXIT_FAILED if outcome.faults else EXIT_DONE


def _replay(plan: Plan, l2: L2, console: Console, interrupts: Interrupts) -> Outcome:
    """One run over an arena that is there; no worker is left when this returns or raises."""
    workers, chunk_bytes = plan.options.workers, plan.options.chunk_bytes
    tally = Tally(len(plan.trace), workers, chunk_bytes, best_hit_rate(plan.trace))
    crew = Crew(plan.arena, workers, chunk_bytes)
    killer = Killer(crew, plan.options.kill, plan.seed)
    with (
        shmcache.attach(plan.arena, group=GROUP, rank=None, world_size=workers) as cache,
        StorageManager(cache, l2.adapters) as storage,
    ):

        def show() -> RenderableType:
            return progress(tally, cache.stats(), crew.workers, scheduler.unfinished())

        def tick() -> None:
            interrupts.check()
            killer.tick()
            display.tick()

        display = Display(console, show)
        scheduler = Scheduler(cache, storage, crew, Pattern(chunk_bytes), tally, tick)
        try:
            with display:
                scheduler.start_workers()
                scheduler.replay(plan.trace)
                elapsed_s = tally.elapsed_s
                scheduler.flush()
            flush_s = tally.elapsed_s - elapsed_s
            _stop(crew)
        finally:
            crew.abandon()
            scheduler.drop_guards()
        return Outcome(
            tally=tally,
            elapsed_s=elapsed_s,
            flush_s=flush_s,
            pipe_bytes=crew.pipe_bytes,
            l2=l2.text,
            stats=cache.stats(),
            problems=cache.verify(),
        )


def _stop(crew: Crew) -> None:
    """Let the workers end; one that was killed after its last request is none the worse."""
    wrong = [code for code in crew.stop() if code not in (0, -signal.SIGKILL)]
    if wrong:
        raise RunError("at its end a worker failed: " + ", ".join(map(describe_exit, wrong)))


if __name__ == "__main__":
    sys.exit(main())
