"""Prometheus metrics of arenas: ``registry.register(Collector("kv"))``, or ``Collector()`` for all of this user.

A scrape is one ``shmcache.inspect`` an arena: it takes no lane and no lock, and engines do not notice it. What a metric
says of itself (HELP) is what ``stats.py`` says of the fields that it comes from.

Needs prometheus-client: ``pip install 'shmcache[metrics]'``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Annotated, Any, Final, TypeAlias, get_args, get_origin, get_type_hints

from shmcache.arena import arenas, inspect
from shmcache.config import check_name
from shmcache.errors import ArenaNotFoundError, ShmcacheError
from shmcache.stats import BUCKETS_S, ArenaInfo, Counters, Gauges, Histogram, Histograms, LaneInfo, RegionInfo, Stats

try:
    from prometheus_client import registry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.utils import floatToGoString
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "shmcache.metrics needs prometheus-client: pip install 'shmcache[metrics]'", name=error.name
    ) from error

__all__ = ["Collector"]

_Row: TypeAlias = "tuple[Any, ...]"  # the values of all labels but the arena's, then what add_metric takes beside them
_Rows: TypeAlias = "Callable[[ArenaInfo], Iterable[_Row]]"

_LANE_STATES: Final = ("alive", "stopped", "dead")
_LANE_LABELS: Final = ("lane", "group", "rank")
_REGION_STATES: Final = ("live", "lost")
_REGION_LABELS: Final = ("region", "uuid")


class Collector(registry.Collector):
    """The arenas ``names`` as metrics; without names all arenas of this user, also those that come later.

    The label ``arena`` tells them apart. One that cannot be read, or that was named and is not there, has
    ``shmcache_up`` 0 and nothing else. A registry takes one Collector: give it all the names.
    """

    def __init__(self, *names: str) -> None:
        for name in names:
            check_name(name)
        self._names = tuple(dict.fromkeys(names))

    def describe(self) -> list[Metric]:
        """Every family without a value, so that to register it looks at no arena."""
        return [family.metric(()) for family in _FAMILIES]

    def collect(self) -> list[Metric]:
        """Every family, by one look at each arena. Nothing that is found there raises."""
        looks = self._looks()
        return [family.metric(looks) for family in _FAMILIES]

    def _looks(self) -> list[_Look]:
        if self._names:
            return [_look(name) for name in self._names]
        try:
            found = arenas()
        except (OSError, ShmcacheError):  # no /dev/shm at all; SHMCACHE_DIRECTORY names no fit directory
            return []
        # What went away since it was listed is not unreadable: it is not one of the arenas any more.
        return [look for look in map(_look, found) if not look.gone]


@dataclass(frozen=True, slots=True)
class _Look:
    """What was seen of an arena, and how long that took. ``info``: None where it cannot be read."""

    name: str
    info: ArenaInfo | None = None
    seconds: float = 0.0
    gone: bool = False


def _look(name: str) -> _Look:
    began = time.perf_counter()
    try:
        info = inspect(name)
    except (ShmcacheError, OSError) as error:
        return _Look(name, gone=isinstance(error, ArenaNotFoundError))
    return _Look(name, info if info.stats is not None else None, time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class _Family:
    """A metric family: its class, its name, what it says of itself, and its rows for one look at an arena."""

    make: Callable[..., Any]
    name: str
    text: str
    rows: Callable[[_Look], Iterable[_Row]]
    labels: tuple[str, ...] = ()

    def metric(self, looks: Iterable[_Look]) -> Metric:
        """The family with what was seen."""
        text = f"{self.text[0].upper()}{self.text[1:]}."
        metric: Metric = self.make(f"shmcache_{self.name}", text, labels=("arena", *self.labels))
        for look in looks:
            for labels, *value in self.rows(look):
                metric.add_metric((look.name, *labels), *value)  # type: ignore[attr-defined]
        return metric


def _if_readable(rows: _Rows) -> Callable[[_Look], Iterable[_Row]]:
    return lambda look: () if look.info is None else rows(look.info)


def _texts(prefix: str, cls: type) -> dict[str, str]:
    """What a dataclass says of its fields, by their path from an ArenaInfo."""
    hints = get_type_hints(cls, include_extras=True)
    return {prefix + field: get_args(hint)[1] for field, hint in hints.items() if get_origin(hint) is Annotated}


_TEXTS: Final = {
    **_texts("", ArenaInfo),
    **_texts("stats.", Stats),
    **_texts("stats.counters.", Counters),
    **_texts("stats.gauges.", Gauges),
    **_texts("stats.histograms.", Histograms),
    **_texts("lane.", LaneInfo),
    **_texts("lane.gauges.", Gauges),
    **_texts("region.", RegionInfo),
}


def _gauge(name: str, text: str, rows: _Rows, *labels: str) -> _Family:
    return _Family(GaugeMetricFamily, name, text, _if_readable(rows), labels)


def _field(name: str, path: str, make: Callable[..., Any] = GaugeMetricFamily) -> _Family:
    """One number, found by its path from an ArenaInfo."""
    number = attrgetter(path)
    return _Family(make, name, _TEXTS[path], _if_readable(lambda info: [((), number(info))]))


def _parts(name: str, label: str, paths: dict[str, str], text: str | None = None) -> _Family:
    """Numbers that add up, one a value of ``label``; without ``text`` each says what it is."""
    numbers = {value: attrgetter(path) for value, path in paths.items()}
    text = text or "; ".join(f"{_TEXTS[path]} ({value})" for value, path in paths.items())
    return _gauge(name, text, lambda info: [((value,), number(info)) for value, number in numbers.items()], label)


def _histogram(field: str) -> _Family:
    path = f"stats.histograms.{field}"
    times = attrgetter(path)

    def rows(info: ArenaInfo) -> list[_Row]:
        found: Histogram = times(info)
        return [((), list(zip(_BOUNDS, accumulate(found.buckets), strict=True)), found.sum_s)]

    return _Family(HistogramMetricFamily, f"{field}_seconds", f"how long it took: {_TEXTS[path]}", _if_readable(rows))


def _lane_field(name: str, field: str) -> _Family:
    """One number a lane, found by its path from a LaneInfo, where the lane has it."""
    number_of = attrgetter(field)

    def rows(info: ArenaInfo) -> list[_Row]:
        found = ((_lane_labels(lane), number_of(lane)) for lane in _owned(info))
        return [(labels, number) for labels, number in found if number is not None]

    return _gauge(name, _TEXTS[f"lane.{field}"], rows, *_LANE_LABELS)


def _owned(info: ArenaInfo) -> list[LaneInfo]:
    """The lanes of the living and of the dead."""
    return [lane for lane in info.lanes if lane.state != "vacant"]


def _lane_labels(lane: LaneInfo) -> tuple[str, str, str]:
    ranked = lane.group and lane.rank is not None
    return str(lane.index), _printable(lane.group), str(lane.rank) if ranked else ""


def _lane_state(lane: LaneInfo) -> str:
    return "stopped" if lane.stopped else lane.state


def _lanes(info: ArenaInfo) -> list[_Row]:
    found = [_lane_state(lane) for lane in info.lanes]
    return [((state,), found.count(state)) for state in _LANE_STATES]


def _lane_states(info: ArenaInfo) -> list[_Row]:
    return [
        ((*_lane_labels(lane), state), int(state == _lane_state(lane)))
        for lane in _owned(info)
        for state in _LANE_STATES
    ]


def _region_field(name: str, field: str) -> _Family:
    """One number a region of device memory."""

    def rows(info: ArenaInfo) -> list[_Row]:
        return [(_region_labels(region), getattr(region, field)) for region in info.regions]

    return _gauge(name, f"of a region of device memory: {_TEXTS[f'region.{field}']}", rows, *_REGION_LABELS)


def _region_labels(region: RegionInfo) -> tuple[str, str]:
    return str(region.number), _printable(region.uuid)


def _region_states(info: ArenaInfo) -> list[_Row]:
    return [
        ((*_region_labels(region), state), int(state == region.state))
        for region in info.regions
        for state in _REGION_STATES
    ]


def _region_openers(info: ArenaInfo) -> list[_Row]:
    return [(_region_labels(region), len(region.opened)) for region in info.regions]


def _lock(info: ArenaInfo) -> list[_Row]:
    holder = None
    if (lock := info.lock) is not None:
        stopped = any(lane.index == lock.lane and lane.stopped for lane in info.lanes)
        holder = "dead" if not lock.alive else "stopped" if stopped else "alive"
    return [((state,), int(state == holder)) for state in _LANE_STATES]


def _printable(text: str) -> str:
    """What anybody may have written into shared memory, as a label's value."""
    return "".join(char if char.isprintable() else "?" for char in text)


