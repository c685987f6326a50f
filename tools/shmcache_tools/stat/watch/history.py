"""What ``--watch`` remembers of the looks so far: samples of each arena, what is gone, what went wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import shmcache
from shmcache_tools.look import Observer, Seen
from shmcache_tools.rates import identity
from shmcache_tools.stat.watch.series import SERIES

_SAMPLES: Final = 512  #: as wide as a screen may be
_GONE: Final = 64  #: so many arenas that are gone are remembered

Sample = tuple[float | None, ...]  #: a value for each of SERIES


@dataclass(slots=True)
class Timeline:
    """The samples of one arena, the newest last."""

    identity: tuple[int, float]
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def values(self, place: int) -> list[float | None]:
        """One series of SERIES over time."""
        return [sample[place] for sample in self.samples]


@dataclass(slots=True)
class History:
    """All looks so far, of which ``seen`` was the last that succeeded."""

    seen: Seen = field(default_factory=Seen)
    trouble: str | None = None  #: why the last look failed
    timelines: dict[str, Timeline] = field(default_factory=dict)  #: by arena name
    gone: dict[str, float] = field(default_factory=dict)  #: arena name -> Unix time at which it was missed first

    def add(self, seen: Seen) -> None:
        """A look that succeeded."""
        there = {info.name for info in seen.infos}
        missed = {info.name for info in self.seen.infos} - there
        gone = {name: when for name, when in self.gone.items() if name not in there} | dict.fromkeys(missed, seen.now)
        self.gone = dict(list(gone.items())[-_GONE:])
        self.timelines = {name: line for name, line in self.timelines.items() if name in there}
        self.seen, self.trouble = seen, None
        for info in seen.infos:
            if info.stats is None:
                continue
            line = self.timelines.get(info.name)
            if line is None or line.identity != identity(info):
                line = self.timelines[info.name] = Timeline(identity(info))
            if rates := seen.rates.get(info.name):
                line.samples.append(tuple(series.value(rates, info.stats) for series in SERIES))


def look_into(history: History, observer: Observer) -> None:
    """Adds what is there now. Where the look fails, what was seen last still stands."""
    try:
        history.add(observer.look())
    except (OSError, shmcache.ShmcacheError) as error:
        history.trouble = str(error) or type(error).__name__
