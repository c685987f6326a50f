"""The arena as the storage layer sees it: the one module of storage that looks inside a Cache."""

# ruff: noqa: SLF001 # what storage needs beyond a Cache's public methods is gathered here

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from shmcache import errors, snapshot
from shmcache._binding import ffi, lib
from shmcache._keys import Keys, pack, unpack
from shmcache.batch import ReadBatch, WriteBatch
from shmcache.cache import Cache
from shmcache.config import check_extra_count
from shmcache.layout import Layout
from shmcache.status import Status
from shmcache.storage.adapter import LayoutLike

__all__ = ["L1", "Notes"]

_COUNTERS: Final = {name: number for number, name in enumerate(snapshot.COUNTERS)}
_GAUGES: Final = {name: number for number, name in enumerate(snapshot.GAUGES)}
_HISTOGRAMS: Final = {name: number for number, name in enumerate(snapshot.HISTOGRAMS)}


class L1:
    """One process's cache, for prefetches into it and stores out of it. Its methods may be called by any thread."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.name: Final = cache.name
        self.world_size: Final = cache.world_size

    # What callers pass

    def check_open(self) -> None:
        """ClosedError after close and in a forked child."""
        self._cache._attachment.check_open()

    def check_keys(self, keys: Keys) -> list[bytes]:
        """The keys as bytes; TypeError or ValueError."""
        return unpack(pack(keys))

    def check_extra_count(self, extra_count: int) -> int:
        """TypeError unless int (bool is not), ValueError unless 0 <= extra_count < world_size."""
        return check_extra_count(extra_count, self.world_size)

    def check_layouts(self, layout: LayoutLike | Sequence[LayoutLike], n: int) -> list[LayoutLike]:
        """One layout a key, each known to the arena from now on; TypeError, ValueError or ArenaSpaceError."""
        self._cache._demand(layout, n)
        return [layout] * n if isinstance(layout, (Layout, int)) else list(layout)

    # Writing

    def reserve(self, keys: list[bytes], layouts: list[LayoutLike], *, temporary: bool) -> WriteBatch:
        """As ``Cache.reserve_write``."""
        one = layouts.count(layouts[0]) == len(layouts)  # nearly always, and then nothing is done once a key
        return self._cache.reserve_write(keys, layouts[0] if one else layouts, temporary=temporary)

    def payload(self) -> memoryview:
        """The whole of region 0 as this process writes it."""
        return self._cache._attachment.payload(writable=True)

    def listen(self, listener: Callable[[list[bytes]], None]) -> None:
        """From now on ``listener`` is called with the keys that this process publishes, prefetches excepted."""
        attachment = self._cache._attachment
        with attachment.lock:
            attachment.listeners += (listener,)

    def ignore(self, listener: Callable[[list[bytes]], None]) -> None:
        """The end of :meth:`listen`."""
        attachment = self._cache._attachment
        with attachment.lock:
            attachment.listeners = tuple(each for each in attachment.listeners if each != listener)

    # Shares

    def grant(self, keys: list[bytes], extra_count: int) -> list[Status]:
        """As ``Cache.reserve_read``."""
        return self._cache.reserve_read(keys, extra_count)

    def give_back(self, keys: list[bytes], extra_count: int) -> None:
        """Takes back what :meth:`grant` gave, of each rank that has not claimed it yet."""
        if keys:
            self._cache.cancel_read(keys, extra_count)

    def read(self, keys: list[bytes]) -> ReadBatch:
        """Reads under fresh shares: what was granted to this lane stays granted."""
        return self._cache._take(keys, lib.SC_READ_FRESH)

    def hold(self, keys: list[bytes]) -> ReadBatch:
        """The same for a copy to L2: temporary objects are NOT_FOUND, and it counts as no read."""
        return self._cache._take(keys, lib.SC_READ_STORE)

    def layouts_of(self, batch: ReadBatch) -> list[Layout | None]:
        """The layout of each object of a batch, uint8 for a number of bytes; None where not OK."""
        return batch._layouts()

    def reap(self) -> None:
        """Takes back what dead writers left, unless somebody else is at the arena's table."""
        with suppress(errors.ArenaBusyError):
            self._cache._reap(wait=False)

    # Statistics

    def count(self, name: str, n: int = 1) -> None:
        """Adds to a counter at once; KeyError where there is none of that name. For adapters."""
        self.note([(lib.SC_COUNTER, _COUNTERS[name], n)])

    def note(self, notes: list[tuple[int, int, int]]) -> None:
        """Adds to this process's lane. After close they go nowhere."""
        lib.sc_note(self._cache._attachment.handle, ffi.new("struct sc_note[]", notes), len(notes))


class Notes:
    """Statistics of one thread at a time, gathered, since each call of the core gives other threads a turn."""

    def __init__(self, l1: L1) -> None:
        self._l1 = l1
        self._notes: list[tuple[int, int, int]] = []

    def count(self, name: str, n: int = 1) -> None:
        """Adds to a counter of ``Counters``."""
        if n:
            self._notes.append((lib.SC_COUNTER, _COUNTERS[name], n))

    def gauge(self, name: str, change: int) -> None:
        """Changes a gauge of ``Gauges``."""
        self._notes.append((lib.SC_GAUGE, _GAUGES[name], change))

    def time(self, name: str, seconds: float) -> None:
        """Adds to a histogram of ``Histograms``."""
        self._notes.append((lib.SC_HISTOGRAM, _HISTOGRAMS[name], max(0, int(seconds * 1e6))))

    def flush(self) -> None:
        """Has others see them."""
        if self._notes:
            notes, self._notes = self._notes, []
            self._l1.note(notes)
