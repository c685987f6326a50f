"""The maps of an arena in a terminal, one a region: cells coloured by standing, a legend, and how fragmented it is.

The maps of one arena share the height of the screen; each takes what the rest of it leaves. Where there is no colour
a cell is a letter; where there are enough colours it is half a character, or two where all blocks fit so large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from shmcache.stats import ArenaInfo
from shmcache_tools.look import Seen
from shmcache_tools.stat.block_map import (
    BlockMap,
    Chart,
    Fragmentation,
    Grid,
    Sizes,
    charts_of,
    fragmentation,
    grid_for,
    object_sizes,
)
from shmcache_tools.stat.regions_view import REGION_STYLES, device_cell, uuid_cell
from shmcache_tools.stat.standings import STANDINGS, Standing
from shmcache_tools.text import (
    BINARY_UNITS,
    count_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    printable,
    size_text,
)

_PIPED = (80, 40)  #: columns and lines of a map that no terminal bounds
_LABEL = 11  #: columns kept for the address at which a row begins, and the space after it
_AROUND = 2  #: lines: the title above, what a cell is below
_LEAST_LINES = 4  #: of the map, in whose favour the rest is told in short


def block_maps(seen: Seen) -> RenderableType:
    """The blocks of each arena, coloured by state."""
    if not seen.infos:
        return Text("no arenas of this user")
    parts = [part for info in seen.infos for drawn in _maps(info) for part in (Text(), drawn)]
    return Group(*parts[1:])


def _maps(info: ArenaInfo) -> Sequence[RenderableType]:
    """Of each of its regions, or why there are none."""
    if (problem := unreadable_text(info)) is not None:
        return [Text(problem, style="red")]
    charts = charts_of(info)
    return [_Map(title_text(info, chart), chart, len(charts)) for chart in charts]


def title_text(info: ArenaInfo, chart: Chart) -> str:
    """Which region that is; only the arena's name, where it has no other than host memory."""
    name, region = printable(info.name), chart.region
    if region is None:
        return f"{name} host memory" if info.regions else name
    return f"{name} region {region.number}, {device_cell(region).full} {uuid_cell(region).short}"


def unreadable_text(info: ArenaInfo) -> str | None:
    """Why an arena has no map; None if it has one."""
    if info.problem is not None:
        return f"{printable(info.name)} cannot be read: {printable(info.problem)}"
    if info.stats is None or info.objects is None:
        return f"{printable(info.name)}: its objects were not looked at"
    return None


def fragmentation_text(torn: Fragmentation) -> str:
    """How torn the free memory is."""
    if torn.fraction is None:
        return "nothing is free"
    runs = f"{plural(torn.runs, 'free run')}, the largest {size_text(torn.largest)}"
    return f"{percent_text(torn.fraction)}: {runs}"


def room_text(chart: Chart, torn: Fragmentation) -> str:
    """What a write can have."""
    if chart.lost:
        return "nothing: the region is lost"
    return f"at most {size_text(torn.obtainable)}: free, ready and dead blocks in a row"


def sizes_text(sizes: Sizes | None) -> str:
    """How large the objects are."""
    if sizes is None:
        return "no objects"
    smallest, median, largest = map(size_text, (sizes.smallest, sizes.median, sizes.largest))
    span = smallest if smallest == largest else f"{smallest} to {largest}, half up to {median}"
    return f"{span}; {percent_text(sizes.padding)} padding"


