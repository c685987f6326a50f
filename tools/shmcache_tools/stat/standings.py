"""How the standing of a block is shown, by every view: one colour, one letter, one sentence each.

The colours are of the 256 that nearly every terminal has, dark enough for a white and light enough for a black
background, and told apart by people with any kind of colour blindness; the letters serve where there is no colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Standing:
    """Why a block is to be had, or is not."""

    name: str  #: as ``ObjectInfo.standing``, and ``"free"``
    style: str  #: for rich
    colour: str  #: for pictures, as ``#rrggbb``: the same, but what is free is light as the paper
    glyph: str  #: where there are no colours
    meaning: str


#: From the blocks that can be had to those that nobody gets before somebody acts.
STANDINGS: Final[tuple[Standing, ...]] = (
    Standing("free", "color(241)", "#d9d9d9", ".", "no object there"),
    Standing("ready", "color(37)", "#00afaf", "-", "an object that can be evicted at once"),
    Standing("reserved", "color(27)", "#005fff", "r", "reserved shares, their lease not over"),
    Standing("writing", "color(178)", "#d7af00", "w", "being written"),
    Standing("held", "color(127)", "#af00af", "H", "kept by held shares"),
    Standing("dead", "color(160)", "#d70000", "X", "kept by the dead, until it is reaped"),
)

STANDING: Final = {standing.name: standing for standing in STANDINGS}
