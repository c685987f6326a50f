"""``shmcache-stat --watch`` into a pipe or a file: a line an arena each time, as ``vmstat``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console

from shmcache.stats import Stats
from shmcache_tools.look import Seen
from shmcache_tools.rates import Rates
from shmcache_tools.stat.views import View
from shmcache_tools.stat.watch.history import History
from shmcache_tools.text import percent_text, printable

_HEADER_EVERY: Final = 20  #: lines
_COLUMNS: Final = (
    ("used", 8),
    ("objects", 8),
    ("lookup/s", 9),
    ("read/s", 9),
    ("hits", 8),
    ("publ/s", 8),
    ("evict/s", 8),
    ("MB/s", 8),
    ("held", 7),
    ("reserved", 8),
    ("dead", 5),
)


class Lines:
    """What is printed of each look."""

    def __init__(self, view: View, console: Console) -> None:
        self._view = view
        self._console = console
        self._name_width = len(printable(view.name or "arena"))
        self._until_header = 0

    def of(self, history: History) -> str:
        """The text of the last look."""
        seen = history.seen
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen.now if history.trouble is None else None))
        if history.trouble is not None:
            return f"{when} cannot look: {printable(history.trouble)}\n"
        if self._view.name is not None and not seen.infos:
            return f"{when} {printable(self._view.name)} is not there\n"
        if self._view.objects or self._view.shares:
            return f"{when}\n{self._drawn(seen)}\n"
        return "".join(self._lines(when, seen)) or f"{when} no arenas of this user\n"

    def _drawn(self, seen: Seen) -> str:
        with self._console.capture() as capture:
            self._console.print(self._view.draw(seen))
        return capture.get()

    def _lines(self, when: str, seen: Seen) -> Iterator[str]:
        names = [printable(info.name) for info in seen.infos]
        self._name_width = max([self._name_width, *map(len, names)])
        for name, info in zip(names, seen.infos, strict=True):
            if self._until_header == 0:
                self._until_header = _HEADER_EVERY
                yield self._line("time", "arena", [title for title, _ in _COLUMNS])
            self._until_header -= 1
            if info.stats is None:
                yield f"{self._start(when, name)} cannot be read: {printable(info.problem or '')}\n"
            else:
                yield self._line(when, name, _numbers(info.stats, seen.rates.get(info.name)))

    def _line(self, when: str, name: str, cells: Sequence[str]) -> str:
        numbers = (f" {cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        return self._start(when, name) + "".join(numbers) + "\n"

    def _start(self, when: str, name: str) -> str:
        return f"{when:<19} {name:<{self._name_width}}"


def _numbers(stats: Stats, rates: Rates | None) -> list[str]:
    def rate(*counters: str) -> str:
        return "-" if rates is None else _plain(rates.per_s(*counters))

    return [
        _percent(stats.used_bytes / stats.capacity if stats.capacity else None),
        str(stats.objects),
        rate("lookup_hits", "lookup_misses"),
        rate("read_hits"),
        _percent(None if rates is None else rates.hit_rate),
        rate("publishes"),
        rate("evictions"),
        "-" if rates is None else _plain(rates.per_s("published_bytes") / 1e6),
        str(stats.held),
        str(stats.reserved),
        str(stats.lanes_dead),
    ]


def _plain(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _percent(fraction: float | None) -> str:
    return percent_text(fraction).replace(" ", "")
