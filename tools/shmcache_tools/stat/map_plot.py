"""The map of each region as a picture, for a report: the blocks, what is in each standing, how torn the free is."""

from __future__ import annotations

import contextlib
import math
import secrets
import textwrap
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shmcache.stats import ArenaInfo, ObjectInfo
from shmcache_tools.look import Seen
from shmcache_tools.stat.block_map import CODES, BlockMap, Chart, Grid, charts_of, fragmentation, grid_for, object_sizes
from shmcache_tools.stat.map_view import (
    address_texts,
    cell_text,
    extent_text,
    fragmentation_text,
    room_text,
    sizes_text,
    title_text,
    unreadable_text,
)
from shmcache_tools.stat.standings import STANDINGS
from shmcache_tools.text import count_text, make_console, percent_text, plural, printable, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_ENDINGS: Final = (".svg", ".png")
_MOST_ARENAS: Final = 8
_MOST_MAPS: Final = 32  #: what one arena can have
_INCHES: Final = (13.0, 7.0)  #: of one map
_DPI: Final = 150
_COLUMNS, _ROWS = 512, 256  #: of cells at most
_PIXELS: Final = (1600, 800)  #: of the map at least
_SHAPE: Final = 2.5  #: columns to rows, about that of the space for the map
_TICKS: Final = 8
_LOST_COLOUR: Final = "#d70000"
_AGES: Final = (1, 10, 60, 600, 3600, 86400)  #: seconds
_AGE_NAMES: Final = ("< 1 s", "< 10 s", "< 1 min", "< 10 min", "< 1 h", "< 1 d", "older")
_MOST_WORDS: Final = 44  #: characters of a line beside the map

Numbers = NDArray[np.float64]


class PlotError(Exception):
    """The picture cannot be made."""


def save_maps(seen: Seen, path: Path) -> None:
    """Writes the map of each arena into one picture, .svg or .png, and says so."""
    if path.suffix.lower() not in _ENDINGS:
        raise PlotError(f"{path}: expected a name that ends in {' or '.join(_ENDINGS)}")
    problems = [problem for problem in map(unreadable_text, seen.infos) if problem is not None]
    infos = [info for info in seen.infos if unreadable_text(info) is None]
    if not infos:
        raise PlotError("; ".join(problems) or "no arenas of this user: there is nothing to draw")
    if len(infos) > _MOST_ARENAS:
        raise PlotError(f"{plural(len(infos), 'arena')} are too many for a picture, {_MOST_ARENAS} at most: name one")
    if (maps := sum(1 + len(info.regions) for info in infos)) > _MOST_MAPS:
        raise PlotError(f"{plural(maps, 'map')} are too many for a picture, {_MOST_MAPS} at most: name an arena")
    _draw_and_write(infos, seen.now, path)
    console = make_console()
    for line in (f"wrote {printable(str(path))}", *(f"left out: {problem}" for problem in problems)):
        console.print(line, soft_wrap=True)


def _draw_and_write(infos: list[ArenaInfo], now: float, path: Path) -> None:
    try:
        import matplotlib.style  # noqa: PLC0415 # an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise PlotError(f"a picture needs matplotlib: pip install 'shmcache[plot]' ({error})") from None
    with matplotlib.style.context("default"):  # whatever the user has set for other pictures
        width, height = _INCHES
        charts = [(info, chart) for info in infos for chart in charts_of(info)]
        figure = Figure(figsize=(width, height * len(charts)), layout="constrained")
        parts = figure.subfigures(len(charts), 1, squeeze=False).ravel()
        for (info, chart), part in zip(charts, parts, strict=True):
            _draw(part, title_text(info, chart), chart, now)
        _write(figure, path, ", ".join(info.name for info in infos))


