"""A screen full of text: a head that stays, a body that scrolls below it, a last line for the keys.

Pure: knows the size of a screen and what it can show, and touches none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

Line = list[Segment]

_BLANK = Style()


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a page is drawn on: how wide, and with what."""

    width: int
    utf8: bool = True  #: else ASCII
    colours: bool = True


@dataclass(frozen=True, slots=True)
class Page:
    """What is to be seen, however long."""

    head: RenderableType  #: stays
    extras: Callable[[int], Sequence[Text]] = lambda _rows: ()  #: stay, too, in as many lines as they are given
    titles: Text | None = None  #: the line above the body, which stays
    body: RenderableType = field(default_factory=Text)  #: scrolls


@dataclass(frozen=True, slots=True)
class Layout:
    """A page in lines, on a screen of ``height`` lines of which the last is kept for the keys."""

    above: Sequence[Line]
    body: Sequence[Line]
    height: int

    @property
    def rows(self) -> int:
        """How many lines of the body are seen at once."""
        return max(0, self.height - 1 - len(self.above))

    @property
    def furthest(self) -> int:
        """How far the body can be scrolled."""
        return max(0, len(self.body) - self.rows)


def lay_out(page: Page, console: Console, width: int, height: int) -> Layout:
    """What of the page is seen. Of ``console`` only counts what it can show, not its size."""
    most = max(1, height - 2)  # a line for the body and one for the keys
    head = _lines(console, page.head, width, most)
    titles = [] if page.titles is None else _lines(console, page.titles, width, most)
    room = height - 1 - len(head) - len(titles)
    body = _lines(console, page.body, width, max(1, room))
    extras = page.extras(max(0, room - len(body), room // 2))
    between = [line for extra in extras for line in _lines(console, extra, width, most)]
    above = [*head, *between, *titles]
    return Layout(above[:most] if height > 1 else above[:1], body, height)


def frame(layout: Layout, first: int, foot: Text, console: Console, width: int) -> list[Line]:
    """The whole screen, every line filled up: the body from line ``first`` on, and the foot."""
    seen = [*layout.above, *layout.body[first : first + layout.rows]]
    if layout.height > 1:
        seen += [[]] * (layout.height - 1 - len(seen))
        seen += _lines(console, foot, width, 1)
    return [Segment.adjust_line_length(line, width, style=_BLANK) for line in seen]


def _lines(console: Console, shown: RenderableType, width: int, height: int) -> list[Line]:
    """What is drawn, line by line; ``height`` is told to what can choose its own."""
    options = console.options.update(width=width, height=None)
    options.max_height = height + 1  # a map leaves a line for the prompt
    lines = console.render_lines(shown, options, pad=False)
    while lines and not any(segment.text.strip() for segment in lines[-1]):
        lines.pop()
    return lines


def line_text(*parts: str | tuple[str, str] | Text, right: str = "", width: int = 0) -> Text:
    """One line that is cut, never wrapped; ``right`` ends at ``width``, where there is room for it."""
    line = Text.assemble(*parts, no_wrap=True, overflow="crop")
    gap = width - line.cell_len - cell_len(right)
    return line.append(" " * gap + right) if right and gap > 0 else line


def clock_text(when: float) -> str:
    """The time of day here of a Unix time."""
    return time.strftime("%H:%M:%S", time.localtime(when))
