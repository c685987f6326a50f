"""Tables of a live view: columns of a fixed width, so that nothing jumps as numbers change; what does not fit goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text

T = TypeVar("T")

Content = str | tuple[str, str] | Text  #: a text, one with a style, or one of several styles
Fitting = Callable[[int], Content]  #: a text as wide as it is told


@dataclass(frozen=True, slots=True)
class LiveColumn(Generic[T]):
    """One column."""

    title: str
    width: int
    cell: Callable[[T], Content | Fitting]  #: what is there of an item
    goes: int = 0  #: the highest goes first where room is short; 0: never
    left: bool = False  #: else at the right, as numbers
    grows: bool = False  #: takes what room is left


class LiveTable(Generic[T]):
    """The columns that fit in ``width`` cells."""

    def __init__(self, columns: Iterable[LiveColumn[T]], width: int) -> None:
        chosen = list(columns)
        while _width(chosen) > width and any(column.goes for column in chosen):
            chosen.remove(max(chosen, key=lambda column: column.goes))
        spare = max(0, width - _width(chosen))
        self._columns = [(column, column.width + (spare if column.grows else 0)) for column in chosen]

    def titles(self) -> Text:
        """The line above the table."""
        line = _row((column.title, width, column.left) for column, width in self._columns)
        line.stylize("reverse")
        return line

    def row(self, item: T) -> Text:
        """One line of it."""
        return _row((column.cell(item), width, column.left) for column, width in self._columns)


def _width(columns: Sequence[LiveColumn[T]]) -> int:
    return sum(column.width + 1 for column in columns) - 1


def _row(cells: Iterable[tuple[Content | Fitting, int, bool]]) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    for content, width, left in cells:
        cell = Text.assemble(content(width) if callable(content) else content)
        cell.truncate(width)
        pad = " " * (width - cell.cell_len)
        line.append(" " if line else "")
        line.append_text(Text.assemble(cell, pad) if left else Text.assemble(pad, cell))
    return line
