"""What happened in an arena between two looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shmcache.stats import ArenaInfo, Counters


@dataclass(frozen=True, slots=True)
class Rates:
    """The counters' growth from one look to the next, ``seconds`` later."""

    seconds: float
    before: Counters
    after: Counters
    lanes: Mapping[int, Rates] = field(default_factory=dict)  #: the same of each lane, by its index

    def count(self, name: str) -> int:
        """How much the counter ``name`` grew."""
        return max(0, int(getattr(self.after, name)) - int(getattr(self.before, name)))

    def per_s(self, *names: str) -> float:
        """Growth of the counters ``names`` together, a second."""
        return sum(map(self.count, names)) / self.seconds

    @property
    def hit_rate(self) -> float | None:
        """Keys read / keys asked of ``read`` in that time, 0 to 1; None where none were asked."""
        asked = self.count("read_hits") + self.count("read_misses")
        return self.count("read_hits") / asked if asked else None


def rates_between(before: ArenaInfo | None, after: ArenaInfo, seconds: float) -> Rates | None:
    """None where there is nothing to compare: seen once, unreadable, or made anew meanwhile."""
    if before is None or before.stats is None or after.stats is None or seconds <= 0:
        return None
    if identity(before) != identity(after):
        return None
    earlier = {lane.index: lane.counters for lane in before.lanes}
    lanes = {
        lane.index: Rates(seconds, earlier[lane.index], lane.counters) for lane in after.lanes if lane.index in earlier
    }
    return Rates(seconds, before.stats.counters, after.stats.counters, lanes)


def identity(info: ArenaInfo) -> tuple[int, float]:
    """Differs between an arena and another one made under its name."""
    return info.inode, info.created
