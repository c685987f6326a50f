"""The numbers of an arena that are watched over time, the most useful first, and how each is put."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shmcache.stats import Stats
from shmcache_tools.rates import Rates
from shmcache_tools.text import short_percent_text

Value = Callable[[Rates, Stats], float | None]

_UNITS = ("", "k", "M", "G", "T", "P", "E")


def short_number(value: float) -> str:
    """In five characters: ``0``, ``0.3``, ``12``, ``1.2k``, ``345M``."""
    if 0 < value < 0.95:
        return f"{value:.1g}"
    unit = 0
    while round(value) >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 1 if value < 9.95 else 0
    return f"{value:.{digits}f}".removesuffix(".0") + _UNITS[unit]


@dataclass(frozen=True, slots=True)
class Series:
    """One number over time."""

    name: str
    value: Value
    text: Callable[[float], str]
    top: float | None = None  #: what is as high as the line; None: the highest that is shown
    matters: tuple[str, ...] = ()  #: shown once one of these counters is not zero; empty: always
    bad: bool = False  #: best if it is zero


def _growth(*counters: str) -> Value:
    return lambda rates, _stats: rates.per_s(*counters)


def _rate(name: str, *counters: str, always: bool = True, bad: bool = False) -> Series:
    return Series(name, _growth(*counters), short_number, matters=() if always else counters, bad=bad)


def _bytes(name: str, *counters: str, always: bool = True) -> Series:
    return Series(name, _growth(*counters), lambda value: f"{short_number(value)}B", matters=() if always else counters)


READS: Final = _rate("keys read/s", "read_hits")
SERIES: Final[tuple[Series, ...]] = (
    READS,
    Series("hit rate", lambda rates, _stats: rates.hit_rate, short_percent_text, top=1.0),
    _rate("keys looked up/s", "lookup_hits", "lookup_misses"),
    _rate("published/s", "publishes"),
    _bytes("published bytes/s", "published_bytes"),
    _rate("evicted/s", "evictions"),
    Series("shares held", lambda _rates, stats: float(stats.held), short_number),
    _rate("no space/s", "no_space", bad=True),
    _rate("prefetched from L1/s", "prefetch_l1_hits", always=False),
    _rate("prefetched from L2/s", "prefetch_l2_hits", always=False),
    _bytes("L2 bytes loaded/s", "l2_loaded_bytes", always=False),
    _bytes("L2 bytes stored/s", "l2_stored_bytes", always=False),
    _rate(
        *("L2 failures/s", "l2_lookup_errors", "l2_load_errors", "l2_store_errors", "l2_timeouts", "l2_damaged"),
        always=False,
        bad=True,
    ),
    _rate("leases ended/s", "leases_revoked", "writes_detached", always=False, bad=True),
    _rate("reaped/s", "reaped_shares", "reaped_writes", always=False, bad=True),
    Series("shares reserved", lambda _rates, stats: float(stats.reserved), short_number),
)


def series_of(stats: Stats) -> list[tuple[int, Series]]:
    """Those that matter in this arena, with their place in a sample."""
    counters = stats.counters
    return [
        (place, series)
        for place, series in enumerate(SERIES)
        if not series.matters or any(getattr(counters, name) for name in series.matters)
    ]