_BOUNDS: Final = tuple(map(floatToGoString, BUCKETS_S))
_STANDINGS: Final = ("ready", "reserved", "writing", "held", "dead")
_FAMILIES: Final = (
    _Family(
        GaugeMetricFamily,
        "up",
        "1 where the arena can be read, 0 where it is damaged, not this user's, or not there",
        lambda look: [((), int(look.info is not None))],
    ),
    _Family(
        GaugeMetricFamily,
        "scrape_seconds",
        "how long this scrape looked at the arena",
        lambda look: [((), look.seconds)] if look.info is not None else [],
    ),
    _gauge(
        "arena_info",
        "what the arena was created under",
        lambda info: [((_printable(info.fingerprint),), 1)],
        "fingerprint",
    ),
    _field("created_timestamp_seconds", "created"),
    _field("capacity_bytes", "stats.capacity"),
    _field("block_size_bytes", "stats.block_size"),
    _field("resident_bytes", "stats.resident_bytes"),
    _parts("used_bytes", "standing", {s: f"stats.{s}_bytes" for s in _STANDINGS}, _TEXTS["stats.used_bytes"]),
    _field("slots", "stats.slots"),
    _parts("objects", "state", {"ready": "stats.objects", "writing": "stats.writing"}),
    _parts("shares", "kind", {"reserved": "stats.reserved", "held": "stats.held"}),
    _field("layouts", "layouts"),
    _field("groups", "stats.groups"),
    _field("lane_limit", "lane_limit"),
    _gauge("lanes", "lanes that somebody owns, or that a dead process left and nobody has reaped", _lanes, "state"),
    _gauge("lock_held", "1 while the arena lock is held by a process in this state", _lock, "state"),
    _gauge("lane_state", "1 for the state that the lane is in", _lane_states, *_LANE_LABELS, "state"),
    _lane_field("lane_started_timestamp_seconds", "started"),
    _lane_field("lane_reserved_shares", "reserved"),
    _lane_field("lane_held_shares", "held"),
    _lane_field("lane_held_bytes", "held_bytes"),
    _lane_field("lane_oldest_held_timestamp_seconds", "oldest_held"),
    _lane_field("lane_writing_objects", "writing"),
    _lane_field("lane_pinned_bytes", "gauges.pinned_bytes"),
    _field("region_limit", "region_limit"),
    _region_field("region_capacity_bytes", "capacity"),
    _region_field("region_used_bytes", "used_bytes"),
    _region_field("region_block_size_bytes", "block_size"),
    _gauge(
        "region_state",
        "1 for the state that the region of device memory is in; lost: its owner is gone, and its objects with it",
        _region_states,
        *_REGION_LABELS,
        "state",
    ),
    _gauge("region_openers", f"how many they are: {_TEXTS['region.opened']}", _region_openers, *_REGION_LABELS),
    *(_field(name, f"stats.counters.{name}", CounterMetricFamily) for name in Counters.__slots__),
    *(_field(name, f"stats.gauges.{name}") for name in Gauges.__slots__),
    *map(_histogram, Histograms.__slots__),
)
