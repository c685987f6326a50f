"""The demo: a scheduler and TP workers, processes of their own, read one arena's objects in place.

    python -m shmcache_tools.demo --help

This file owns the program: options, the arena's life, signals, the live display, the exit code.  What
happens in a run is told in ``demo_scheduler`` (who grants what when), ``demo_worker`` (who reads and
verifies), ``demo_crew`` (processes and pipes) and ``demo_report`` (what is counted).

Nothing stays behind, however the run ends: workers end with their pipe, and the arena is destroyed on
every way out but a SIGKILL of the demo itself, after which ``shmcache-cleanup --stale`` finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console, RenderableType
from rich.live import Live

import shmcache
from shmcache_tools.chunks import WORD_BYTES, Pattern
from shmcache_tools.demo_crew import Crew, Killer, describe_exit
from shmcache_tools.demo_report import Outcome, Tally, progress, report
from shmcache_tools.demo_scheduler import DemoError, Scheduler
from shmcache_tools.demo_worker import GROUP
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    complain,
    count_text,
    make_console,
    make_parser,
    plural,
    size_text,
)
from shmcache_tools.trace import (
    TraceError,
    TraceRequest,
    best_hit_rate,
    longest_chain,
    make_conversations,
    read_trace,
)

PROG = "demo"

_MADE_UP_REQUESTS = 4000
_MAX_WORKERS = 128
_REDRAW_S = 0.125
_BLOCK_BYTES = (4096, 65536)
#: Lanes beyond the scheduler and its workers, so that others may attach and look.
_SPARE_LANES = 7

_DESCRIPTION = """\
A scheduler and tensor-parallel workers replay a stream of requests over one shared-memory arena.
The scheduler writes the chunks that are missing and grants each worker a share of each chunk; every
worker reads the chunks in place, compares every byte, and gives its own shares back."""
_EXAMPLES = """\
  tools/demo                               made-up conversations, 4 workers
  tools/demo --kill                        the same, and a random worker is SIGKILLed every second
  tools/demo --trace trace.jsonl           replay a trace: JSON lines with timestamp and hash_ids
  tools/demo --capacity 4GiB --workers 8   a larger arena, more workers

Ctrl-C ends it and leaves nothing behind.
exit codes: 0 every chunk right, no share left, the arena sound; 1 not so, or failed; 2 usage;
128 + n ended by signal n"""


class Interrupted(Exception):  # noqa: N818 # not an error: somebody asked for it
    """A signal asks for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


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
        plan = Plan(options, seed, trace, _config(options, trace))
    except (OSError, TraceError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    try:
        with _interrupts() as interrupts:
            return _run(plan, interrupts)
    except Interrupted as interrupted:
        complain(PROG, f"ended by {interrupted}; nothing is left behind")
        return 128 + interrupted.signum
    except (DemoError, shmcache.ShmcacheError, subprocess.TimeoutExpired) as error:
        # Its lines are a worker's traceback: not to be squeezed into one.
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--workers", type=_number(1, _MAX_WORKERS), default=4, metavar="N", help="default 4")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay this; else made-up conversations")
    parser.add_argument(
        "--requests",
        type=_number(1, sys.maxsize),
        metavar="N",
        help=f"the first N requests only; default all of a trace, {_MADE_UP_REQUESTS} made-up ones",
    )
    parser.add_argument("--capacity", default="512MiB", metavar="SIZE", help="of the arena; default 512MiB")
    parser.add_argument(
        "--chunk-bytes",
        type=_number(WORD_BYTES, 2**30),
        default=65536,
        metavar="N",
        help=f"bytes of one chunk, a multiple of {WORD_BYTES}; default 65536",
    )
    parser.add_argument(
        "--kill",
        type=_seconds,
        nargs="?",
        const=1.0,
        metavar="S",
        help="SIGKILL a random worker every S seconds (1) and start it again",
    )
    parser.add_argument("--seed", type=_number(0, 2**63), metavar="N", help="for what is made up, who is killed")
    parser.add_argument("--keep", action="store_true", help="leave the arena there when the run has ended")
    return parser


def _requests(options: argparse.Namespace, seed: int) -> list[TraceRequest]:
    if options.trace is None:
        return make_conversations(seed, options.requests or _MADE_UP_REQUESTS)
    trace = read_trace(options.trace, options.requests)
    if not trace:
        raise TraceError(f"{options.trace}: holds no request")
    return trace


