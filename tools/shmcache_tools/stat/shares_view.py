"""Who holds what, since when: the leak hunter's view.

A leak is often hundreds of keys of one holder, so holders come first and the list of their shares second.  What only
its holder ends (held shares, writes) comes before reserved shares, which a lease ends; of each the longest is first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from shmcache.stats import ArenaInfo, LaneInfo, ShareInfo
from shmcache_tools.look import Seen
from shmcache_tools.stat.fitted_table import Cell, Column, FittedTable
from shmcache_tools.stat.lanes_view import age_cell, count_cell, owner_cells, owner_columns, size_cell
from shmcache_tools.stat.regions_view import REGION_STYLES
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.stat.standings import STANDING
from shmcache_tools.text import plural, printable

_ROWS: Final = 40  #: of the list, unless a limit is given

_ARENA: Final = Column("arena", least=10, middle=True)
_HOLDER_COLUMNS: Final = (
    *owner_columns(command=1),
    Column("held", right=True),
    Column("writing", "wr", right=True),
    Column("reserved", "rsv", right=True),
    Column("bytes", right=True),
    Column("oldest", right=True),
)
_SHARE_COLUMNS: Final = (
    Column("kind"),
    Column("age", right=True),
    Column("key", least=16, middle=True),
    Column("size", right=True),
)
_REGION: Final = Column("region")  #: only where a share is of an object in device memory
_SHARER_COLUMNS: Final = (Column("count", "n", right=True, goes=1), *owner_columns(command=4, group=3, rank=2))


@dataclass(frozen=True, slots=True)
class _Holding:
    """A share, and whose it is."""

    info: ArenaInfo
    share: ShareInfo

    @property
    def order(self) -> tuple[bool, float, str, int, bytes]:
        """What is to be looked at first is smallest."""
        share = self.share
        return share.kind == "reserved", share.since, self.info.name, share.lane, share.key

    def lease_over(self, now: float) -> bool:
        return self.share.kind == "reserved" and now - self.share.since > self.info.read_lease_s

    @property
    def lane(self) -> LaneInfo | None:
        return next((lane for lane in self.info.lanes if lane.index == self.share.lane), None)

    def region_cell(self) -> Cell:
        """The number of the region of device memory that the object lies in."""
        number = self.share.region
        if any(region.number == number and region.state == "lost" for region in self.info.regions):
            return Cell(f"{number} lost", style=REGION_STYLES["lost"])
        return Cell(str(number) if number else "-")

    def lane_cells(self) -> tuple[Cell, ...]:
        if self.lane is not None:
            return owner_cells(self.lane)
        return Cell(str(self.share.lane)), *[Cell("-")] * (len(owner_columns()) - 1)


def shares_table(seen: Seen, limit: int | None) -> RenderableType:
    """The shares of all arenas, longest first. ``limit``: so many at most; None: what fits a screen or two; 0: all."""
    found = [_Holding(info, share) for info in seen.infos for share in info.shares or ()]
    found.sort(key=lambda holding: holding.order)
    rows = len(found) if limit == 0 else limit or _ROWS
    several = len(seen.infos) > 1
    parts: list[RenderableType] = [Text("no shares")]
    if found:
        parts = [*_holders(found, rows, seen.now, several), Text(), *_shares(found, rows, seen.now, several)]
        parts += [Text(note, style="dim") for note in _notes(found, seen.now)]
    concerned = {holding.info.name for holding in found}
    advice = remarks_of(info for info in seen.infos if info.name in concerned or info.problem is not None)
    return Group(*parts, Text(), *advice) if advice else Group(*parts)


def _holders(found: Sequence[_Holding], rows: int, now: float, several: bool) -> list[RenderableType]:
    """One line a lane, in the order in which they come in the list."""
    of: dict[tuple[str, int], list[_Holding]] = {}
    for holding in found:
        of.setdefault((holding.info.name, holding.share.lane), []).append(holding)
    table = FittedTable((_ARENA, *_HOLDER_COLUMNS) if several else _HOLDER_COLUMNS)
    for has in list(of.values())[:rows]:
        counts = (sum(holding.share.kind == kind for holding in has) for kind in ("held", "writing", "reserved"))
        size = sum({holding.share.key: holding.share.nbytes for holding in has}.values())
        numbers = (*map(count_cell, counts), size_cell(size), age_cell(now - has[0].share.since))
        table.add_row((*_arena_cells(has[0], several), *has[0].lane_cells(), *numbers))
    return [table, *_more(len(of) - rows, "more holder")]


def _shares(found: Sequence[_Holding], rows: int, now: float, several: bool) -> list[RenderableType]:
    devices = any(holding.share.region for holding in found)
    columns = (*_SHARE_COLUMNS, *([_REGION] if devices else []), *_SHARER_COLUMNS)
    table = FittedTable((_ARENA, *columns) if several else columns)
    for holding in found[:rows]:
        share = holding.share
        style = "dim" if holding.lease_over(now) else STANDING[share.kind].style
        what = Cell(share.kind, style=style), age_cell(now - share.since), key_text(share.key), size_cell(share.nbytes)
        where = [holding.region_cell()] if devices else []
        table.add_row((*_arena_cells(holding, several), *what, *where, count_cell(share.count), *holding.lane_cells()))
    return [table, *_more(len(found) - rows, "more share")]


def key_text(key: bytes) -> str:
    """A key for people: as it is where that is ASCII without spaces, else in hex behind ``0x``."""
    return key.decode("ascii") if all(0x21 <= byte <= 0x7E for byte in key) else f"0x{key.hex()}"


def _arena_cells(holding: _Holding, several: bool) -> tuple[str, ...]:
    return (printable(holding.info.name),) if several else ()


def _more(count: int, noun: str) -> Iterator[Text]:
    if count > 0:
        yield Text(f"{plural(count, noun)}; --limit 0 shows all", style="dim")


def _notes(found: Sequence[_Holding], now: float) -> Iterator[str]:
    """What to know of what is shown, where it does not follow from the table."""
    if over := sum(holding.lease_over(now) for holding in found):
        yield f"{plural(over, 'reserved share')} past the read lease: revoked as soon as somebody needs the room"
    if any(holding.share.kind == "held" and holding.lane and holding.lane.state == "alive" for holding in found):
        yield "a held share ends when its holder releases it or dies; to end a holder: kill PID"
