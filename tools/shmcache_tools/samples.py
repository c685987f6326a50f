"""Measured times, and what they come to: percentiles that count each time as often as it happened."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Samples:
    """The times of one operation, a batch each; a percentile counts a batch once for each of its items."""

    seconds: array[float] = field(default_factory=lambda: array("d"))  #: an item, in this batch
    items: array[int] = field(default_factory=lambda: array("q"))

    def add(self, seconds: float, items: int = 1) -> None:
        self.seconds.append(seconds / items)
        self.items.append(items)

    def percentile(self, percent: float) -> float:
        """The time that ``percent`` of all items took at most, seconds."""
        seconds, items = np.array(self.seconds), np.array(self.items)
        order = np.argsort(seconds)
        reached = np.cumsum(items[order])
        place = np.searchsorted(reached, percent / 100 * reached[-1])
        return float(seconds[order[place]])
