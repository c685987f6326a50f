"""What a person sees of a host: unit costs, what the cases ask for, waits for the lock, and what breaks first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from scale_arena import BATCHES
from scale_costs import LANES, UnitCosts
from scale_host import Host, Needs
from scale_limits import Limit, Outlook
from scale_lock import BURSTS, HOLD_S, capacity_of

from shmcache_tools.text import make_facts, make_table, percent_text, plural, size_text, time_text

FAR = 10.0  # times; what is further away is not what breaks first


def tables(facts: dict[str, Any], host: Host, costs: UnitCosts, outlooks: Sequence[Outlook]) -> Iterator[Table]:
    yield make_facts([(name, str(fact)) for name, fact in facts.items()])
    yield held_table(costs)
    yield units_table(costs)
    yield needs_table(host, outlooks)
    for one in outlooks:
        yield waits_table(one)
    yield limits_table(outlooks)
    yield changes_table(outlooks)


def host_text(host: Host) -> str:
    nodes = plural(host.nodes, "NUMA node")
    return f"{host.memory / 1e12:.3g} TB, {plural(host.gpus, 'GPU')}, {plural(host.cores, 'core')}, {nodes}"


def held_table(costs: UnitCosts) -> Table:
    """Every batch that was measured, for the larger arena: the smaller is in the JSON."""
    slots = max(row.slots for row in costs.held)
    columns = [f"{lanes} lanes" for lanes in LANES]
    table = make_table(f"reserve a key, {slots:,} slots, CPU time", "", *columns, right=columns)
    for evicts in (False, True):
        for batch in BATCHES:
            rows = [row for row in costs.held if (row.slots, row.batch, row.evicts) == (slots, batch, evicts)]
            times = [time_text(row.seconds) for row in sorted(rows, key=lambda row: row.lanes)]
            table.add_row(f"in batches of {batch:,}", "evicts" if evicts else "room is free", *times)
    return table


def units_table(costs: UnitCosts) -> Table:
    table = make_table("unit costs here", "1 lane", "256 lanes", "", right=("1 lane", "256 lanes"))
    lines = (
        ("evict, beside reserve", costs.evict_key, "a key, without the scan; under the lock"),
        ("scan for victims", costs.scan_slot, "a slot; under the lock"),
        ("verify", costs.verify_slot, "a slot, 256 lanes of room; under the lock"),
        ("inspect", costs.inspect_slot, "a slot; without a lock"),
    )
    for name, line, what in lines:
        table.add_row(name, time_text(line.at(1)), time_text(line.at(256)), what)
    numbers = (
        ("reserve", costs.reserve_key, "a key; under the lock"),
        ("join a write", costs.join_key, "a key; under the lock"),
        ("rebuild", costs.rebuild_slot, "a slot; under the lock, after a holder's death"),
        ("lookup", costs.lookup_key, "a key; no lock"),
        ("grant + finish", costs.grant_share, "a share; no lock"),
        ("read + release", costs.read_key, "a key; no lock"),
        ("attach + close", costs.attach, "a process"),
        ("hand over to a sleeper", costs.wake, "a hand-over"),
    )
    for name, seconds, what in numbers:
        table.add_row(name, time_text(seconds), "", what)
    table.add_row("take and give the lock", time_text(HOLD_S), "", "a hold; stated, not measured")
    table.add_row("populate", f"{costs.populate_rate / 1e9:.2f} GB/s", "", "a thread")
    return table


def needs_table(host: Host, outlooks: Sequence[Outlook]) -> Table:
    labels = [one.label for one in outlooks]
    table = make_table(host_text(host), *labels, right=labels)
    rows: tuple[tuple[str, Callable[[Needs], str]], ...] = (
        ("arena", lambda n: size_text(n.capacity)),
        ("object / block", lambda n: f"{size_text(n.object_bytes)} / {size_text(n.block_size)}"),
        ("objects that it has room for", lambda n: f"{n.objects:,}"),
        ("slots", lambda n: f"{n.slots:,}"),
        ("processes, so lanes", lambda n: f"{n.lanes}"),
        ("metadata", lambda n: f"{size_text(n.metadata)}, {percent_text(n.metadata / n.capacity)}"),
        ("index / with slots and scores", lambda n: f"{size_text(n.index)} / {size_text(n.hot)}"),
        ("tokens computed a second", lambda n: f"{n.tokens:,.0f}"),
        ("objects saved = evicted / looked up a second", lambda n: f"{n.saved:,.0f} / {n.looked_up:,.0f}"),
        ("saved / read", lambda n: f"{n.saved_bytes / 1e9:.1f} / {n.read_bytes / 1e9:.1f} GB/s"),
        ("the arena is filled anew in", lambda n: time_text(n.turnover)),
        ("memory bandwidth", lambda n: percent_text(n.memory_share)),
        ("between nodes, into each", lambda n: f"{n.remote_rate / 1e9:.1f} GB/s"),
        ("cores for lookups, grants, reads", lambda n: f"{n.reading_cores:.3f}"),
        ("populate / pin", lambda n: f"{time_text(n.populate)} / {time_text(n.pin)}"),
        ("scan / rebuild, under the lock", lambda n: f"{time_text(n.scan)} / {time_text(n.rebuild)}"),
        ("stat / verify", lambda n: f"{time_text(n.inspect)} / {time_text(n.verify)}"),
    )
    for name, text in rows:
        table.add_row(name, *(text(one.need) for one in outlooks))
    given = (f"{one.need.reserved:,.0f} / {one.need.reserved * capacity_of(one.waits):,.0f}" for one in outlooks)
    table.add_row("keys reserved a second, all ranks / the lock bears", *given)
    return table


def waits_table(one: Outlook) -> Table:
    columns = ("holds a second", "scans a second", "held", "p50", "p99", "max", "longest hold", "over 5 s")
    table = make_table(f"{one.label}: wait for the arena lock, {BURSTS:,} steps", *columns, right=columns)
    named = [(f"{wait.load:g} x the load", wait) for wait in one.waits]
    changed = [(f"1 x, {name}", wait) for name, wait in one.changed.items()]
    for name, wait in named + changed:
        table.add_row(
            name,
            f"{wait.holds:,.0f}",
            f"{wait.scans:,.1f}",
            Text(percent_text(wait.utilisation), style="red" if wait.saturated else ""),
            *(time_text(seconds) for seconds in (wait.p50, wait.p99, wait.most, wait.longest_hold)),
            percent_text(wait.timed_out),
        )
    return table


def limits_table(outlooks: Sequence[Outlook]) -> Table:
    """How far away each limit is: the nearest first, by the case in which it is nearest."""
    labels = [one.label for one in outlooks]
    table = make_table("what breaks first", "at so many times", "limit", *labels, right=labels)
    for name in _ranked(outlooks):
        rows = [next(row for row in one.limits if row.name == name) for one in outlooks]
        table.add_row(name, f"the {rows[0].axis}", rows[0].limit, *map(_headroom, rows))
    return table


def changes_table(outlooks: Sequence[Outlook]) -> Table:
    """What is near in any case, with what it needs there."""
    table = make_table("what would be changed", "in the worst case", "needed", "change")
    for name in _ranked(outlooks):
        row, label = min(
            ((row, one.label) for one in outlooks for row in one.limits if row.name == name),
            key=lambda found: found[0].headroom,
        )
        if row.headroom < FAR:
            table.add_row(name, label, row.need, row.change)
    return table


def _ranked(outlooks: Sequence[Outlook]) -> list[str]:
    """The names of all limits, the nearest first."""
    rows = sorted((row for one in outlooks for row in one.limits), key=lambda row: row.headroom)
    return list(dict.fromkeys(row.name for row in rows))


def _headroom(row: Limit) -> Text:
    return Text(_times(row.headroom), style="red" if row.headroom < 1 else "yellow" if row.headroom < 2 else "")


def _times(headroom: float) -> str:
    return f"{headroom:,.2f} x" if headroom < 10 else f"{headroom:,.0f} x"


def verdict(one: Outlook) -> str:
    over = [_place(row) for row in one.limits if row.headroom < 1]
    rest = next(row for row in one.limits if row.headroom >= 1)
    found = f"broken as described: {', '.join(over)}; next" if over else "holds; first breaks"
    return f"{one.label}: {found} {_place(rest)}"


def _place(row: Limit) -> str:
    return f"{row.name} (at {_times(row.headroom)} the {row.axis})"
