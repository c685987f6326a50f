"""``shmcache-stat --watch`` on a terminal: when it looks, when it draws, and what the keys do."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Final

from rich.console import Console, Group
from rich.text import Text

from shmcache_tools.program import Interrupts
from shmcache_tools.stat.views import View
from shmcache_tools.stat.watch.arena import arena_page
from shmcache_tools.stat.watch.arenas import arenas_page
from shmcache_tools.stat.watch.history import History, look_into
from shmcache_tools.stat.watch.keyboard import Keyboard
from shmcache_tools.stat.watch.page import Layout, Page, Sheet, clock_text, frame, lay_out, line_text
from shmcache_tools.stat.watch.terminal import Terminal
from shmcache_tools.stat.watch.wakeups import Wakeups
from shmcache_tools.text import make_facts, plural, printable

#: Signals that end a wait. A program that was stopped finds its terminal as the shell left it.
SIGNALS: Final = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)

_FIRST_S: Final = 0.5  #: after which rates are shown first, however long the interval
_INTERVALS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0, 86400.0)
_HELP: Final = (
    ("q, Ctrl-C", "quit"),
    ("space", "pause, and go on"),
    ("+ -", "look less often, more often"),
    ("up down, k j", "scroll by a line"),
    ("PgUp PgDn", "by a screen"),
    ("Home End, g G", "to the begin, to the end"),
    ("? h", "these keys, and back"),
    ("", ""),
    ("hits, hit rate", "keys that read found of those it was asked for, since the last look"),
    ("held, rsv, wr", "shares claimed, shares granted, objects being written"),
    ("max", "the highest in the line beside it, which has a value a look"),
)


class Live:
    """What is on the screen, and what happens next."""

    def __init__(self, view: View, interval_s: float, console: Console, keyboard: Keyboard | None) -> None:
        self._view = view
        self._interval_s = interval_s
        self._console = console
        self._keyboard = keyboard
        self._terminal = Terminal(console, keyboard)
        self._observer = view.observer()
        self._history = History()
        self._next_look = 0.0
        self._layout: Layout | None = None  #: None: what is drawn has changed
        self._size = (0, 0)
        self._first = 0  #: the first line of the body that is seen
        self._paused = self._helping = self._ended = False

    def run(self, waker: Wakeups, interrupts: Interrupts) -> None:
        """Until q, or until the terminal has gone."""
        with self._terminal:
            self._look()
            self._next_look = time.monotonic() + min(_FIRST_S, self._interval_s)
            while not self._ended:
                self._draw()
                pause = 3600.0 if self._paused else self._next_look - time.monotonic()
                signums, pressed = waker.wait(pause, self._keyboard.fd if self._keyboard else None)
                interrupts.check()
                self._obey(signums)
                if pressed:
                    self._take_keys()
                if not self._paused and time.monotonic() >= self._next_look:
                    self._look()

    def _look(self) -> None:
        look_into(self._history, self._observer)
        self._next_look = next_due(self._next_look, self._interval_s)
        self._layout = None

    def _draw(self) -> None:
        if (size := self._terminal.size()) != self._size:
            self._size, self._layout = size, None
        width, height = size
        if self._layout is None:
            sheet = sheet_of(self._console, width)
            page = help_page() if self._helping else page_of(self._view, self._history, sheet)
            self._layout = lay_out(page, self._console, width, height)
        self._first = min(max(0, self._first), self._layout.furthest)
        self._terminal.show(frame(self._layout, self._first, self._foot(self._layout), self._console, width))

    def _foot(self, layout: Layout) -> Text:
        """What the keys do, and where in the body we are."""
        where = ""
        if layout.furthest:
            where = f"{self._first + 1}-{self._first + layout.rows} of {len(layout.body)}"
        every = f"every {self._interval_s:g} s"
        paused = (" PAUSED ", "reverse bold") if self._paused else ""
        keys = f"  q quit  space pause  +- {every}  arrows scroll  ? keys" if self._keyboard else f"  {every}"
        line = line_text(paused, (keys if self._paused else keys.lstrip(), "dim"))
        room = self._size[0] - len(where) - 1
        if where and room > 0:
            line.truncate(room)
            line.append(where.rjust(self._size[0] - line.cell_len), "bold")
        return line

    def _obey(self, signums: set[int]) -> None:
        if signal.SIGTSTP in signums:
            self._terminal.leave()
            os.kill(os.getpid(), signal.SIGSTOP)
        if signums & {signal.SIGTSTP, signal.SIGCONT}:
            self._terminal.enter()

    def _take_keys(self) -> None:
        keys = self._keyboard.read() if self._keyboard else None
        if keys is None:
            self._ended = True
        for key in keys or ():
            self._press(key)

    def _press(self, key: str) -> None:
        if key == "q":
            self._ended = True
        elif key == " ":
            self._paused = not self._paused
        elif key in {"+", "=", "-"}:
            self._change_interval(longer=key != "-")
        elif key in {"?", "h"}:
            self._helping, self._layout, self._first = not self._helping, None, 0
        elif self._layout is not None:
            self._first = scrolled(key, self._first, self._layout)

    def _change_interval(self, *, longer: bool) -> None:
        changed = next_interval(self._interval_s, longer=longer)
        self._next_look += changed - self._interval_s
        self._interval_s = changed


def next_due(due: float, interval_s: float) -> float:
    """When to look again after the look that was due then: what was missed is left out."""
    now = time.monotonic()
    return due + interval_s if due + interval_s > now else now + interval_s


def scrolled(key: str, first: int, layout: Layout) -> int:
    """The first line of the body that is seen after a key."""
    page = max(1, layout.rows)
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pgup": -page, "pgdn": page}
    ends = {"home": 0, "g": 0, "end": layout.furthest, "G": layout.furthest}
    return min(max(0, ends.get(key, first + steps.get(key, 0))), layout.furthest)


def next_interval(interval_s: float, *, longer: bool) -> float:
    """The next of the usual intervals."""
    if longer:
        return next((usual for usual in _INTERVALS_S if usual > interval_s), interval_s)
    return next((usual for usual in reversed(_INTERVALS_S) if usual < interval_s), interval_s)


def sheet_of(console: Console, width: int) -> Sheet:
    """What can be drawn there."""
    colours = console.color_system is not None and not console.no_color
    return Sheet(width, utf8=not console.options.ascii_only, colours=colours)


def page_of(view: View, history: History, sheet: Sheet) -> Page:
    """What is seen of that view."""
    page = _page(view, history, sheet) if history.seen.now else Page(Group())
    if history.trouble is None:
        return page
    return replace(page, head=Group(Text(f"cannot look: {printable(history.trouble)}", "bold red"), page.head))


def _page(view: View, history: History, sheet: Sheet) -> Page:
    seen = history.seen
    drawn = view.objects or view.shares  # not numbers that go up and down, but a picture
    if view.name is not None and not (drawn and seen.infos):
        return arena_page(history, view.name, sheet)
    if not drawn:
        return arenas_page(history, sheet)
    name = plural(len(seen.infos), "arena") if view.name is None else printable(view.name)
    return Page(line_text((name, "bold"), right=clock_text(seen.now), width=sheet.width), body=view.draw(seen))


def help_page() -> Page:
    """The keys, and words that are short for something."""
    return Page(Text("keys", "bold"), body=make_facts(_HELP))
