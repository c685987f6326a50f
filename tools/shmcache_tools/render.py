"""What people see of an arena: ``ArenaInfo`` turned into tables.

Pure: takes what ``shmcache.inspect`` gave and the time of day, touches no arena.  Every string that
came out of an arena or ``/proc`` passes ``printable``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shmcache.stats import BUCKETS_S, ArenaInfo, Counters, Gauges, Histogram, Histograms, LaneInfo, Stats
from shmcache_tools.text import (
    age_text,
    count_text,
    gigabytes_text,
    make_facts,
    make_table,
    percent_text,
    plural,
    printable,
    size_text,
    time_text,
)

_STATE_STYLES = {"alive": "green", "dead": "bold red", "vacant": "dim"}
_COUNTER_COLUMNS = 3


def arenas_table(infos: Sequence[ArenaInfo], now: float) -> RenderableType:
    """One line an arena, and below it what to do about those that need it."""
    if not infos:
        return Text("no arenas of this user")
    numbers = ("capacity", "used", "objects", "alive", "dead", "reserved", "held", "hit rate", "age")
    table = make_table("arena", *numbers, "state", right=numbers)
    for info in infos:
        table.add_row(printable(info.name), *_arena_numbers(info, now), _arena_state(info))
    remarks = [remark for info in infos for remark in _remarks(info)]
    return Group(table, Text(), *remarks) if remarks else table


def arena_in_full(info: ArenaInfo, now: float) -> RenderableType:
    """All that is known of one arena."""
    if info.stats is None:
        return Group(make_facts(_identity(info)), Text(), *_remarks(info))
    parts: list[RenderableType] = [make_facts([*_identity(info), *_facts(info, info.stats, now)])]
    parts += [Text(), lanes_table(info.lanes), _vacant_lanes(info)]
    parts += [Text(), counters_table(info.stats.counters)]
    if times := times_table(info.stats.histograms):
        parts += [Text(), times]
    if remarks := _remarks(info):
        parts += [Text(), *remarks]
    return Group(*parts)


def shares_table(infos: Iterable[ArenaInfo]) -> RenderableType:
    """The lanes that hold shares or have some reserved, of all arenas given, most held first."""
    rows = [(info, lane) for info in infos for lane in info.lanes if lane.reserved or lane.held]
    if not rows:
        return Text("no shares")
    rows.sort(key=lambda row: (-row[1].held, -row[1].reserved, row[0].name, row[1].index))
    numbers = ("held", "reserved", "lane", "rank", "pid")
    table = make_table("arena", *numbers[:3], "group", *numbers[3:], "command", "state", right=numbers)
    for info, lane in rows:
        table.add_row(
            printable(info.name),
            count_text(lane.held),
            count_text(lane.reserved),
            str(lane.index),
            *_lane_owner(lane),
            _lane_state(lane),
        )
    return table


def lanes_table(lanes: Sequence[LaneInfo]) -> Table:
    """The lanes that somebody owns or that still carry something."""
    numbers = ("lane", "rank", "pid", "incarnation", "reserved", "held", "writing")
    table = make_table(
        *("lane", "role", "group", "rank", "pid", "command", "state"),
        *("incarnation", "reserved", "held", "writing"),
        right=numbers,
    )
    for lane in filter(_in_use, lanes):
        table.add_row(
            str(lane.index),
            lane.role,
            *_lane_owner(lane),
            _lane_state(lane),
            count_text(lane.incarnation),
            count_text(lane.reserved),
            count_text(lane.held),
            count_text(lane.writing),
        )
    return table


def counters_table(counters: Counters) -> Table:
    """Every counter with its name, read downwards in columns."""
    items = [(name.replace("_", " "), count_text(value)) for name, value in asdict(counters).items()]
    height = -(-len(items) // _COUNTER_COLUMNS)
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(_COUNTER_COLUMNS):
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    for row in range(height):
        table.add_row(*(cell for item in items[row::height] for cell in item))
    return table


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


def lane_text(lane: LaneInfo) -> str:
    """One lane in a sentence: who sits there."""
    place = f"lane {lane.index}"
    if lane.group:
        member = "controller" if lane.rank is None else f"rank {lane.rank}"
        place += f" ({member} of group {printable(lane.group)})"
    return f"{place}: pid {lane.pid}, {printable(lane.command)}"


def _identity(info: ArenaInfo) -> list[tuple[str, str | Text]]:
    return [
        ("arena", printable(info.name)),
        ("state", _arena_state(info)),
        ("segment", f"{printable(info.path)}, {size_text(info.segment_bytes)}"),
    ]


def _facts(info: ArenaInfo, stats: Stats, now: float) -> list[tuple[str, str | Text]]:
    created = datetime.fromtimestamp(info.created).astimezone().isoformat(sep=" ", timespec="seconds")
    used = stats.used_bytes / stats.capacity if stats.capacity else None
    readable, writing, slots = map(count_text, (stats.objects, stats.writing, stats.slots))
    leases = f"read {info.read_lease_s:g} s, write {info.write_lease_s:g} s"
    return [
        ("created", f"{created}, {age_text(now - info.created)} ago"),
        ("fingerprint", printable(info.fingerprint) or "none"),
        ("capacity", f"{size_text(stats.capacity)} in blocks of {size_text(stats.block_size)}"),
        ("used", f"{size_text(stats.used_bytes)}, {percent_text(used)}"),
        ("resident", f"{size_text(stats.resident_bytes)}, metadata included"),
        ("objects", f"{readable} readable, {writing} being written, at most {slots}"),
        ("layouts", count_text(info.layouts)),
        ("shares", f"{count_text(stats.reserved)} reserved, {count_text(stats.held)} held"),
        ("hit rate", f"{percent_text(stats.hit_rate)} of the keys asked of read"),
        *_storage_facts(stats.counters, stats.gauges),
        ("lock", _lock_text(info)),
        ("leases", f"{leases}; lock timeout {info.lock_timeout_s:g} s"),
    ]


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
    vacant = info.lane_limit - sum(map(_in_use, info.lanes))
    return Text(f"{plural(vacant, 'lane')} of {info.lane_limit} vacant", style="dim")


def _arena_numbers(info: ArenaInfo, now: float) -> list[str]:
    stats = info.stats
    if stats is None:
        return ["-"] * 9
    used = stats.used_bytes / stats.capacity if stats.capacity else None
    return [
        size_text(stats.capacity),
        percent_text(used),
        count_text(stats.objects),
        count_text(stats.lanes_alive),
        count_text(stats.lanes_dead),
        count_text(stats.reserved),
        count_text(stats.held),
        percent_text(stats.hit_rate),
        age_text(now - info.created),
    ]


def _arena_state(info: ArenaInfo) -> Text:
    if info.problem is not None:
        return Text("unreadable", style="bold red")
    return Text("stale", style="yellow") if info.stale else Text("in use", style="green")


def _remarks(info: ArenaInfo) -> list[Text]:
    """What somebody should do about this arena, if anything."""
    name = printable(info.name)
    if info.problem is not None:
        return [Text(f"{name} cannot be read: {printable(info.problem)}", style="red")]
    if info.stale:
        remedy = f"nobody is attached; to remove it: shmcache-cleanup {name}"
        return [Text(f"{name} is stale, {remedy}", style="yellow")]
    if info.stats is not None and info.stats.lanes_dead:
        dead = plural(info.stats.lanes_dead, "dead lane")
        return [Text(f"{name} has {dead}; to reap: shmcache-cleanup --reap {name}", style="yellow")]
    return []


def _in_use(lane: LaneInfo) -> bool:
    return lane.state != "vacant" or bool(lane.reserved or lane.held or lane.writing)


def _lane_owner(lane: LaneInfo) -> tuple[str, str, str, str]:
    """The cells group, rank, pid and command."""
    rank = "-" if lane.rank is None or not lane.group else str(lane.rank)
    pid = str(lane.pid) if lane.pid else "-"
    return printable(lane.group) or "-", rank, pid, printable(lane.command) or "-"


def _lane_state(lane: LaneInfo) -> Text:
    return Text(lane.state, style=_STATE_STYLES.get(lane.state, ""))
