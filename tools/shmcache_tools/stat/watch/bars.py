"""How full an arena is, in a few cells of a line: one colour a standing, or one letter where there are no colours."""

from __future__ import annotations

from rich.text import Text

from shmcache.stats import Stats
from shmcache_tools.stat.occupancy import bytes_by_standing, share_out
from shmcache_tools.stat.standings import STANDINGS, Standing
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


def _mark(standing: Standing, sheet: Sheet) -> str:
    if not (sheet.colours and sheet.utf8):
        return standing.glyph
    return "░" if standing.name == "free" else "█"
