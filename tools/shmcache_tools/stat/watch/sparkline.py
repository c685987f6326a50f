"""Numbers over time as a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

#: From nothing to the highest; the first is zero alone, so that little never looks like nothing.
UNICODE_LEVELS: Final = "▁▂▃▄▅▆▇█"
ASCII_LEVELS: Final = "_.:-=+*#"


def sparkline(values: Sequence[float | None], width: int, top: float | None = None, *, utf8: bool = True) -> str:
    """The last ``width`` values, the newest at the right; None leaves a gap.

    ``top``: the value as high as the line; without it the highest of those shown.
    """
    shown = values[-width:] if width > 0 else []
    highest = top or max((value for value in shown if value is not None), default=0.0)
    levels = UNICODE_LEVELS if utf8 else ASCII_LEVELS
    return "".join(_mark(value, highest, levels) for value in shown).rjust(max(width, 0))


def _mark(value: float | None, highest: float, levels: str) -> str:
    if value is None:
        return " "
    if value <= 0 or highest <= 0:
        return levels[0]
    steps = len(levels) - 1
    return levels[min(steps, math.ceil(steps * value / highest))]
