"""All arenas of this user live, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from shmcache.stats import ArenaInfo, Stats
from shmcache_tools.rates import Rates
from shmcache_tools.stat.regions_view import device_memory_cell
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.stat.watch.bars import used_cell
from shmcache_tools.stat.watch.columns import Content, LiveColumn, LiveTable
from shmcache_tools.stat.watch.history import History
from shmcache_tools.stat.watch.page import Page, Sheet, clock_text, line_text
from shmcache_tools.stat.watch.series import READS, SERIES, short_number
from shmcache_tools.stat.watch.sparkline import sparkline
from shmcache_tools.text import (
    percent_text,
    plural,
    printable,
    short_count_text,
    short_percent_text,
    size_text,
)

_GONE_S: Final = 60.0  #: how long an arena that is gone is still shown
_SHORTEST: Final = 5  #: cells of a name
_READS: Final = SERIES.index(READS)


@dataclass(frozen=True, slots=True)
class _Row:
    info: ArenaInfo
    stats: Stats
    rates: Rates | None
    reads: Sequence[float | None]  #: over time

    def growth(self, *counters: str) -> str:
        return "-" if self.rates is None else short_number(self.rates.per_s(*counters))


def arenas_page(history: History, sheet: Sheet) -> Page:
    """A header over all of them, a line for each, and what somebody should do."""
    seen = history.seen
    gone = {name: when for name, when in history.gone.items() if seen.now - when < _GONE_S}
    longest = max(map(len, (*gone, *(info.name for info in seen.infos))), default=0)
    name_width = max(_SHORTEST, min(longest, sheet.width // 4))
    devices = any(info.regions for info in seen.infos)
    table = LiveTable(_columns(name_width, sheet, devices=devices), sheet.width)
    lines: list[RenderableType] = [_line(info, history, table, name_width) for info in seen.infos]
    lines += [Text(f"{_name(name, name_width)} gone since {clock_text(when)}", "dim") for name, when in gone.items()]
    if not lines:
        lines = [Text("no arenas of this user", "dim")]
    if remarks := remarks_of(seen.infos):
        lines += [Text(), *remarks]
    return Page(_title(seen.infos, seen.now, sheet), titles=table.titles(), body=Group(*lines))


def _title(infos: Sequence[ArenaInfo], now: float, sheet: Sheet) -> Text:
    stats = [info.stats for info in infos if info.stats is not None]
    used, capacity = sum(each.used_bytes for each in stats), sum(each.capacity for each in stats)
    dead, bad = sum(each.lanes_dead for each in stats), len(infos) - len(stats)
    return line_text(
        (plural(len(infos), "arena"), "bold"),
        f"  {size_text(used)} used of {size_text(capacity)}" if capacity else "",
        f", {percent_text(used / capacity)}" if capacity else "",
        (f"  {plural(dead, 'dead lane')}", "bold red") if dead else "",
        (f"  {bad} unreadable", "bold red") if bad else "",
        right=clock_text(now),
        width=sheet.width,
    )


def _line(info: ArenaInfo, history: History, table: LiveTable[_Row], name_width: int) -> Text:
    if info.stats is None:
        line = Text(f"{_name(info.name, name_width)} cannot be read: {printable(info.problem or '')}", "red")
        line.no_wrap, line.overflow = True, "ellipsis"
        return line
    rates = history.seen.rates.get(info.name)
    return table.row(_Row(info, info.stats, rates, history.timelines[info.name].values(_READS)))


def _columns(name_width: int, sheet: Sheet, *, devices: bool) -> Iterator[LiveColumn[_Row]]:
    yield LiveColumn("arena", name_width, lambda row: _arena_name(row, name_width), left=True)
    yield LiveColumn("used", 13, lambda row: used_cell(row.stats, 13, sheet))
    if devices:
        yield LiveColumn("device", 11, lambda row: _device(row.info))
    yield LiveColumn("hits", 4, _hit_rate)
    yield LiveColumn("read/s", 6, lambda row: row.growth("read_hits"))
    yield LiveColumn("look/s", 6, lambda row: row.growth("lookup_hits", "lookup_misses"), goes=2)
    yield LiveColumn("publ/s", 6, lambda row: row.growth("publishes"))
    yield LiveColumn("evic/s", 6, lambda row: row.growth("evictions"))
    yield LiveColumn("write/s", 7, _written)
    yield LiveColumn("held", 5, lambda row: short_count_text(row.stats.held))
    yield LiveColumn("rsv", 5, lambda row: short_count_text(row.stats.reserved), goes=3)
    yield LiveColumn("dead", 4, lambda row: _dead(row.stats))
    yield LiveColumn("keys read/s", 11, lambda row: partial(_reads_line, row, sheet), goes=4, grows=True)


def _device(info: ArenaInfo) -> tuple[str, str]:
    cell = device_memory_cell(info)
    return cell.short or cell.full, cell.style


def _reads_line(row: _Row, sheet: Sheet, width: int) -> Content:
    return sparkline(row.reads, width, utf8=sheet.utf8), "cyan"


def _name(name: str, width: int) -> str:
    """Cropped in the middle: both ends tell names apart."""
    name = printable(name)
    if len(name) > width:
        tail = (width - 1) // 2
        name = f"{name[: width - 1 - tail]}~{name[len(name) - tail :]}"
    return name.ljust(width)


def _arena_name(row: _Row, width: int) -> Content:
    return _name(row.info.name, width), "yellow" if row.info.stale else "bold"


def _hit_rate(row: _Row) -> str:
    return short_percent_text(None if row.rates is None else row.rates.hit_rate)


def _written(row: _Row) -> str:
    return "-" if row.rates is None else row.growth("published_bytes") + "B"


def _dead(stats: Stats) -> Content:
    return str(stats.lanes_dead), "bold red" if stats.lanes_dead else ""
