"""Two pictures of a host: how long changes wait for the lock as the load grows, and how far away each limit is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_plot import INK, LIMIT, OURS, PALETTE, THEIRS, open_figure, save
from scale_limits import WAIT_S, Outlook

SHOWN = 1e-6  # seconds; shorter waits are drawn there
FARTHEST = 1e3


def save_plot(path: Path, title: str, outlooks: Sequence[Outlook]) -> None:
    """OSError where the file cannot be written."""
    figure = open_figure(title, (12, 5.4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_waits(left, outlooks)
    _draw_limits(right, outlooks)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    save(figure, path)


def _draw_waits(axes: Any, outlooks: Sequence[Outlook]) -> None:
    for colour, one in zip((OURS, *PALETTE), outlooks, strict=False):
        rows = one.waits
        loads = [row.load for row in rows]
        axes.plot(loads, [max(row.p99, SHOWN) for row in rows], color=colour, marker="o", markersize=3, label=one.label)
        axes.plot(loads, [max(row.p50, SHOWN) for row in rows], color=colour, linewidth=0.8, linestyle=":")
        full = [row for row in rows if row.saturated]
        axes.plot([row.load for row in full], [row.p99 for row in full], "x", color=INK, markersize=6)
    axes.axhline(WAIT_S, color=LIMIT, linewidth=0.8, linestyle="--")
    axes.axvline(1, color=LIMIT, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="times the described load", ylabel="seconds")
    axes.set_title("wait for the arena lock, p99 (p50 dotted; x: always held)")
    axes.set_xticks(
        ticks := [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64], [f"{tick:g}" for tick in ticks], minor=False
    )
    axes.minorticks_off()
    axes.grid(visible=True)


def _draw_limits(axes: Any, outlooks: Sequence[Outlook]) -> None:
    """The nearest on top, by the nearest of all cases."""
    nearest: dict[str, float] = {}
    for one in outlooks:
        for row in one.limits:
            nearest[row.name] = min(row.headroom, nearest.get(row.name, row.headroom))
    names = sorted(nearest, key=lambda name: -nearest[name])
    height = 0.8 / len(outlooks)
    for number, (colour, one) in enumerate(zip((OURS, *PALETTE), outlooks, strict=False)):
        rows = one.limits
        places = [names.index(row.name) + 0.4 - height * (number + 0.5) for row in rows]
        widths = [min(row.headroom, FARTHEST) for row in rows]
        axes.barh(places, [width - 1 for width in widths], height, left=1, color=colour, label=one.label)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(xscale="log", xlabel="times as much until it breaks; left of 1: it is broken as described")
    axes.set_title("how far away each limit is")
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_color(THEIRS)