def _config(options: argparse.Namespace, trace: Sequence[TraceRequest]) -> shmcache.ArenaConfig:
    """The arena that the options ask for; ValueError where it cannot hold the longest request."""
    if options.chunk_bytes % WORD_BYTES:
        raise ValueError(f"--chunk-bytes: expected a multiple of {WORD_BYTES}, got {options.chunk_bytes}")
    block_size = _block_size(options.chunk_bytes)
    lanes = options.workers + 1 + _SPARE_LANES
    config = shmcache.ArenaConfig(options.capacity, block_size=block_size, lanes=lanes)
    blocks = -(-options.chunk_bytes // block_size) * longest_chain(trace)
    if blocks * block_size > config.capacity:
        raise ValueError(
            f"--capacity: the longest request has {plural(longest_chain(trace), 'chunk')} and needs "
            f"{size_text(blocks * block_size)}, got {options.capacity}"
        )
    return config


def _block_size(chunk_bytes: int) -> int:
    """The largest block, within bounds, that divides a chunk: no byte of a block is wasted."""
    smallest, largest = _BLOCK_BYTES
    return min(max(chunk_bytes & -chunk_bytes, smallest), largest)


def _run(plan: Plan, interrupts: Interrupts) -> int:
    """Create the arena, replay, report; the exit code."""
    console = make_console()
    keep = False
    shmcache.create(plan.arena, plan.config)
    try:
        console.print(plan.headline, soft_wrap=True)
        outcome = _replay(plan, console, interrupts)
        console.print(report(outcome))
        keep = plan.options.keep
    finally:
        if not keep:
            with contextlib.suppress(shmcache.ArenaNotFoundError):
                shmcache.destroy(plan.arena, force=True)
    if keep:
        console.print(f"Kept: shmcache-stat {plan.arena} shows it, shmcache-cleanup {plan.arena} removes it.")
    return EXIT_FAILED if outcome.faults else EXIT_DONE


def _replay(plan: Plan, console: Console, interrupts: Interrupts) -> Outcome:
    """One run over an arena that is there; no worker is left when this returns or raises."""
    workers, chunk_bytes = plan.options.workers, plan.options.chunk_bytes
    tally = Tally(len(plan.trace), workers, chunk_bytes, best_hit_rate(plan.trace))
    crew = Crew(plan.arena, workers, chunk_bytes)
    killer = Killer(crew, plan.options.kill, plan.seed)
    with shmcache.attach(plan.arena, group=GROUP, rank=None, world_size=workers) as cache:

        def show() -> RenderableType:
            return progress(tally, cache.stats(), crew.workers, scheduler.unfinished())

        def tick() -> None:
            interrupts.check()
            killer.tick()
            display.tick()

        display = Display(console, show)
        scheduler = Scheduler(cache, crew, Pattern(chunk_bytes), tally, tick)
        try:
            with display:
                scheduler.start_workers()
                scheduler.replay(plan.trace)
            elapsed_s = tally.elapsed_s
            _stop(crew)
        finally:
            crew.abandon()
            scheduler.drop_guards()
        return Outcome(tally, elapsed_s, crew.pipe_bytes, cache.stats(), cache.verify())


def _stop(crew: Crew) -> None:
    """Let the workers end; one that was killed after its last request is none the worse."""
    wrong = [code for code in crew.stop() if code not in (0, -signal.SIGKILL)]
    if wrong:
        raise DemoError("at its end a worker failed: " + ", ".join(map(describe_exit, wrong)))


class Display:
    """The live display; nothing where the output is not a terminal."""

    def __init__(self, console: Console, show: Callable[[], RenderableType]) -> None:
        self._show = show
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> None:
        if self._live:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tick(self) -> None:
        """Draw again, if it is time."""
        if self._live and time.perf_counter() >= self._next:
            self._live.update(self._show(), refresh=True)
            self._next = time.perf_counter() + _REDRAW_S


class Interrupts:
    """Signals that ask for the end: noted when they come, raised where the run can bear it."""

    def __init__(self) -> None:
        self._signum: int | None = None

    def note(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum is not None:
            raise Interrupted(signum)  # asked twice: at once, wherever we are
        self._signum = signum

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._signum is not None:
            raise Interrupted(self._signum)


@contextlib.contextmanager
def _interrupts() -> Iterator[Interrupts]:
    """Turn SIGINT, SIGTERM and SIGHUP into Interrupted for the time of the block."""
    interrupts = Interrupts()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, interrupts.note) for signum in signals]
    try:
        yield interrupts
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)


def _number(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {text}")
        return value

    return number


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected 0.05 to 3600 seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