def address_texts(step: int, count: int) -> list[str]:
    """The first multiples of so many bytes, all in the largest unit in which none is rounded."""
    power = min(((step & -step).bit_length() - 1) // 10, len(BINARY_UNITS) - 1)
    return [f"{place * step >> 10 * power:,} {BINARY_UNITS[power]}" for place in range(count)]


def cell_text(region: BlockMap, grid: Grid) -> str:
    """What one cell stands for."""
    size = size_text(grid.blocks_per_cell * region.block_size)
    if grid.blocks_per_cell == 1:
        return f"a cell is a block, {size}"
    return f"a cell is {count_text(grid.blocks_per_cell)} blocks, {size}: what most of them are; dead if any is"


def extent_text(region: BlockMap) -> str:
    """How large the region is."""
    size, block_size = size_text(region.blocks * region.block_size), size_text(region.block_size)
    return f"{size} in {plural(region.blocks, 'block')} of {block_size}"


class _Map:
    """The map of one region; ``among`` so many on a screen."""

    def __init__(self, title: str, chart: Chart, among: int) -> None:
        self._title = title
        self._among = among
        self._chart = chart
        self._blocks = chart.blocks
        self._torn = fragmentation(chart.blocks)
        self._sizes = object_sizes(chart.objects, chart.blocks.block_size)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.max_height // self._among - 1  # the prompt, or a blank, comes below
        if not console.is_terminal:
            width, height = min(width, _PIPED[0]), _PIPED[1]
        coloured = _tells_colours(console, options)
        below = self._below(console, options.update(width=width, height=None), height, coloured)
        canvas = _canvas(self._blocks.blocks, width - _LABEL, height - _AROUND - len(below), coloured)
        lost = Text(" LOST ", REGION_STYLES["lost"]) if self._chart.lost else Text()
        title = Text.assemble((self._title, "bold"), " ", lost, f" {extent_text(self._blocks)}")
        title.no_wrap, title.overflow = True, "crop"
        yield title
        yield from self._rows(canvas)
        yield Text(cell_text(self._blocks, canvas.grid), style="dim", no_wrap=True, overflow="crop")
        for line in below:
            yield from line
            yield Segment.line()

    def _below(self, console: Console, options: ConsoleOptions, height: int, coloured: bool) -> list[list[Segment]]:
        """The lines below the map: in full, unless the map would be left too few."""
        full = console.render_lines(self._in_full(coloured), options, pad=False)
        if height - _AROUND - len(full) >= _LEAST_LINES:
            return full
        return console.render_lines(self._in_short(coloured), options, pad=False)

    def _rows(self, canvas: _Canvas) -> Iterator[Segment]:
        """The map, each line with the address at which it begins."""
        grid, block_size = canvas.grid, self._blocks.block_size
        cells: list[int] = self._blocks.cells(grid.blocks_per_cell).tolist()
        step = grid.columns * canvas.high
        begins = range(0, len(cells), step)
        addresses = address_texts(step * grid.blocks_per_cell * block_size, len(begins))
        indent = max(map(len, addresses))
        for begin, address in zip(begins, addresses, strict=True):
            middle = begin + grid.columns
            yield Segment(f"{address:>{indent}} ", Style(dim=True))
            yield from canvas.line(cells[begin:middle], cells[middle : begin + step])
            yield Segment.line()

    def _in_full(self, coloured: bool) -> RenderableType:
        facts = [
            ("fragmentation", fragmentation_text(self._torn)),
            ("one write", room_text(self._chart, self._torn)),
            ("object sizes", sizes_text(self._sizes)),
        ]
        return Group(Text(), self._legend(coloured), Text(), make_facts(facts))

    def _legend(self, coloured: bool) -> RenderableType:
        """What the colours mean, and how much is in each."""
        numbers = ("objects", "bytes", "of all")
        table = make_table("", *numbers, "", right=numbers)
        for standing, (runs, blocks) in zip(STANDINGS, self._blocks.totals(), strict=True):
            objects = "-" if standing.name == "free" else count_text(runs)
            share = percent_text(blocks / self._blocks.blocks)
            size = size_text(blocks * self._blocks.block_size)
            meaning = Text(standing.meaning, "dim", no_wrap=True, overflow="crop")  # a line more is one less of the map
            table.add_row(_swatch(standing, coloured), objects, size, share, meaning)
        return table

    def _in_short(self, coloured: bool) -> RenderableType:
        shares = [
            _swatch(standing, coloured).append(f" {percent_text(blocks / self._blocks.blocks)}")
            for standing, (_, blocks) in zip(STANDINGS, self._blocks.totals(), strict=True)
            if blocks
        ]
        return Group(Text("  ").join(shares), Text(f"fragmentation {fragmentation_text(self._torn)}"))


@dataclass(frozen=True, slots=True)
class _Canvas:
    """How cells become characters."""

    grid: Grid
    wide: int  #: characters of a cell
    high: int  #: cells that share a character, one above the other
    coloured: bool

    def line(self, upper: Sequence[int], lower: Sequence[int]) -> Iterator[Segment]:
        """A line of a map. ``lower``: the cells of its lower half, empty where there is none."""
        for (above, below), same in groupby(zip_longest(upper, lower)):
            characters = self.wide * sum(1 for _ in same)
            yield self._run(STANDINGS[above], None if below is None else STANDINGS[below], characters)

    def _run(self, above: Standing, below: Standing | None, characters: int) -> Segment:
        if not self.coloured:
            return Segment(above.glyph * characters, Style.parse(above.style))
        if self.high == 1 or above is below:
            return Segment("█" * characters, Style.parse(above.style))
        style = above.style if below is None else f"{above.style} on {below.style}"
        return Segment("▀" * characters, Style.parse(style))


def _canvas(blocks: int, columns: int, lines: int, coloured: bool) -> _Canvas:
    """The finest that fits."""
    if not coloured:
        return _Canvas(grid_for(blocks, columns, lines), wide=1, high=1, coloured=False)
    large = grid_for(blocks, columns // 2, lines)
    if large.blocks_per_cell == 1:
        return _Canvas(large, wide=2, high=1, coloured=True)
    return _Canvas(grid_for(blocks, columns, 2 * lines), wide=1, high=2, coloured=True)


def _tells_colours(console: Console, options: ConsoleOptions) -> bool:
    """Whether colours alone can tell the standings apart: sixteen are too few."""
    return console.color_system in ("256", "truecolor") and not console.no_color and not options.ascii_only


def _swatch(standing: Standing, coloured: bool) -> Text:
    """How the standing looks on the map, and its name."""
    return Text.assemble(("█" if coloured else standing.glyph, standing.style), f" {standing.name}")
