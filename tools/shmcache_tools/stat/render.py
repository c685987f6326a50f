"""What people see of arenas: ``ArenaInfo`` turned into tables.

Pure: takes what one look found, touches no arena.  Every string that came out of an arena or ``/proc`` passes
``printable``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Final

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from shmcache.stats import BUCKETS_S, ArenaInfo, Counters, Gauges, Histogram, Histograms, Stats
from shmcache_tools.look import Seen
from shmcache_tools.rates import Rates
from shmcache_tools.stat.fitted_table import Cell, Column, FittedTable
from shmcache_tools.stat.lanes_view import age_cell, count_cell, lanes_in_use, lanes_table, size_cell
from shmcache_tools.stat.occupancy import OccupancyBar
from shmcache_tools.stat.regions_view import device_memory_cell, device_memory_text, regions_by_owner, regions_table
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.text import (
    age_text,
    count_text,
    gigabytes_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    printable,
    short_percent_text,
    size_text,
    time_text,
)

_COUNTERS_WIDTH: Final = 120  #: cells at most: a line of many counters is hard to follow

_DEVICE: Final = Column("device memory", "device", right=True)  #: only where an arena has any
_ARENA_COLUMNS: Final = (
    Column("objects", "obj", right=True),
    Column("groups", "grp", right=True, goes=2),
    Column("live", right=True),
    Column("dead", right=True),
    Column("reserved", "rsv", right=True),
    Column("held", right=True),
    Column("hit rate", "hits", right=True),
    Column("now", right=True),
    Column("age", right=True, goes=1),
    Column("state"),
)


def arenas_table(seen: Seen) -> RenderableType:
    """One line an arena, and below it what to do about those that need it."""
    if not seen.infos:
        return Text("no arenas of this user")
    device = [_DEVICE] if any(info.regions for info in seen.infos) else []
    first = Column("arena", least=12, middle=True), Column("capacity", "size", right=True), Column("used", right=True)
    table = FittedTable((*first, *device, *_ARENA_COLUMNS))
    for info in seen.infos:
        devices = [device_memory_cell(info)] if device else []
        table.add_row([printable(info.name), *_host_memory(info), *devices, *_arena_numbers(info, seen)])
    return _with_remarks([table], seen.infos)


def arena_in_full(seen: Seen) -> RenderableType:
    """All that is known of one arena."""
    if not seen.infos:
        return Text("no such arena any more")
    info = seen.infos[0]
    stats = info.stats
    if stats is None:
        return _with_remarks([make_facts(_identity(info, seen.now))], [info])
    rates = seen.rates.get(info.name)
    facts = [*_identity(info, seen.now), ("", ""), *_contents(info, stats), *_doings(stats, rates)]
    parts: list[RenderableType] = [make_facts(facts), Text(), OccupancyBar(stats)]
    if info.regions:
        parts += [Text(), regions_table(info)]
    parts += [Text(), lanes_table(info.lanes, seen.now, regions_by_owner(info)), _vacant_lanes(info)]
    parts += [Text(), counters_table(stats.counters, rates)]
    if times := times_table(stats.histograms):
        parts += [Text(), times]
    return _with_remarks(parts, [info])


def counters_table(counters: Counters, rates: Rates | None = None) -> RenderableType:
    """The counters that have counted anything, read downwards, with what they grow by a second now."""
    counted = {name: count for name, count in asdict(counters).items() if count}
    if not counted:
        return Text("all counters are 0", style="dim")
    growth = {name: f" +{rates.per_s(name):,.0f}/s" for name in counted if rates and rates.count(name)}
    columns = Columns(_counter_lines(counted, growth), padding=(0, 3), equal=True, column_first=True)
    parts: list[RenderableType] = [Constrain(columns, _COUNTERS_WIDTH)]
    if len(counted) < len(asdict(counters)):
        parts.append(Text("all other counters are 0", style="dim"))
    return Group(*parts)


def _counter_lines(counted: Mapping[str, int], growth: Mapping[str, str]) -> Iterator[Text]:
    """Name, count and growth of each, in columns of their own."""
    names = max(map(len, counted))
    counts = max(len(count_text(count)) for count in counted.values())
    growths = max(map(len, growth.values()), default=0)
    for name, count in counted.items():
        words = (name.replace("_", " ").ljust(names), "bold"), f" {count_text(count):>{counts}}"
        yield Text.assemble(*words, (growth.get(name, "").rjust(growths), "cyan"))


def times_table(histograms: Histograms) -> Table | None:
    """How long prefetches and calls of L2 took; None where there were none. Quantiles are bounds from above."""
    numbers = ("count", "mean", "p50", "p99")
    table = make_table("time of", *numbers, right=numbers)
    for name in Histograms.__slots__:
        times: Histogram = getattr(histograms, name)
        if times.count:
            quantiles = (_quantile_text(times, 0.5), _quantile_text(times, 0.99))
            mean = time_text(times.sum_s / times.count)
            table.add_row(name.replace("_", " "), count_text(times.count), mean, *quantiles)
    return table if table.row_count else None


def _quantile_text(times: Histogram, q: float) -> str:
    bound = times.quantile_s(q) or 0.0
    return time_text(bound) if math.isfinite(bound) else f"above {time_text(BUCKETS_S[-2])}"


def _with_remarks(parts: list[RenderableType], infos: Iterable[ArenaInfo]) -> RenderableType:
    found = remarks_of(infos)
    return Group(*parts, Text(), *found) if found else Group(*parts)


def _identity(info: ArenaInfo, now: float) -> list[tuple[str, str | Text]]:
    state = _state_cell(info)
    facts: list[tuple[str, str | Text]] = [
        ("arena", _whole(info.name)),
        ("state", Text(state.full, style=state.style)),
        ("segment", _whole(_segment_text(info))),
    ]
    if info.stats is None:
        return facts
    created = datetime.fromtimestamp(info.created).astimezone().isoformat(sep=" ", timespec="seconds")
    leases = f"read {info.read_lease_s:g} s, write {info.write_lease_s:g} s"
    return [
        *facts,
        ("created", f"{created}, {age_text(now - info.created)} ago"),
        ("fingerprint", _whole(info.fingerprint or "none")),
        ("leases", f"{leases}; lock timeout {info.lock_timeout_s:g} s"),
        ("eviction", _eviction_text(info)),
        ("lock", _lock_text(info)),
    ]


def _eviction_text(info: ArenaInfo) -> str:
    window_s = info.eviction_window_s
    return f"segmented, a request is worth {window_s:g} s" if window_s else "lru"


def _segment_text(info: ArenaInfo) -> str:
    huge = f", tmpfs huge={info.huge}" if info.huge not in {"", "never"} else ""
    return f"{info.path or '-'}, {size_text(info.segment_bytes)}, inode {info.inode}{huge}"


def _whole(text: str) -> Text:
    """A text from outside, of which nothing is left out, however long its words are."""
    return Text(printable(text), overflow="fold")


def _contents(info: ArenaInfo, stats: Stats) -> list[tuple[str, str | Text]]:
    """What is in it."""
    readable, writing, slots = map(count_text, (stats.objects, stats.writing, stats.slots))
    used = f"{size_text(stats.used_bytes)}, {percent_text(_used(stats))}"
    host = " of host memory" if info.regions else ""
    return [
        ("capacity", f"{size_text(stats.capacity)}{host} in blocks of {size_text(stats.block_size)}"),
        ("used", f"{used}; {size_text(stats.resident_bytes)} of memory, metadata included"),
        *([("devices", device_memory_text(info))] if info.regions else []),
        ("objects", f"{readable} readable, {writing} being written, at most {slots}"),
        ("layouts", count_text(info.layouts)),
        ("shares", f"{count_text(stats.reserved)} reserved, {count_text(stats.held)} held"),
    ]


def _doings(stats: Stats, rates: Rates | None) -> list[tuple[str, str | Text]]:
    """What was done with it since it was created, and is now."""
    counters = stats.counters
    evicted = f"{plural(counters.evictions, 'object')}, {size_text(counters.evicted_bytes)}"
    refused = f"{plural(counters.no_space, 'reservation')} refused for lack of room"
    facts: list[tuple[str, str | Text]] = [
        ("hit rate", f"{percent_text(stats.hit_rate)} of the keys asked of read"),
        ("evictions", f"{evicted}; {refused}"),
        *_storage_facts(counters, stats.gauges),
    ]
    if rates is not None:
        read, written, gone = (f"{rates.per_s(name):,.0f}" for name in ("read_hits", "publishes", "evictions"))
        doing = f"{read} keys read/s, {percent_text(rates.hit_rate)} hits"
        facts.append(("now", f"{doing}; {written} objects published/s, {gone} evicted/s"))
    return facts


def _storage_facts(counters: Counters, gauges: Gauges) -> list[tuple[str, str | Text]]:
    """Prefetches and L2 in words, where there were any."""
    facts: list[tuple[str, str | Text]] = []
    if asked := counters.prefetch_keys:
        l1, l2 = counters.prefetch_l1_hits / asked, counters.prefetch_l2_hits / asked
        going_on = f"{count_text(gauges.prefetch_in_flight)} in flight, {count_text(gauges.prefetch_queued)} queued"
        requests = f"{plural(counters.prefetch_requests, 'request')} of {plural(asked, 'key')}"
        facts += [("prefetch", f"{requests}: {percent_text(l1)} from L1, {percent_text(l2)} from L2; {going_on}")]
    if counters.l2_loads or counters.l2_stores:
        loaded = f"{plural(counters.l2_loads, 'object')} loaded, {gigabytes_text(counters.l2_loaded_bytes)}"
        stored = f"{count_text(counters.l2_stores)} stored, {gigabytes_text(counters.l2_stored_bytes)}"
        backlog = f", {size_text(gauges.l2_backlog_bytes)} on their way" if gauges.l2_backlog_bytes else ""
        failures = counters.l2_lookup_errors + counters.l2_load_errors + counters.l2_store_errors + counters.l2_timeouts
        wrong = f"{plural(failures, 'failure')}, {count_text(counters.l2_damaged)} damaged"
        facts += [("L2", f"{loaded}; {stored}{backlog}; {wrong}")]
    return facts


def _lock_text(info: ArenaInfo) -> str:
    if info.lock is None:
        return "free"
    life = "alive" if info.lock.alive else "dead"
    return f"held by lane {info.lock.lane}, incarnation {info.lock.incarnation}, pid {info.lock.pid} ({life})"


def _vacant_lanes(info: ArenaInfo) -> Text:
    vacant = info.lane_limit - len(lanes_in_use(info.lanes))
    return Text(f"{plural(vacant, 'lane')} of {info.lane_limit} vacant", style="dim")


def _used(stats: Stats) -> float | None:
    return stats.used_bytes / stats.capacity if stats.capacity else None


def _host_memory(info: ArenaInfo) -> tuple[Cell, Cell]:
    """Its capacity, and how much of it is used."""
    if info.stats is None:
        return Cell("-"), Cell("-")
    return size_cell(info.stats.capacity), _percent_cell(_used(info.stats))


def _arena_numbers(info: ArenaInfo, seen: Seen) -> list[Cell]:
    stats, rates = info.stats, seen.rates.get(info.name)
    if stats is None:
        return [*[Cell("-")] * (len(_ARENA_COLUMNS) - 1), _state_cell(info)]
    return [
        count_cell(stats.objects),
        count_cell(stats.groups),
        count_cell(stats.lanes_alive),
        count_cell(stats.lanes_dead, "bold red" if stats.lanes_dead else ""),
        count_cell(stats.reserved),
        count_cell(stats.held),
        _percent_cell(stats.hit_rate),
        _percent_cell(rates.hit_rate if rates else None),
        age_cell(seen.now - info.created),
        _state_cell(info),
    ]


def _percent_cell(fraction: float | None) -> Cell:
    return Cell(percent_text(fraction), short_percent_text(fraction))


def _state_cell(info: ArenaInfo) -> Cell:
    if info.stale:
        return Cell("stale", style="yellow")
    return Cell("in use", style="green") if info.problem is None else Cell("unreadable", style="bold red")
