"""The report as a picture: a bar for each cost with marks for limits, peers and goals; and a line for what was measured
over some size. Times are on logarithmic axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bench_plot
from bench_plot import MET, MISSED
from cost_common import Cost

from shmcache_tools.text import size_text, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH = 9.0  # inches a column
ROW, AROUND, LINES = 0.26, 1.2, 3.4  # inches of height: of a bar, of what is around bars, of a panel of lines
MIXED = "#8c6d31"
MARGIN = 2.0  # times, above and below lines, so that noise looks like noise
NOTE = 7  # points: what is said beside bars and lines
BYTES = "bytes of capacity"  # as cost_objects.py names it
LIMIT_MARKS = "|x+1234"


class Panel(NamedTuple):
    part: str
    of: str  # what the lines go over; empty: bars
    costs: list[Cost]

    @property
    def inches(self) -> float:
        return LINES if self.of else AROUND + ROW * len(self.costs)


def save_plot(path: Path, title: str, found: Mapping[str, Sequence[Sequence[Cost]]]) -> None:
    """ImportError without matplotlib; OSError where the file cannot be written."""
    columns = [column for column in _columns(_panels(found)) if column]
    heights = [sum(panel.inches for panel in column) for column in columns]
    figure = bench_plot.open_figure(title, (WIDTH * len(columns), max(heights, default=1.0) + 0.5))
    for place, column in zip(_places(figure, 1, len(columns)), columns, strict=True):
        ratios = [panel.inches for panel in column]
        for part, panel in zip(_places(place, len(column), 1, height_ratios=ratios), column, strict=True):
            (_draw_lines if panel.of else _draw_bars)(part.subplots(), panel)
    bench_plot.save(figure, path)


def _places(figure: Figure | SubFigure, rows: int, columns: int, **ratios: Any) -> list[SubFigure]:
    """Each is laid out for itself."""
    return list(figure.subfigures(rows, columns, squeeze=False, **ratios).flat)


def _panels(found: Mapping[str, Sequence[Sequence[Cost]]]) -> list[Panel]:
    panels: dict[tuple[str, str], list[Cost]] = {}
    for part, tables in found.items():
        for cost in (cost for costs in tables for cost in costs):
            panels.setdefault((part, cost.point.of if cost.point else ""), []).append(cost)
    return [Panel(part, of, costs) for (part, of), costs in panels.items()]


def _columns(panels: Iterable[Panel]) -> tuple[list[Panel], list[Panel]]:
    """Each panel goes where less is so far."""
    left: list[Panel] = []
    right: list[Panel] = []
    for panel in panels:
        shorter = min(left, right, key=lambda column: sum(one.inches for one in column))
        shorter.append(panel)
    return left, right


def _draw_bars(axes: Axes, panel: Panel) -> None:
    colours = dict(zip(_names(cost.peers for cost in panel.costs), bench_plot.PALETTE, strict=False))
    marks = dict(zip(_names(cost.limits for cost in panel.costs), LIMIT_MARKS, strict=False))
    for row, cost in enumerate(panel.costs):
        axes.barh(row, cost.judged, color=bench_plot.OURS, alpha=0.5, height=0.66)
        for name, ratio in cost.limits.items():
            axes.plot(ratio.median, row, marks.get(name, "|"), color="black", ms=8, mew=1.5, label=f"limit: {name}")
        for name, ratio in cost.peers.items():
            axes.plot(ratio.median, row, "D", color=colours.get(name, bench_plot.THEIRS), ms=5, label=f"peer: {name}")
        _draw_goals(axes, row, cost)
    axes.set_xscale("log")
    axes.set_xlim(left=_least(panel.costs) / 2)
    axes.xaxis.set_major_formatter(lambda ns, _: time_text(ns / 1e9))
    axes.set_yticks(range(len(panel.costs)), [f"{cost.name}   {time_text(cost.judged / 1e9)}" for cost in panel.costs])
    axes.set_ylim(len(panel.costs) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_title(f"{panel.part}: what one {' or '.join(_units(panel))} costs")
    _legend(axes)


def _draw_goals(axes: Axes, row: int, cost: Cost) -> None:
    """Marks those in nanoseconds, and says what became of each."""
    said, verdicts = [], []
    for goal in cost.goals:
        met = cost.met(goal)
        if met is None:
            continue
        word = "met" if met else "missed"
        verdicts.append(met)
        said.append(f"{word}: {goal.full}")
        if goal.ns:
            axes.plot(goal.ns, row, "<", color=MET if met else MISSED, ms=6, label=f"goal, {word}")
    colour = MET if all(verdicts) else MIXED if any(verdicts) else MISSED
    axes.annotate(
        "; ".join(said),
        (1, row),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=NOTE,
        va="center",
        color=colour,
    )


def _draw_lines(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415 # an extra

    lines: dict[str, list[tuple[int, float]]] = {}
    for cost in panel.costs:
        if cost.point is not None and cost.judged > 0:  # a difference may be less than the noise
            lines.setdefault(cost.point.line, []).append((cost.point.at, cost.judged))
    limits, dashes = _names(cost.limits for cost in panel.costs), iter(("--", ":", "-."))
    colours = iter((bench_plot.OURS, *bench_plot.PALETTE))
    for name, points in lines.items():
        if name in limits:
            style, colour = next(dashes, "-"), bench_plot.INK
        else:
            style, colour = "-", next(colours, bench_plot.INK)
        axes.plot(*zip(*points, strict=True), marker="o", ls=style, color=colour, ms=4, label=name)
    for goal in {goal for cost in panel.costs for goal in cost.goals if goal.ns}:
        axes.axhline(goal.ns, color=MET, ls=":", lw=1.2, label=f"goal: {goal.text}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    times = [time for points in lines.values() for _, time in points] or [1.0]
    axes.set_ylim(min(times) / MARGIN, max(times) * MARGIN)
    axes.set_xticks(sorted({at for points in lines.values() for at, _ in points}))
    axes.xaxis.set_major_formatter(lambda at, _: size_text(int(at)) if panel.of == BYTES else f"{at:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda ns, _: time_text(ns / 1e9))
    axes.grid()
    axes.set_xlabel(panel.of)
    axes.set_title(f"{panel.part}: CPU time of one {' or '.join(_units(panel))} over {panel.of}")
    _legend(axes)


def _names(kinds: Iterable[Mapping[str, object]]) -> list[str]:
    """Each once, in the order of their first use."""
    return list(dict.fromkeys(name for kind in kinds for name in kind))


def _units(panel: Panel) -> list[str]:
    return list(dict.fromkeys(cost.unit for cost in panel.costs))


def _least(costs: Iterable[Cost]) -> float:
    """The shortest time of a panel, in nanoseconds."""
    return min(
        time
        for cost in costs
        for time in (cost.judged, *(ratio.median for ratio in (*cost.limits.values(), *cost.peers.values())))
    )


def _legend(axes: Axes) -> None:
    """Each label once, below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.figure.legend(
            once.values(), once.keys(), fontsize=NOTE, frameon=False, ncols=4, loc="outside lower center"
        )
