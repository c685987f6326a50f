"""Regions of device memory for people: on which GPU, whose, how full, who has them open, and which are lost."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from shmcache.stats import ArenaInfo, LaneInfo, RegionInfo
from shmcache_tools.stat.fitted_table import Cell, Column, FittedTable
from shmcache_tools.stat.lanes_view import owner_cells, owner_columns, size_cell
from shmcache_tools.text import percent_text, plural, printable, short_percent_text, short_size_text, size_text

#: Reversed, so that it stands out without colours, too.
REGION_STYLES: Final = {"live": "green", "lost": "bold reverse red"}

_SHORT_UUID: Final = len("GPU-01234567")  #: so much of it is enough for CUDA_VISIBLE_DEVICES

_LOST: Final = (
    "lost: its owner is gone or has given it up, and with it what lay there. It goes once nobody has shares of its "
    "objects: their holders release them, or die and are reaped"
)


def device_cell(region: RegionInfo) -> Cell:
    """Its number in the owner's process."""
    return Cell(f"cuda:{region.device}")


def uuid_cell(region: RegionInfo) -> Cell:
    uuid = printable(region.uuid)
    return Cell(uuid, uuid[:_SHORT_UUID])


def used_fraction(region: RegionInfo) -> float | None:
    return region.used_bytes / region.capacity if region.capacity else None


def owner_of(info: ArenaInfo, region: RegionInfo) -> LaneInfo | None:
    """Who has allocated it. None: gone, and in its lane may be somebody who has nothing to do with the region."""
    of = region.owner, region.incarnation
    return next((lane for lane in info.lanes if (lane.index, lane.incarnation) == of), None)


def regions_by_owner(info: ArenaInfo) -> dict[int, str]:
    """The numbers of the regions whose memory each lane's process has allocated, by the lane's index."""
    owners = {region.number: owner_of(info, region) for region in info.regions}
    lanes = {lane.index for lane in owners.values() if lane is not None}
    return {index: numbers_text(n for n, lane in owners.items() if lane and lane.index == index) for index in lanes}


def numbers_text(numbers: Iterable[int]) -> str:
    """Numbers in ascending order, runs of them in short: ``0, 3-7``; ``-`` of none."""
    runs = ([n for _, n in run] for _, run in groupby(enumerate(numbers), lambda at: at[1] - at[0]))
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def device_memory_text(info: ArenaInfo) -> str:
    """How much device memory there is, and how much of it is used."""
    capacity, used = _sums(info)
    regions = f"{plural(len(info.regions), 'region')} of at most {info.region_limit}"
    return f"{size_text(capacity)} in {regions}; {size_text(used)} used, {percent_text(used / max(1, capacity))}"


def device_memory_cell(info: ArenaInfo) -> Cell:
    """The same in a few cells."""
    if not info.regions:
        return Cell("-")
    capacity, used = _sums(info)
    fraction = used / max(1, capacity)
    style = "bold red" if any(region.state == "lost" for region in info.regions) else ""
    full = f"{size_text(capacity)}, {percent_text(fraction)}"
    return Cell(full, f"{short_size_text(capacity)} {short_percent_text(fraction)}", style)


def _sums(info: ArenaInfo) -> tuple[int, int]:
    """Capacity and used bytes of all its regions of device memory."""
    return sum(region.capacity for region in info.regions), sum(region.used_bytes for region in info.regions)


def regions_table(info: ArenaInfo) -> RenderableType:
    """One line a region."""
    owner = Column("owner", "own", right=True), *owner_columns(command=2, group=4, rank=1)[1:-1]
    table = FittedTable(
        (
            Column("region", "reg", right=True),
            Column("device"),
            Column("uuid"),
            *owner,
            Column("capacity", "size", right=True),
            Column("used", right=True),
            Column("block", right=True, goes=3),
            Column("open in", "open", least=4),
            Column("state"),
        )
    )
    for region in info.regions:
        table.add_row((Cell(str(region.number)), *_whose(info, region), *_how_full(region), *_how_it_is(region)))
    if any(region.state == "lost" for region in info.regions):
        return Group(table, Text(_LOST, style="red"))
    return table


def _whose(info: ArenaInfo, region: RegionInfo) -> tuple[Cell, ...]:
    """The device, and who has allocated it there."""
    lane = owner_of(info, region)
    unknown = [Cell("-")] * (len(owner_columns()) - 2)
    owner = unknown if lane is None else owner_cells(lane)[1:-1]
    return device_cell(region), uuid_cell(region), Cell(str(region.owner)), *owner


def _how_full(region: RegionInfo) -> tuple[Cell, ...]:
    fraction = used_fraction(region)
    used = Cell(f"{size_text(region.used_bytes)}, {percent_text(fraction)}", short_percent_text(fraction))
    return size_cell(region.capacity), used, size_cell(region.block_size)


def _how_it_is(region: RegionInfo) -> tuple[Cell, ...]:
    """Who reads it, and whether it is still there."""
    style = REGION_STYLES.get(region.state, "")
    return Cell(numbers_text(region.opened)), Cell(printable(region.state), style=style)
