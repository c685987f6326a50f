"""How full an arena or a region is, in a few cells of a line: colours, or letters where there are none."""

from __future__ import annotations

from rich.text import Text

from shmcache.stats import RegionInfo, Stats
from shmcache_tools.stat.occupancy import bytes_by_standing, share_out
from shmcache_tools.stat.standings import STANDING, STANDINGS, Standing
from shmcache_tools.stat.watch.page import Sheet
from shmcache_tools.text import short_percent_text


def used_cell(stats: Stats, width: int, sheet: Sheet) -> Text:
    """A bar and the percentage, in ``width`` cells."""
    percent = short_percent_text(stats.used_bytes / stats.capacity if stats.capacity else None)
    bar = Text()
    cells = share_out(max(0, width - 5), bytes_by_standing(stats))
    for standing in reversed(STANDINGS):
        bar.append(_mark(standing, sheet) * cells[standing.name], standing.style)
    return bar.append(f"{percent:>5}")


def region_bar(region: RegionInfo, sheet: Sheet, width: int) -> Text:
    """How much of a region of device memory is used, in ``width`` cells; of what standing is not known."""
    full, free = ("█", "░") if sheet.colours and sheet.utf8 else ("#", ".")
    cells = share_out(width, {"used": region.used_bytes, "free": max(0, region.capacity - region.used_bytes)})
    return Text.assemble((full * cells["used"], "cyan"), (free * cells["free"], STANDING["free"].style))


def _mark(standing: Standing, sheet: Sheet) -> str:
    if not (sheet.colours and sheet.utf8):
        return standing.glyph
    return "░" if standing.name == "free" else "█"
