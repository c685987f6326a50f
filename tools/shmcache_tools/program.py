"""What programs that run for a while share: signals, the live display, options, the arena that options ask for.

Such a program leaves nothing behind, however it ends. So a signal that asks for the end is noted when it
comes, and raised where the run can bear it; what the run had made is then undone as after any error.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console, RenderableType
from rich.live import Live

import shmcache
from shmcache.config import parse_size
from shmcache_tools.chunks import WORD_BYTES
from shmcache_tools.text import plural, size_text
from shmcache_tools.trace import TraceError, TraceRequest, longest_chain, read_trace

_REDRAW_S = 0.125
_BLOCK_BYTES = (4096, 65536)


class Interrupted(Exception):  # noqa: N818 # not an error: somebody asked for it
    """A signal asks for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class RunError(Exception):
    """The run cannot go on."""


class UsageError(Exception):
    """What was asked for is nothing that can be done."""


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
def noted_interrupts() -> Iterator[Interrupts]:
    """Turn SIGINT, SIGTERM and SIGHUP into Interrupted for the time of the block."""
    interrupts = Interrupts()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # what nohup does
        signals.append(signal.SIGHUP)
    before = [signal.signal(signum, interrupts.note) for signum in signals]
    try:
        yield interrupts
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)


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


def number(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {text}")
        return value

    return number


def real(least: float, most: float, unit: str) -> Callable[[str], float]:
    """An argparse type: a number from ``least`` to ``most``."""

    def real(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g} {unit}, got {text}")
        return value

    return real


def size(text: str) -> int:
    """An argparse type: bytes, as ``"512MiB"``."""
    try:
        return parse_size(text, "size")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arena_options(parser: argparse.ArgumentParser, capacity: str, chunk_bytes: int) -> None:
    """``--capacity`` and ``--chunk-bytes``."""
    parser.add_argument("--capacity", default=capacity, metavar="SIZE", help="of the arena; default %(default)s")
    parser.add_argument(
        "--chunk-bytes",
        type=number(WORD_BYTES, 2**30),
        default=chunk_bytes,
        metavar="N",
        help=f"bytes of one chunk, a multiple of {WORD_BYTES}; default %(default)s",
    )


def requests_of(path: Path, limit: int | None) -> list[TraceRequest]:
    """The first requests of a trace file; OSError, or TraceError where it is none or holds none."""
    trace = read_trace(path, limit)
    if not trace:
        raise TraceError(f"{path}: holds no request")
    return trace


def arena_config(options: argparse.Namespace, trace: Sequence[TraceRequest], lanes: int) -> shmcache.ArenaConfig:
    """The arena that the options ask for; ValueError where it cannot hold the longest request."""
    if options.chunk_bytes % WORD_BYTES:
        raise ValueError(f"--chunk-bytes: expected a multiple of {WORD_BYTES}, got {options.chunk_bytes}")
    block_size = _block_size(options.chunk_bytes)
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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What asks for the end does so as Ctrl-C does: nothing is left behind. nohup's SIGHUP asks for nothing."""
    signals = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = [signal.signal(signum, signal.default_int_handler) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)
