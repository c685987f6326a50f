"""The measured stores as a picture: bytes a second beside the peer's, and how soon single objects are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import bench_bars
from bench_bars import Bar, Panel, Row, verdict
from bench_plot import OURS, PALETTE, THEIRS

from shmcache_tools.text import plural, size_text, time_text

if TYPE_CHECKING:
    from prefetch import Throughput

TITLE = "prefetch from L2; grey: what its peer does alone with as many threads"
FIRST = PALETTE[3]


def save_plot(path: Path, machine: str, lines: Sequence[Throughput]) -> None:
    """ImportError without matplotlib; OSError or ValueError where the file cannot be written or has no known ending."""
    stores = [[line for line in lines if line.store == name] for name in dict.fromkeys(line.store for line in lines)]
    title = f"{TITLE} ({machine})"
    bench_bars.save_plot(path, title, [[_rates(store) for store in stores], [_times(store) for store in stores]])


def _rates(lines: Sequence[Throughput]) -> Panel:
    """A row a size."""
    title = f"{lines[0].store}: bytes a second, {plural(lines[0].threads, 'thread')}"
    return Panel(title, [_rate(line) for line in lines], rate_text)


def _rate(line: Throughput) -> Row:
    ours = Bar(line.bytes_per_s, f"{rate_text(line.bytes_per_s)}: {_judged(line)}", OURS, verdict(line.met))
    theirs = Bar(line.peer_bytes_per_s, f"{rate_text(line.peer_bytes_per_s)}: {line.peer}", THEIRS)
    return Row(size_text(line.object_bytes), [ours, theirs])


def _judged(line: Throughput) -> str:
    text = f"{100 * line.ratio:.0f} % of {line.peer}"
    if line.goal is None:
        return text
    return f"{text}; at least {100 * line.goal:.0f} %: {'met' if line.met else 'missed'}"


def _times(lines: Sequence[Throughput]) -> Panel:
    rows = [
        Row(
            size_text(line.object_bytes),
            [
                Bar(line.one_key_s, f"{time_text(line.one_key_s)}: one key alone"),
                Bar(line.first_key_s, f"{time_text(line.first_key_s)}: the first key of a chain", FIRST),
            ],
        )
        for line in lines
    ]
    return Panel(f"{lines[0].store}: from submit until it can be read", rows, time_text)


def rate_text(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
