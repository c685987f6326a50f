"""From the core's structs to the dataclasses of ``stats.py``."""

from __future__ import annotations

import os
from functools import reduce
from itertools import count, takewhile
from operator import add
from typing import Any

from shmcache._binding import NOBODY, Handle, ffi, lib
from shmcache.stats import ArenaInfo, Counters, Gauges, Histogram, Histograms, LaneInfo, LockInfo, Stats

_ROLES = {0: "free", 1: "private", 2: "rank", 3: "controller"}
_STATES = {1: "alive", 2: "dead", 3: "vacant"}


def statistic_names(kind: int) -> tuple[str, ...]:
    """The names of a kind of statistics, in the core's order."""
    names = takewhile(bool, (lib.sc_statistic_name(kind, i) for i in count()))
    return tuple(ffi.string(name).decode() for name in names)


COUNTERS = statistic_names(lib.SC_COUNTER)
GAUGES = statistic_names(lib.SC_GAUGE)
HISTOGRAMS = statistic_names(lib.SC_HISTOGRAM)


def take(handle: Handle) -> tuple[Any, tuple[LaneInfo, ...]]:
    """The core's ``struct sc_info`` and every lane that was ever taken. No lock; reads only."""
    info = ffi.new("struct sc_info *")
    lib.sc_get_info(handle, info)
    lib.sc_count_objects(handle, info)
    return info, tuple(_lane(handle, index, info.lane_writing[index]) for index in range(info.lane_limit))


def stats(handle: Handle, fd: int) -> Stats:
    """Occupancy and counters."""
    return _stats(*take(handle), fd)


def arena_info(name: str, path: str, handle: Handle, fd: int) -> ArenaInfo:
    """All that an arena says of itself."""
    info, lanes = take(handle)
    return ArenaInfo(
        name=name,
        path=path,
        segment_bytes=info.segment_bytes,
        fingerprint=bytes(ffi.buffer(info.fingerprint, info.fingerprint_bytes)).decode("utf-8", "replace"),
        created=info.created_ns / 1e9,
        read_lease_s=info.read_lease_us / 1e6,
        write_lease_s=info.write_lease_us / 1e6,
        lock_timeout_s=info.lock_timeout_us / 1e6,
        lane_limit=info.lanes,
        layouts=info.layouts,
        lock=_lock(handle, info),
        stats=_stats(info, lanes, fd),
        lanes=lanes,
    )


def _lock(handle: Handle, info: Any) -> LockInfo | None:
    if info.lock_lane == NOBODY:
        return None
    lane = ffi.new("struct sc_lane_info *")
    lib.sc_get_lane(handle, info.lock_lane, lane)
    return LockInfo(info.lock_lane, info.lock_incarnation, lane.pid, info.lock_alive)


def _stats(info: Any, lanes: tuple[LaneInfo, ...], fd: int) -> Stats:
    return Stats(
        capacity=info.capacity,
        block_size=info.block_size,
        used_bytes=info.used_bytes,
        resident_bytes=os.fstat(fd).st_blocks * 512,
        slots=info.slots,
        objects=info.objects,
        writing=info.writing,
        reserved=sum(lane.reserved for lane in lanes),
        held=sum(lane.held for lane in lanes),
        lanes_alive=sum(lane.state == "alive" for lane in lanes),
        lanes_dead=sum(lane.state == "dead" for lane in lanes),
        counters=Counters(**{name: sum(getattr(lane.counters, name) for lane in lanes) for name in COUNTERS}),
        gauges=Gauges(**{name: sum(getattr(lane.gauges, name) for lane in lanes) for name in GAUGES}),
        histograms=_merge([lane.histograms for lane in lanes]),
    )


def _merge(parts: list[Histograms]) -> Histograms:
    merged = (reduce(add, (getattr(part, name) for part in parts), Histogram()) for name in HISTOGRAMS)
    return Histograms(**dict(zip(HISTOGRAMS, merged, strict=True)))


def _gauges(lane: Any) -> Gauges:
    """A dead process is at nothing, and a number below zero was read while it changed."""
    if _STATES.get(lane.state) != "alive":
        return Gauges()
    return Gauges(*(0 if lane.gauges[i] >> 63 else lane.gauges[i] for i in range(len(GAUGES))))


def _histograms(lane: Any) -> Histograms:
    found = (lane.histograms[i] for i in range(len(HISTOGRAMS)))
    return Histograms(*(Histogram(h.sum_us / 1e6, tuple(h.buckets)) for h in found))


def _lane(handle: Handle, index: int, writing: int) -> LaneInfo:
    lane = ffi.new("struct sc_lane_info *")
    lib.sc_get_lane(handle, index, lane)
    return LaneInfo(
        index=index,
        role=_ROLES.get(lane.role, "unknown"),
        state=_STATES.get(lane.state, "vacant"),
        group=bytes(ffi.buffer(lane.group, lane.group_bytes)).decode("utf-8", "replace"),
        rank=None if lane.role == 3 else lane.rank,
        world_size=lane.world_size,
        incarnation=lane.incarnation,
        pid=lane.pid,
        command=ffi.string(lane.command, 24).decode("utf-8", "replace"),
        started=lane.started_ns / 1e9,
        reserved=lane.reserved,
        held=lane.held,
        writing=writing,
        counters=Counters(*(lane.counters[i] for i in range(len(COUNTERS)))),
        gauges=_gauges(lane),
        histograms=_histograms(lane),
    )
