"""Bars as a picture: panels in columns, in each panel rows of bars, and at the end of each bar what is said of it.

A row has ours first and then whatever it is compared with, on one axis, so that lengths can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench_plot import INK, MET, MISSED, OURS, open_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 8.0  # inches a column
BAR, GAP, AROUND = 0.17, 0.6, 0.75  # inches of a bar, bars between two rows, inches around the bars of a panel
TITLE = 0.45  # inches a picture's title takes
SHARE = 0.52  # of a panel's width: the longest bar, as its words need room, too
NOTE = 7  # points
WIDE = 50  # times: a logarithmic axis on which the powers of ten are enough
TICKS = 4  # or so, as they bear long words


class Bar(NamedTuple):
    value: float
    said: str
    colour: str = OURS
    ink: str = INK  # of what is said
    spread: tuple[float, float] | None = None


class Row(NamedTuple):
    name: str
    bars: Sequence[Bar]


class Panel(NamedTuple):
    title: str
    rows: Sequence[Row]
    show: Callable[[float], str]
    log: bool = False

    @property
    def inches(self) -> float:
        return AROUND + BAR * sum(len(row.bars) + GAP for row in self.rows)


def verdict(met: bool | None) -> str:
    """The colour of what is said."""
    return INK if met is None else MET if met else MISSED


def two_columns(panels: Iterable[Panel]) -> list[list[Panel]]:
    """Each panel goes where less is so far."""
    columns: list[list[Panel]] = [[], []]
    for panel in panels:
        min(columns, key=_inches).append(panel)
    return columns


def save_plot(path: Path, title: str, columns: Iterable[Sequence[Panel]]) -> None:
    """ImportError without matplotlib; OSError or ValueError where the file cannot be written or has no known ending."""
    columns = [column for column in columns if column]
    height = max(map(_inches, columns), default=0.5)
    figure = open_figure(title, (WIDTH * max(1, len(columns)), TITLE + height))
    for column, place in zip(columns, figure.subfigures(1, max(1, len(columns)), squeeze=False).flat, strict=False):
        below = max(height - _inches(column), 1e-3)
        ratios = [*(panel.inches for panel in column), below]
        *panels, rest = place.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False).flat
        rest.set_visible(False)
        for panel, axes in zip(column, panels, strict=True):
            _draw(axes, panel)
    save(figure, path)


def _inches(column: Iterable[Panel]) -> float:
    return sum(panel.inches for panel in column)


def _draw(axes: Axes, panel: Panel) -> None:
    _set_axis(axes, panel)
    at, names = 0.0, {}
    for row in panel.rows:
        names[at + (len(row.bars) - 1) / 2] = row.name
        for bar in row.bars:
            _draw_bar(axes, at, bar)
            at += 1
        at += GAP
    axes.set_yticks(list(names), list(names.values()))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - GAP, -1)
    axes.grid(axis="x")
    axes.set_title(panel.title)


def _draw_bar(axes: Axes, at: float, bar: Bar) -> None:
    axes.barh(at, bar.value, color=bar.colour, height=0.86)
    end = bar.value
    if bar.spread is not None:
        axes.plot(bar.spread, (at, at), color=INK, lw=0.9)
        end = max(end, bar.spread[1])
    axes.annotate(
        bar.said,
        (max(end, 0.0, axes.get_xlim()[0]), at),
        (4, 0),
        textcoords="offset points",
        fontsize=NOTE,
        va="center",
        color=bar.ink,
    ).set_in_layout(False)  # there is room, see _set_axis


def _set_axis(axes: Axes, panel: Panel) -> None:
    """Leaves room for words right of the longest bar."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415 # an extra

    values = [value for row in panel.rows for bar in row.bars for value in (bar.value, *(bar.spread or ()))]
    if panel.log:
        values = [value for value in values if value > 0] or [1.0]
        least, most = min(values) / 2, max(values)
        axes.set_xscale("log")
        axes.set_xlim(least, least * (most / least) ** (1 / SHARE))
        ticks = LogLocator(subs=(1,) if most / least > WIDE else (1, 2, 5)).tick_values(least, most)
    else:
        least, most = min(0.0, *values), max(0.0, *values) or 1.0
        axes.set_xlim(least, least + (most - least) / SHARE)
        ticks = MaxNLocator(TICKS, steps=(1, 2, 5, 10)).tick_values(least, most)
    axes.set_xticks([tick for tick in ticks if least <= tick <= most])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: panel.show(value))
