"""How full an arena is and why, as a bar: one colour a standing, and what each takes below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from shmcache.stats import Stats
from shmcache_tools.stat.standings import STANDINGS, Standing
from shmcache_tools.text import percent_text, size_text

_WIDEST: Final = 100  #: cells; more make it no clearer


def bytes_by_standing(stats: Stats) -> dict[str, int]:
    """The arena's capacity, by the standing of its blocks; in the order of ``STANDINGS``."""
    used = {s.name: int(getattr(stats, f"{s.name}_bytes")) for s in STANDINGS if s.name != "free"}
    return {"free": max(0, stats.capacity - sum(used.values())), **used}


def share_out(cells: int, amounts: Mapping[str, int]) -> dict[str, int]:
    """``cells`` in proportion to ``amounts``; what is there at all gets one, the largest first."""
    there = sorted((name for name in amounts if amounts[name]), key=amounts.__getitem__, reverse=True)[:cells]
    total, rest = sum(amounts[name] for name in there), cells - len(there)
    shares = {name: 1 + rest * amounts[name] // total for name in there}
    left_over = sorted(there, key=lambda name: rest * amounts[name] % total, reverse=True)
    for name in left_over[: max(0, cells - sum(shares.values()))]:
        shares[name] += 1
    return {name: shares.get(name, 0) for name in amounts}


@dataclass(frozen=True, slots=True)
class OccupancyBar:
    """The bar as wide as there is room, and its legend."""

    stats: Stats

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        amounts = bytes_by_standing(self.stats)
        coloured = console.color_system is not None and not console.no_color and not options.ascii_only
        width = min(options.max_width, _WIDEST)
        yield _bar(share_out(width, amounts), coloured)
        yield from _legend(amounts, width, coloured)


def _bar(cells: Mapping[str, int], coloured: bool) -> Text:
    """What is hardest to get at the left, what is free at the right."""
    parts = ((_mark(s, coloured) * cells[s.name], s.style) for s in reversed(STANDINGS))
    return Text.assemble(*parts, no_wrap=True)


def _legend(amounts: Mapping[str, int], width: int, coloured: bool) -> Iterator[Text]:
    """As many entries a line as there is room for; those of nothing are left out."""
    line, total = Text(no_wrap=True), sum(amounts.values())
    for s in reversed(STANDINGS):
        amount = amounts[s.name]
        if not amount and s.name != "free":
            continue
        entry = Text.assemble((_mark(s, coloured), s.style), f" {s.name} {size_text(amount)}")
        entry.append(f" {percent_text(amount / total if total else None)}", style="dim")
        if line and line.cell_len + 3 + entry.cell_len > width:
            yield line
            line = Text(no_wrap=True)
        line = Text("   ", no_wrap=True).join([line, entry]) if line else entry
    yield line


def _mark(standing: Standing, coloured: bool) -> str:
    if not coloured:
        return standing.glyph
    return "░" if standing.name == "free" else "█"
