"""Tables that give way to the width there is: numbers and names get shorter, texts are cropped, columns go.

What goes first is said by each column, so that what a view is for stays; what went is told below the table.
Piped output is so wide (``PIPED_WIDTH``) that all of it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP: Final = 2  #: cells between columns, where there is room
_NARROW_GAP: Final = 1


@dataclass(frozen=True, slots=True)
class Column:
    """What a column is called, and how it gives way."""

    name: str
    short: str = ""  #: its name where width is scarce; as ``name`` if empty
    right: bool = False  #: numbers
    least: int | None = None  #: cells that are left of it when it is cropped; None: it is never cropped
    middle: bool = False  #: cropped in the middle: both ends tell texts apart
    goes: int = 0  #: the highest goes first; 0: it stays


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, the same text for where width is scarce, and how it looks."""

    full: str
    short: str = ""  #: as ``full`` if empty
    style: str = ""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A column as it is drawn: its header and its cells in one of the two forms, and how wide it is."""

    column: Column
    header: str
    cells: tuple[Text, ...]
    width: int

    @property
    def least(self) -> int:
        return self.width if self.column.least is None else min(self.width, self.column.least)


class FittedTable:
    """A table without rules that fits the width it is drawn at."""

    def __init__(self, columns: Iterable[Column]) -> None:
        self._columns = tuple(columns)
        self._rows: list[tuple[Cell, ...]] = []

    def add_row(self, cells: Iterable[Cell | str]) -> None:
        """One cell a column."""
        row = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
        if len(row) != len(self._columns):
            raise ValueError(f"expected {len(self._columns)} cells, got {len(row)}")
        self._rows.append(row)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        shown = self._form(short=False)
        if _total(shown, _GAP) > width:
            shown = _cropped(_narrowed(self._form(short=True), width), width)
        yield _table(shown, _GAP if _total(shown, _GAP) <= width else _NARROW_GAP)
        kept = {s.column.name for s in shown}
        if gone := [column.name for column in self._columns if column.name not in kept]:
            yield Text(f"not shown at this width: {', '.join(gone)}", style="dim")

    def _form(self, *, short: bool) -> list[_Shown]:
        """All columns, in full or in short."""
        shown: list[_Shown] = []
        for index, column in enumerate(self._columns):
            header = (short and column.short) or column.name
            cells = [row[index] for row in self._rows]
            texts = tuple(Text((short and cell.short) or cell.full, style=cell.style) for cell in cells)
            width = max([cell_len(header), *(text.cell_len for text in texts)])
            shown.append(_Shown(column, header, texts, width))
        return shown


def _total(shown: Sequence[_Shown], gap: int) -> int:
    return sum(s.width for s in shown) + gap * (len(shown) - 1)


def _narrowed(shown: list[_Shown], width: int) -> list[_Shown]:
    """Without the columns that must go, since it is not enough to crop all that may be."""
    while sum(s.least for s in shown) + _NARROW_GAP * (len(shown) - 1) > width:
        first = max(shown, key=lambda s: s.column.goes)
        if not first.column.goes:
            break
        shown = [s for s in shown if s is not first]
    return shown


def _cropped(shown: list[_Shown], width: int) -> list[_Shown]:
    """The widest of those that may be cropped are, cell by cell, until all fits."""
    widths = [s.width for s in shown]
    for _ in range(_total(shown, _NARROW_GAP) - width):
        croppable = [place for place, s in enumerate(shown) if widths[place] > s.least]
        if not croppable:
            break
        widths[max(croppable, key=widths.__getitem__)] -= 1
    return [replace(s, width=cells) for s, cells in zip(shown, widths, strict=True)]


def _table(shown: Sequence[_Shown], gap: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for s in shown:
        justify: Literal["left", "right"] = "right" if s.column.right else "left"
        table.add_column(s.header, justify=justify, no_wrap=True, overflow="ellipsis", width=s.width)
    for row in zip(*(s.cells for s in shown), strict=True):
        table.add_row(*(_crop(text, s) for text, s in zip(row, shown, strict=True)))
    return table


def _crop(text: Text, shown: _Shown) -> Text:
    """``text`` without its middle, where that is how its column is cropped; rich crops the others."""
    if not shown.column.middle or text.cell_len <= shown.width:
        return text
    right = (shown.width - 1) // 2
    left = shown.width - 1 - right
    return Text(f"{text.plain[:left]}…{text.plain[len(text.plain) - right :]}", style=text.style)
