"""The findings as a picture: a panel for each part and kind of number, and ours beside all that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

import bench_bars
from bench_bars import Bar, Panel, Row, verdict
from bench_plot import OURS, THEIRS
from device_common import SHOW, Finding, goal_text, ratio_text

KINDS = {"time": "times, less is better", "rate": "bytes a second", "share": "shares"}


def save_plot(path: Path, machine: str, parts: Mapping[str, Sequence[Finding]]) -> None:
    """ImportError without matplotlib; OSError or ValueError where the file cannot be written or has no known ending."""
    title = f"device memory and pinned views; grey: a peer, and how many times as fast blue is ({machine})"
    bench_bars.save_plot(path, title, bench_bars.two_columns(_panels(parts)))


def _panels(parts: Mapping[str, Sequence[Finding]]) -> Iterator[Panel]:
    for part, findings in parts.items():
        for kind, words in KINDS.items():
            some = [one for one in findings if one.kind == kind]
            if some:
                rows = [_row(what, list(same)) for what, same in groupby(some, key=lambda one: one.what)]
                yield Panel(f"{part}: {words}", rows, SHOW[kind], log=kind == "time")


def _row(what: str, same: Sequence[Finding]) -> Row:
    """Findings of the same numbers of ours, each with another peer, of which one may be a goal."""
    show, value = SHOW[same[0].kind], median(same[0].ours)
    said, met = show(value), None
    for one in same:
        if one.met is not None:
            met = one.met
            said += f"; {goal_text(one)}: {'met' if met else 'missed'}"
    ours = Bar(value, said, OURS, verdict(met), same[0].spread())
    return Row(what, [ours, *(_peer(one, show) for one in same if one.theirs)])


def _peer(one: Finding, show: Callable[[float], str]) -> Bar:
    value = median(one.theirs)
    ratio = "" if one.ratio is None else f"; {ratio_text(one)}"
    return Bar(value, f"{show(value)}: {one.peer}{ratio}", THEIRS)
