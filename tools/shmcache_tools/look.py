"""Looking at arenas from outside, for the programs that go through many: nothing found there stops them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import shmcache
from shmcache.stats import ArenaInfo
from shmcache_tools.rates import Rates, rates_between


def look(name: str, *, objects: bool = False, shares: bool = False) -> ArenaInfo | None:
    """What ``inspect`` sees; None where no such arena is. What may not be opened is a problem, too."""
    try:
        return shmcache.inspect(name, objects=objects, shares=shares)
    except shmcache.ArenaNotFoundError:
        return None
    except shmcache.ArenaPermissionError as error:
        return ArenaInfo(name, path="", segment_bytes=0, problem=str(error))


def look_at_all(*, objects: bool = False, shares: bool = False) -> list[ArenaInfo]:
    """All arenas of this user, without those that went away meanwhile."""
    found = (look(name, objects=objects, shares=shares) for name in shmcache.arenas())
    return [info for info in found if info is not None]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found, and how it differs from the look before."""

    infos: tuple[ArenaInfo, ...] = ()
    rates: Mapping[str, Rates] = field(default_factory=dict)  #: by arena name, of those that were seen twice
    now: float = 0.0  #: Unix time of the look, seconds
    clock: float = 0.0  #: the same on a clock that never jumps, seconds


class Observer:
    """Looks again and again at one arena, or at all of this user."""

    def __init__(self, name: str | None = None, *, objects: bool = False, shares: bool = False) -> None:
        self._name = name
        self._what = {"objects": objects, "shares": shares}
        self._last = Seen()

    def look(self) -> Seen:
        """What is there now. Of one arena that is gone: nothing."""
        found = look_at_all(**self._what) if self._name is None else [look(self._name, **self._what)]
        infos = tuple(info for info in found if info is not None)
        now, clock = time.time(), time.perf_counter()
        before = {info.name: info for info in self._last.infos}
        seconds = clock - self._last.clock
        compared = {info.name: rates_between(before.get(info.name), info, seconds) for info in infos}
        rates = {name: rates for name, rates in compared.items() if rates is not None}
        self._last = Seen(infos, rates, now, clock)
        return self._last
