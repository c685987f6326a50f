"""One arena live: how full and why, what goes on, and below it its lanes as ``htop`` shows processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from shmcache.stats import ArenaInfo, LaneInfo, RegionInfo, Stats
from shmcache_tools.rates import Rates
from shmcache_tools.stat.lanes_view import lanes_in_use, owner_cells, state_of
from shmcache_tools.stat.occupancy import OccupancyBar
from shmcache_tools.stat.regions_view import (
    REGION_STYLES,
    device_cell,
    owner_of,
    regions_by_owner,
    used_fraction,
    uuid_cell,
)
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.stat.watch.bars import region_bar
from shmcache_tools.stat.watch.columns import LiveColumn, LiveTable
from shmcache_tools.stat.watch.history import History, Timeline
from shmcache_tools.stat.watch.page import Page, Sheet, clock_text, line_text
from shmcache_tools.stat.watch.series import Series, series_of, short_number
from shmcache_tools.stat.watch.sparkline import sparkline
from shmcache_tools.text import (
    age_text,
    count_text,
    percent_text,
    plural,
    printable,
    short_age_text,
    short_count_text,
    short_percent_text,
    short_size_text,
)

_WIDE: Final = 100  #: cells from which on the series stand in two columns
_URGENT: Final = {"dead": 0, "stopped": 1}  #: these lanes come first


def arena_page(history: History, name: str, sheet: Sheet) -> Page:
    """The arena ``name``, whatever has become of it."""
    seen = history.seen
    info = next((info for info in seen.infos if info.name == name), None)
    if info is None:
        return Page(_absent(history, name, sheet))
    if info.stats is None:
        return Page(Group(_title(info, seen.now, sheet), *remarks_of([info])))
    rates = seen.rates.get(name)
    lanes = sorted(lanes_in_use(info.lanes), key=lambda lane: _URGENT.get(state_of(lane), 2))
    table = LiveTable(_lane_columns(info, seen.now), sheet.width)
    owned = regions_by_owner(info)
    rows: list[RenderableType] = [
        table.row(_Row(lane, None if rates is None else rates.lanes.get(lane.index), owned.get(lane.index, "-")))
        for lane in lanes
    ]
    return Page(
        Group(_title(info, seen.now, sheet), _facts(info.stats), OccupancyBar(info.stats)),
        partial(_extras, info, info.stats, history.timelines[name], sheet),
        table.titles(),
        Group(*(rows or [Text("no lane in use", style="dim")]), Text(), *remarks_of([info])),
    )


def _absent(history: History, name: str, sheet: Sheet) -> RenderableType:
    now = history.seen.now
    when = history.gone.get(name)
    if when is None:
        news = "no such arena yet; it is shown as soon as it is there"
    else:
        news = f"gone since {clock_text(when)}; it is shown again when it is back"
    title = line_text((printable(name), "bold"), right=clock_text(now), width=sheet.width)
    return Group(title, Text(news, style="yellow"))


def _title(info: ArenaInfo, now: float, sheet: Sheet) -> Text:
    parts: list[str | tuple[str, str]] = [(printable(info.name), "bold")]
    if info.stats is None:
        parts += [("  unreadable", "bold red")]
    else:
        alive, dead = info.stats.lanes_alive, info.stats.lanes_dead
        parts += [("  stale", "yellow")] if info.stale else [f"  {plural(alive, 'lane')} alive"]
        parts += ["  ", (f"{count_text(dead)} dead", "bold red")] if dead else []
        parts += [f"  {age_text(now - info.created)} old", ("  " + _stuck_lock(info), "bold red")]
    return line_text(*parts, right=clock_text(now), width=sheet.width)


def _stuck_lock(info: ArenaInfo) -> str:
    """Who keeps the others from changing anything, if somebody does; to hold the lock for a moment is no news."""
    if info.lock is None:
        return ""
    holder = next((lane for lane in info.lanes if lane.index == info.lock.lane), None)
    state = "dead" if not info.lock.alive else "stopped" if holder is not None and holder.stopped else ""
    return f"lock held by {state} pid {info.lock.pid}" if state else ""


def _facts(stats: Stats) -> Text:
    used = percent_text(stats.used_bytes / stats.capacity if stats.capacity else None)
    objects = f"{count_text(stats.objects)} of at most {plural(stats.slots, 'object')}"
    facts = f"{used} used  {objects}  {count_text(stats.held)} held  {count_text(stats.reserved)} reserved"
    gauges = stats.gauges
    if gauges.prefetch_in_flight or gauges.prefetch_queued:
        facts += f"  prefetch: {gauges.prefetch_in_flight} in flight, {gauges.prefetch_queued} queued"
    return line_text(facts)


def _extras(info: ArenaInfo, stats: Stats, timeline: Timeline, sheet: Sheet, rows: int) -> Sequence[Text]:
    """A line a region of device memory, lost ones rather than others, and then the series."""
    table = LiveTable(_region_columns(info, sheet), sheet.width)
    regions = sorted(info.regions, key=lambda region: region.state != "lost")[:rows]
    lines = [table.row(region) for region in sorted(regions, key=lambda region: region.number)]
    return [*lines, *_series_lines(stats, timeline, sheet, rows - len(lines))]


def _region_columns(info: ArenaInfo, sheet: Sheet) -> Iterator[LiveColumn[RegionInfo]]:
    """They have no titles, so what is there says what it is."""
    yield LiveColumn("", 9, lambda region: f"region {region.number}", left=True)
    yield LiveColumn("", 7, lambda region: device_cell(region).full, goes=2, left=True)
    yield LiveColumn("", 12, lambda region: uuid_cell(region).short, goes=4, left=True)
    yield LiveColumn("", 6, lambda region: partial(region_bar, region, sheet), goes=1, grows=True)
    yield LiveColumn("", 4, lambda region: short_percent_text(used_fraction(region)))
    yield LiveColumn("", 9, lambda region: f"of {short_size_text(region.capacity)}", left=True)
    yield LiveColumn("", 11, lambda region: _owner_text(owner_of(info, region)), goes=3, left=True)
    yield LiveColumn("", 8, lambda region: f"{len(region.opened)} open", goes=5, left=True)
    yield LiveColumn("", 4, _region_state, left=True)


def _region_state(region: RegionInfo) -> tuple[str, str]:
    return printable(region.state), REGION_STYLES.get(region.state, "")


def _owner_text(lane: LaneInfo | None) -> str:
    return f"pid {lane.pid}" if lane is not None and lane.pid else "owner gone"


def _series_lines(stats: Stats, timeline: Timeline, sheet: Sheet, rows: int) -> Sequence[Text]:
    """A line a series, or for two where there is the width and not the height."""
    shown = series_of(stats)
    columns = 2 if len(shown) > rows and sheet.width >= _WIDE else 1
    width = (sheet.width - 2 * (columns - 1)) // columns
    cells = [_series_cell(series, timeline.values(place), width, sheet) for place, series in shown[: rows * columns]]
    height = -(-len(cells) // columns)
    return [Text("  ").join(cells[line::height]) for line in range(height)]


def _series_cell(series: Series, values: Sequence[float | None], width: int, sheet: Sheet) -> Text:
    """Name, value now, what it was, and how high that goes."""
    label = f"{series.name:<20}{_value_text(series, values[-1:]):>7} "
    room = width - len(label) - 12
    if room < 8:
        return line_text(label)
    line = sparkline(values, room, series.top, utf8=sheet.utf8)
    highest = max((value for value in values[-room:] if value is not None), default=None)
    top = f" max {_value_text(series, [highest])}"
    style = "bold red" if series.bad and values[-1:] and values[-1] else "bold"
    return line_text(label[:20], (label[20:], style), (line, "cyan"), (f"{top:<12}", "dim"))


def _value_text(series: Series, values: Sequence[float | None]) -> str:
    return "-" if not values or values[0] is None else series.text(values[0])


class _Row:
    """One lane, and what it does."""

    def __init__(self, lane: LaneInfo, rates: Rates | None, regions: str) -> None:
        self.lane = lane
        self.regions = regions
        self.reads = "-" if rates is None else short_number(rates.per_s("read_hits"))
        _, self.group, self.rank, self.pid, self.command, self.state = owner_cells(lane)


def _lane_columns(info: ArenaInfo, now: float) -> Iterator[LiveColumn[_Row]]:
    yield LiveColumn("group", 10, lambda row: row.group.full, goes=6, left=True)
    yield LiveColumn("rank", 4, lambda row: row.rank.short or row.rank.full)
    yield LiveColumn("pid", 7, lambda row: row.pid.full)
    yield LiveColumn("state", 7, lambda row: (row.state.full, row.state.style), left=True)
    yield LiveColumn("read/s", 6, lambda row: row.reads)
    yield LiveColumn("held", 5, lambda row: short_count_text(row.lane.held))
    yield LiveColumn("bytes", 6, lambda row: short_size_text(row.lane.held_bytes), goes=2)
    yield LiveColumn("oldest", 6, lambda row: _oldest(row.lane, now), goes=1)
    yield LiveColumn("rsv", 5, lambda row: short_count_text(row.lane.reserved), goes=4)
    yield LiveColumn("wr", 3, lambda row: short_count_text(row.lane.writing), goes=5)
    if any(lane.gauges.pinned_bytes for lane in info.lanes):
        yield LiveColumn("pinned", 6, lambda row: _pinned(row.lane), goes=7)
    if info.regions:
        yield LiveColumn("reg", 4, lambda row: row.regions, goes=8)
    yield LiveColumn("command", 8, lambda row: row.command.full, goes=3, left=True, grows=True)


def _pinned(lane: LaneInfo) -> str:
    return short_size_text(lane.gauges.pinned_bytes) if lane.gauges.pinned_bytes else "-"


def _oldest(lane: LaneInfo, now: float) -> str:
    return "-" if lane.oldest_held is None else short_age_text(now - lane.oldest_held)