def _write(figure: Figure, path: Path, names: str) -> None:
    """The file is there as a whole, or not at all."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with contextlib.ExitStack() as undo:
            with beside.open("xb") as file:
                undo.callback(beside.unlink, missing_ok=True)
                metadata: dict[str, Any] = {"Title": f"shmcache {names}"}
                figure.savefig(file, format=path.suffix[1:].lower(), dpi=_DPI, metadata=metadata)
            beside.replace(path)
    except OSError as error:
        raise PlotError(f"{path}: cannot be written: {error.strerror}; name a file in a directory of yours") from None


def _draw(part: SubFigure, title: str, chart: Chart, now: float) -> None:
    """All of one region."""
    region = chart.blocks
    day = datetime.fromtimestamp(now).astimezone().isoformat(sep=" ", timespec="seconds")
    title = f"arena {title}: {'LOST, ' if chart.lost else ''}{extent_text(region)}, {day}"
    part.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold", color=_LOST_COLOUR if chart.lost else "black")
    axes = part.subplot_mosaic(
        [["map", "map", "key"], ["runs", "ages", "key"]], height_ratios=(3, 1), width_ratios=(4, 4, 3.1)
    )
    grid = _grid(region.blocks)
    _draw_map(axes["map"], region, grid)
    _draw_free_runs(axes["runs"], region)
    _draw_ages(axes["ages"], chart, now)
    torn = fragmentation(region)
    facts = {
        "cells": cell_text(region, grid),
        "fragmentation": fragmentation_text(torn),
        "one write": room_text(chart, torn),
        "object sizes": sizes_text(object_sizes(chart.objects, region.block_size)),
    }
    _write_key(axes["key"], region, facts)


def _grid(blocks: int) -> Grid:
    """A grid as fine as the picture can show, and of its shape where the arena has few blocks."""
    columns = 1 << round(math.log2(math.sqrt(_SHAPE * blocks)))
    return grid_for(blocks, min(_COLUMNS, columns), _ROWS)


def _draw_map(axes: Axes, region: BlockMap, grid: Grid) -> None:
    """The blocks, and addresses at both axes."""
    row = grid.columns * grid.blocks_per_cell * region.block_size
    rows = grid.rows(region.blocks)
    axes.imshow(_image(region, grid), extent=(0, row, rows * row, 0), aspect="auto", interpolation="none")
    step = row << math.ceil(math.log2(max(1, rows / _TICKS)))
    count = -(-rows * row // step)
    axes.set_yticks([step * place for place in range(count)], address_texts(step, count))
    axes.set_xticks([row // 4 * place for place in range(4)], [f"+ {text}" for text in address_texts(row // 4, 4)])
    axes.tick_params(labelsize=8)
    axes.set_ylabel("address of the row", fontsize=9)


def _image(region: BlockMap, grid: Grid) -> NDArray[np.uint8]:
    """Pixels of every cell, so many that no viewer blurs their edges; what is left of the last row is white."""
    colours = [bytes.fromhex(standing.colour[1:]) for standing in STANDINGS]
    palette = np.frombuffer(b"".join([*colours, b"\xff\xff\xff"]), np.uint8).reshape(-1, 3)
    rows = grid.rows(region.blocks)
    codes = np.full(rows * grid.columns, len(STANDINGS), np.int8)
    cells = region.cells(grid.blocks_per_cell)
    codes[: len(cells)] = cells
    wide, high = _PIXELS
    codes = codes.reshape(rows, grid.columns).repeat(-(-high // rows), axis=0).repeat(-(-wide // grid.columns), axis=1)
    return palette[codes]


def _draw_free_runs(axes: Axes, region: BlockMap) -> None:
    """How much of the free memory is in runs of which size."""
    shares = free_by_size(region)
    axes.bar(range(len(shares)), shares, width=0.9, color=STANDINGS[CODES["free"]].colour)
    ticks = range(0, len(shares), -(-len(shares) // _TICKS))
    axes.set_xticks(list(ticks), [size_text(region.block_size << power) for power in ticks])
    _finish(axes, "free memory by the size of its runs: from this size to twice", shares)


def free_by_size(region: BlockMap) -> Numbers:
    """The part of the free memory that is in runs of 1 block, 2 to 3, 4 to 7, and so on up to the whole region."""
    sizes = region.runs("free").astype(np.float64)
    powers = np.frexp(sizes)[1] - 1
    return np.bincount(powers, weights=sizes, minlength=region.blocks.bit_length()) / max(1.0, float(sizes.sum()))


def _draw_ages(axes: Axes, chart: Chart, now: float) -> None:
    """How old the objects are, by standing: what is held for long stands out."""
    shares = blocks_by_age(chart.objects, now) / chart.blocks.blocks
    tops = shares.cumsum(axis=0)
    for standing, share, top in zip(STANDINGS, shares, tops, strict=True):
        axes.bar(_AGE_NAMES, share, bottom=top - share, width=0.9, color=standing.colour)
    _finish(axes, "blocks by the age of their objects, of the whole region", tops[-1])


def blocks_by_age(objects: Sequence[ObjectInfo], now: float) -> Numbers:
    """The blocks of each standing (rows) in objects of each age (columns)."""
    blocks = np.zeros((len(STANDINGS), len(_AGE_NAMES)))
    codes = np.array([CODES[o.standing] for o in objects], np.int64)
    ages = np.digitize(np.array([now - o.written for o in objects]), _AGES)
    np.add.at(blocks, (codes, ages), np.array([o.blocks for o in objects], np.float64))
    return blocks


def _finish(axes: Axes, title: str, heights: Numbers) -> None:
    """What the two charts have in common."""
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 # an extra

    axes.set_ylim(0, 1.1 * float(heights.max()) or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _write_key(axes: Axes, region: BlockMap, facts: dict[str, str]) -> None:
    """What the colours mean, how much is in each, and the numbers."""
    axes.set_axis_off()
    left, indent, line = 0.02, 0.065, 1 / 37
    y = 1 - line
    axes.text(indent, y, _key_line("", "objects", "bytes", "of all"), family="monospace", size=8, weight="bold")
    for standing, (runs, blocks) in zip(STANDINGS, region.totals(), strict=True):
        y -= 1.3 * line
        objects = "-" if standing.name == "free" else count_text(runs)
        size, share = size_text(blocks * region.block_size), percent_text(blocks / region.blocks)
        axes.text(left, y, "■", family="monospace", size=12, color=standing.colour)
        axes.text(indent, y, _key_line(standing.name, objects, size, share), family="monospace", size=8)
        y -= line
        axes.text(indent, y, standing.meaning, size=8, color="#606060")
    for name, fact in facts.items():
        y -= 2 * line
        axes.text(left, y, name, size=9, weight="bold")
        for words in textwrap.wrap(fact, _MOST_WORDS):
            y -= line
            axes.text(left, y, words, size=9)


def _key_line(name: str, objects: str, size: str, share: str) -> str:
    return f"{name:<9}{objects:>9}{size:>12}{share:>9}"
