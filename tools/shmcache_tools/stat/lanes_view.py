"""Lanes for people: who sits there, what the process holds, and whether it still can give it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from shmcache.stats import LaneInfo
from shmcache_tools.stat.fitted_table import Cell, Column, FittedTable
from shmcache_tools.text import (
    age_text,
    count_text,
    printable,
    short_age_text,
    short_count_text,
    short_size_text,
    size_text,
)

#: Reversed, so that they stand out without colours, too.
LANE_STYLES: Final = {
    "alive": "green",
    "stopped": "bold reverse color(136)",
    "dead": "bold reverse red",
    "vacant": "dim",
}

_SHORT_MEMBERS: Final = {"controller": "ctl", "private": "prv"}


def state_of(lane: LaneInfo) -> str:
    """``lane.state``, or ``"stopped"``."""
    return "stopped" if lane.stopped else lane.state


def state_cell(lane: LaneInfo) -> Cell:
    return Cell(state_of(lane), style=LANE_STYLES.get(state_of(lane), ""))


def count_cell(count: int, style: str = "") -> Cell:
    return Cell(count_text(count), short_count_text(count), style)


def size_cell(size: int) -> Cell:
    return Cell(size_text(size), short_size_text(size))


def age_cell(seconds: float) -> Cell:
    return Cell(age_text(seconds), short_age_text(seconds))


def owner_columns(*, command: int = 0, group: int = 0, rank: int = 0) -> tuple[Column, ...]:
    """The columns of ``owner_cells``; the numbers are their ``Column.goes``."""
    return (
        Column("lane", right=True),
        Column("group", least=8, goes=group),
        Column("rank", right=True, goes=rank),
        Column("pid", right=True),
        Column("command", least=8, goes=command),
        Column("state"),
    )


def owner_cells(lane: LaneInfo) -> tuple[Cell, ...]:
    """Who sits in that lane: lane, group, rank, pid, command, state."""
    return (
        Cell(str(lane.index)),
        Cell(printable(lane.group) or "-"),
        Cell(_member(lane), _SHORT_MEMBERS.get(_member(lane), "")),
        Cell(str(lane.pid) if lane.pid else "-"),
        Cell(printable(lane.command) or "-"),
        state_cell(lane),
    )


def lanes_in_use(lanes: Iterable[LaneInfo]) -> list[LaneInfo]:
    """Those that somebody owns or that still carry something; a group's together, its controllers first."""
    used = [lane for lane in lanes if lane.state != "vacant" or lane.reserved or lane.held or lane.writing]
    return sorted(used, key=lambda lane: (lane.group, -1 if lane.rank is None else lane.rank, lane.index))


def lanes_table(lanes: Iterable[LaneInfo], now: float, owned: Mapping[int, str]) -> RenderableType:
    """One line a lane. ``owned``: the regions of device memory of each that has any, by its index."""
    if not (used := lanes_in_use(lanes)):
        return Text("no lane in use")
    pinned = any(lane.gauges.pinned_bytes for lane in used)
    table = FittedTable(
        (
            *owner_columns(),
            Column("started", "age", right=True, goes=2),
            Column("incarnation", "inc", right=True, goes=3),
            Column("reserved", "rsv", right=True),
            Column("held", right=True),
            Column("held bytes", "bytes", right=True),
            Column("writing", "wr", right=True, goes=1),
            Column("oldest held", "oldest", right=True),
            *([Column("pinned", "pin", right=True)] if pinned else []),
            *([Column("regions", "reg", right=True)] if owned else []),
        )
    )
    for lane in used:
        on_gpus = [*([_pinned_cell(lane)] if pinned else []), *([Cell(owned.get(lane.index, "-"))] if owned else [])]
        table.add_row((*owner_cells(lane), *_doings(lane, now), *on_gpus))
    return table


def _pinned_cell(lane: LaneInfo) -> Cell:
    """How much it has page-locked for a GPU."""
    return size_cell(lane.gauges.pinned_bytes) if lane.gauges.pinned_bytes else Cell("-")


def _doings(lane: LaneInfo, now: float) -> tuple[Cell, ...]:
    """Since when, how often, and with what it sits there."""
    oldest = Cell("-") if lane.oldest_held is None else age_cell(now - lane.oldest_held)
    started = age_cell(now - lane.started) if lane.started else Cell("-")
    numbers = count_cell(lane.reserved), count_cell(lane.held), size_cell(lane.held_bytes), count_cell(lane.writing)
    return started, count_cell(lane.incarnation), *numbers, oldest


def _member(lane: LaneInfo) -> str:
    """A rank, or what is there instead of one."""
    if lane.role in {"controller", "private", "free"}:
        return lane.role
    return "-" if lane.rank is None else str(lane.rank)
