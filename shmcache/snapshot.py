"""From the core's structs to the dataclasses of ``stats.py``."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from functools import reduce
from itertools import count, takewhile
from operator import add, attrgetter
from typing import Any

from shmcache._binding import NOBODY, Handle, ffi, lib, process_state
from shmcache.directory import huge_pages
from shmcache.stats import (
    ArenaInfo,
    Counters,
    Gauges,
    Histogram,
    Histograms,
    LaneInfo,
    LockInfo,
    ObjectInfo,
    RegionInfo,
    ShareInfo,
    Stats,
)

_ROLES = {0: "free", 1: "private", 2: "rank", 3: "controller"}
_STATES = {1: "alive", 2: "dead", 3: "vacant"}
_REGION_STATES = {1: "live", 2: "lost"}
_STANDINGS = {
    lib.SC_IDLE: "ready",
    lib.SC_KEPT_RESERVED: "reserved",
    lib.SC_KEPT_WRITING: "writing",
    lib.SC_KEPT_HELD: "held",
    lib.SC_KEPT_DEAD: "dead",
}


def statistic_names(kind: int) -> tuple[str, ...]:
    """The names of a kind of statistics, in the core's order."""
    names = takewhile(bool, (lib.sc_statistic_name(kind, i) for i in count()))
    return tuple(ffi.string(name).decode() for name in names)


COUNTERS = statistic_names(lib.SC_COUNTER)
GAUGES = statistic_names(lib.SC_GAUGE)
HISTOGRAMS = statistic_names(lib.SC_HISTOGRAM)


def stats(handle: Handle, fd: int) -> Stats:
    """Occupancy and counters."""
    info, census = _look(handle)
    return _stats(info, census, _lanes(handle, info, census, time.time()), fd)


def arena_info(name: str, path: str, handle: Handle, fd: int, *, objects: bool, shares: bool) -> ArenaInfo:
    """All that an arena says of itself."""
    info, census = _look(handle)
    now = time.time()
    lanes = _lanes(handle, info, census, now)
    found, n = _list_objects(handle, info.slots if objects or shares else 0)
    return ArenaInfo(
        name=name,
        path=path,
        segment_bytes=info.segment_bytes,
        inode=os.fstat(fd).st_ino,
        huge=huge_pages(fd),
        fingerprint=bytes(ffi.buffer(info.fingerprint, info.fingerprint_bytes)).decode("utf-8", "replace"),
        created=info.created_ns / 1e9,
        read_lease_s=info.read_lease_us / 1e6,
        write_lease_s=info.write_lease_us / 1e6,
        lock_timeout_s=info.lock_timeout_us / 1e6,
        eviction_window_s=info.eviction_window_us / 1e6,
        lane_limit=info.lanes,
        layouts=info.layouts,
        lock=_lock(handle, info),
        stats=_stats(info, census, lanes, fd),
        lanes=lanes,
        regions=regions(handle, info.regions),
        region_limit=info.regions,
        objects=_objects(found[0:n], now) if objects else None,
        shares=_shares(handle, found[0:n], len(lanes), now) if shares else None,
    )


def _look(handle: Handle) -> tuple[Any, Any]:
    """The core's ``struct sc_info`` and ``struct sc_census``."""
    info, census = ffi.new("struct sc_info *"), ffi.new("struct sc_census *")
    lib.sc_get_info(handle, info)
    lib.sc_census(handle, census)
    return info, census


def _lock(handle: Handle, info: Any) -> LockInfo | None:
    if info.lock_lane == NOBODY:
        return None
    lane = ffi.new("struct sc_lane_info *")
    lib.sc_get_lane(handle, info.lock_lane, lane)
    return LockInfo(info.lock_lane, info.lock_incarnation, lane.pid, info.lock_alive)


