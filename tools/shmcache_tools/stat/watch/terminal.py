"""The terminal while a program has all of it: another screen, no cursor, keys at once; as before when it ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control

from shmcache_tools.stat.watch.keyboard import Keyboard
from shmcache_tools.stat.watch.page import Line

_USUAL_SIZE: Final = (80, 24)  #: of a terminal that does not know its own


class Terminal:
    """Within ``with`` it is ours."""

    def __init__(self, console: Console, keyboard: Keyboard | None) -> None:
        self._console = console
        self._keyboard = keyboard

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """Take it, also where it is ours but somebody else used it meanwhile."""
        if self._keyboard is not None:
            self._keyboard.open()
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def leave(self) -> None:
        """Give it back as it was. Bears that it has gone."""
        try:
            with contextlib.suppress(OSError):
                self._console.show_cursor(True)
                self._console.set_alt_screen(False)
        finally:
            if self._keyboard is not None:
                self._keyboard.close()

    def size(self) -> tuple[int, int]:
        """Columns and lines as they are now, whatever the environment says."""
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        return columns or _USUAL_SIZE[0], lines or _USUAL_SIZE[1]

    def show(self, lines: Iterable[Line]) -> None:
        """The whole screen."""
        self._console.print(_Screen(lines), end="", crop=False)


class _Screen:
    """Lines that are put in their place one by one: no line end ever scrolls the screen."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for y, line in enumerate(self._lines):
            yield Control.move_to(0, y).segment
            yield from line
