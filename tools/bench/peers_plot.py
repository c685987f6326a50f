"""The findings as a picture: a panel a workload, a line a system, over sizes, readers or ranks; times on a log scale.

A line's name stands at its end, moved apart where lines end close together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_plot import LIMIT, OURS, PALETTE, open_figure, save
from peers_common import OURS as OURS_NAME
from peers_common import Finding
from peers_work import TOGETHER, WORKLOADS

from shmcache_tools.text import time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PANEL_INCHES = (4.3, 3.1)
LABEL_SHARE = 0.062  # of a panel's height: between two names


def save_plot(path: Path, title: str, findings: Sequence[Finding]) -> None:
    """ImportError without matplotlib; OSError or ValueError where the file cannot be written or has no known ending."""
    names = list(dict.fromkeys(finding.workload for finding in findings))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = open_figure(
        f"shmcache and its peers: median times, less is better; dotted: limits that nobody can beat ({title})",
        (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4),
    )
    colours = _colours(findings)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, name, [finding for finding in findings if finding.workload == name], colours)
    for panel in list(figure.axes)[len(names) :]:
        panel.set_visible(False)
    save(figure, path)


def _colours(findings: Sequence[Finding]) -> dict[str, str]:
    """One a system in all panels; limits are grey."""
    systems = {finding.system: finding.limit for finding in findings}
    peers = [name for name, limit in systems.items() if not limit and name != OURS_NAME]
    colours = dict.fromkeys(systems, LIMIT) | {peer: PALETTE[i % len(PALETTE)] for i, peer in enumerate(peers)}
    return colours | {OURS_NAME: OURS}


def _draw(axes: Axes, name: str, findings: Sequence[Finding], colours: dict[str, str]) -> None:
    columns = list(dict.fromkeys(finding.column for finding in findings))
    cpu = name in TOGETHER
    ends: list[tuple[str, float, float]] = []
    for system in dict.fromkeys(finding.system for finding in findings):
        mine = [finding for finding in findings if finding.system == system]
        at = [columns.index(finding.column) for finding in mine]
        times = [(finding.cpu if cpu else finding.median) / 1e9 for finding in mine]
        axes.plot(at, times, **_style(system, mine[0].limit, colours[system]))
        ends.append((system, at[-1], times[-1]))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda seconds, _: time_text(seconds))
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.grid(axis="y")
    axes.set_title(WORKLOADS[name].short)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.15, (len(columns) - 1) * 1.5 + 0.25)  # room for the names
    _label(axes, ends, colours)


def _style(system: str, limit: bool, colour: str) -> dict[str, Any]:
    ours = system == OURS_NAME
    return {
        "color": colour,
        "linewidth": 2.6 if ours else 1.3,
        "linestyle": ":" if limit else "-",
        "marker": "o",
        "markersize": 5 if ours else 3.5,
        "zorder": 4 if ours else 3,
    }


def _label(axes: Axes, ends: Sequence[tuple[str, float, float]], colours: dict[str, str]) -> None:
    """Names at the ends of the lines, from the lowest up, none closer to the one below it than a line of text."""
    low, high = (log10(limit) for limit in axes.get_ylim())
    step = LABEL_SHARE * (high - low)
    places = _apart([log10(end[2]) for end in ends], step, low, high)
    for (system, x, y), place in zip(ends, places, strict=True):
        axes.annotate(
            system,
            (x, y),
            (x + 0.14, 10**place),
            color=colours[system],
            fontsize=8,
            fontweight="bold" if system == OURS_NAME else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[system], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )


def _apart(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places at least ``step`` from one another and within the panel: what is too close makes a group, which lies
    around the middle of what its members want."""
    groups: list[list[float]] = []  # what each member wants
    for want in sorted(wanted):
        groups.append([want])
        while len(groups) > 1 and _bottom(groups[-1], step) < _bottom(groups[-2], step) + len(groups[-2]) * step:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [_bottom(group, step) + i * step for group in groups for i in range(len(group))]
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - step / 2 - (len(placed) - 1 - i) * step)
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + step / 2 + i * step)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    return [placed[order.index(i)] for i in range(len(wanted))]


def _bottom(group: Sequence[float], step: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) / 2 * step
