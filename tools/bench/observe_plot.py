"""What looking costs as a picture: each look beside bare reading, and the engine's batches beside quiet ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import bench_bars
from bench_bars import Bar, Panel, Row
from bench_plot import LIMIT, OURS, THEIRS
from observe_engine import BATCH
from observe_hits import Phase
from observe_scrape import Look

from shmcache_tools.text import count_text, time_text

WHAT = {"median": "median", "p99": "99th percentile"}


def save_plot(path: Path, machine: str, objects: int, looks: Sequence[Look], phases: Sequence[Phase]) -> None:
    """Without looks or without phases: the others. ImportError without matplotlib; OSError or ValueError where the
    file cannot be written or has no known ending."""
    title = f"what looking at an arena costs; grey: what it is compared with ({machine})"
    bench_bars.save_plot(path, title, [list(_panels(objects, looks, phases))])


def _panels(objects: int, looks: Sequence[Look], phases: Sequence[Phase]) -> Iterator[Panel]:
    if looks:
        yield Panel(
            f"one look at {count_text(objects)} objects: CPU time", [*map(_look, looks[:-1]), _bare(looks[-1])], _time
        )
    for what, word in WHAT.items() if phases else ():
        rows = [_phase(phase, phases[0], what) for phase in phases]
        yield Panel(f"the engine meanwhile: {BATCH} keys read and released, {word}", rows, _time)


def _look(look: Look) -> Row:
    return Row(look.name, [Bar(look.cpu, f"{_time(look.cpu)}, {look.times:.1f} x the bare reading")])


def _bare(limit: Look) -> Row:
    return Row(limit.name, [Bar(limit.cpu, f"{_time(limit.cpu)}: no look can be faster", LIMIT)])


def _phase(phase: Phase, quiet: Phase, what: str) -> Row:
    """The line from the least to the most of the rounds."""
    rounds = [found[what] for found in phase.rounds]
    text = _time(phase.of(what))
    if phase is not quiet:
        text += f", {phase.times(what, quiet):.2f} x as while nobody looks"
    colour = THEIRS if phase is quiet else OURS
    return Row(phase.name, [Bar(phase.of(what), text, colour, spread=(min(rounds), max(rounds)))])


def _time(ns: float) -> str:
    return time_text(ns / 1e9)