def _stats(info: Any, census: Any, lanes: tuple[LaneInfo, ...], fd: int) -> Stats:
    return Stats(
        capacity=info.capacity,
        block_size=info.block_size,
        used_bytes=sum(census.bytes),
        resident_bytes=os.fstat(fd).st_blocks * 512,
        slots=info.slots,
        objects=census.objects,
        writing=census.writing,
        reserved=sum(lane.reserved for lane in lanes),
        held=sum(lane.held for lane in lanes),
        lanes_alive=sum(lane.state == "alive" for lane in lanes),
        lanes_dead=sum(lane.state == "dead" for lane in lanes),
        groups=len({lane.group for lane in lanes if lane.group and lane.state == "alive"}),
        **{f"{name}_bytes": census.bytes[standing] for standing, name in _STANDINGS.items()},
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


def _lanes(handle: Handle, info: Any, census: Any, now: float) -> tuple[LaneInfo, ...]:
    """Every lane that was ever taken."""
    return tuple(_lane(handle, index, census.lanes[index], now) for index in range(info.lane_limit))


def _lane(handle: Handle, index: int, has: Any, now: float) -> LaneInfo:
    lane = ffi.new("struct sc_lane_info *")
    lib.sc_get_lane(handle, index, lane)
    state = _STATES.get(lane.state, "vacant")
    return LaneInfo(
        index=index,
        role=_ROLES.get(lane.role, "unknown"),
        state=state,
        group=bytes(ffi.buffer(lane.group, lane.group_bytes)).decode("utf-8", "replace"),
        rank=None if lane.role == 3 else lane.rank,
        world_size=lane.world_size,
        incarnation=lane.incarnation,
        pid=lane.pid,
        command=ffi.string(lane.command, 24).decode("utf-8", "replace"),
        started=lane.started_ns / 1e9,
        reserved=has.reserved,
        held=has.held,
        writing=has.writing,
        held_bytes=has.held_bytes,
        oldest_held=now - has.oldest_held_us / 1e6 if has.held else None,
        stopped=state == "alive" and process_state(lane.pid) in ("stopped", "traced"),
        counters=Counters(*(lane.counters[i] for i in range(len(COUNTERS)))),
        gauges=_gauges(lane),
        histograms=_histograms(lane),
    )


def regions(handle: Handle, limit: int) -> tuple[RegionInfo, ...]:
    """The regions of device memory that there are. An entry that contradicts itself is none: ``verify`` tells."""
    info = ffi.new("struct sc_region_info *")
    found = ((number, lib.sc_get_region(handle, number, info)) for number in range(1, limit + 1))
    return tuple(_region(number, info) for number, code in found if code == 0 and info.state)


def _region(number: int, info: Any) -> RegionInfo:
    return RegionInfo(
        number=number,
        state=_REGION_STATES[info.state],
        owner=info.owner,
        device=info.device,
        uuid=device_uuid(bytes(info.uuid)),
        capacity=info.blocks * info.block_size,
        used_bytes=max(0, info.blocks - info.free_blocks) * info.block_size,
        block_size=info.block_size,
        incarnation=info.incarnation,
        opened=tuple(lane for lane in range(64 * len(info.opened)) if info.opened[lane // 64] >> lane % 64 & 1),
    )


def device_uuid(raw: bytes) -> str:
    """As ``nvidia-smi -L`` shows it."""
    return f"GPU-{uuid.UUID(bytes=raw)}"


def _list_objects(handle: Handle, slots: int) -> tuple[Any, int]:
    """The core's ``struct sc_object_info[]`` by slot, and how many. It must outlive what is taken from it."""
    found = ffi.new("struct sc_object_info[]", slots)
    return found, lib.sc_list_objects(handle, found, slots)


def _objects(listed: Any, now: float) -> tuple[ObjectInfo, ...]:
    return tuple(
        ObjectInfo(
            key=_key(o),
            nbytes=o.nbytes,
            block=o.block,
            blocks=o.blocks,
            standing=_STANDINGS[o.standing],
            written=now - o.age_us / 1e6,
            owner=o.owner,
            reserved=o.reserved,
            held=o.held,
            region=o.region,
        )
        for o in sorted(listed, key=attrgetter("region", "block"))
    )


def _key(o: Any) -> bytes:
    return bytes(ffi.buffer(o.key, o.key_bytes))


def _shares(handle: Handle, listed: Any, lanes: int, now: float) -> tuple[ShareInfo, ...]:
    objects = {(o.slot, o.generation): o for o in listed}
    found = [
        ShareInfo("writing", o.owner, _key(o), o.nbytes, 1, now - o.age_us / 1e6, o.region) for o in listed if o.writing
    ]
    shares = ffi.new("struct sc_share_info[]", max((o.slot for o in listed), default=0) + 1)
    for lane in range(lanes):
        for share in shares[0 : lib.sc_list_shares(handle, lane, shares, len(shares))]:
            if o := objects.get((share.slot, share.generation)):
                found += _shares_of(lane, o, share, now)
    return tuple(sorted(found, key=attrgetter("since", "lane", "key")))


def _shares_of(lane: int, o: Any, share: Any, now: float) -> Iterator[ShareInfo]:
    if share.held:
        yield ShareInfo("held", lane, _key(o), o.nbytes, share.held, now - share.held_us / 1e6, o.region)
    if share.reserved:
        yield ShareInfo("reserved", lane, _key(o), o.nbytes, share.reserved, now - share.reserved_us / 1e6, o.region)
