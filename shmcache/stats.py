"""What an arena says of itself: the dataclasses behind ``Cache.stats()``, ``Cache.reap()`` and ``inspect()``.

Every number is a snapshot taken without a lock; numbers of one snapshot may differ by the operations
that ran meanwhile. Counters count since the arena was created and are the sum over its lanes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Counters:
    """Events since the arena was created. Names match ``SC_COUNTERS`` in ``native/layout.h``."""

    lookup_hits: int = 0  #: keys that ``lookup`` found readable
    lookup_misses: int = 0  #: keys at which ``lookup`` stopped
    read_hits: int = 0  #: keys that ``read`` returned
    read_misses: int = 0  #: keys that ``read`` did not find, or found being written
    claims: int = 0  #: reads that claimed a reserved share (the others took a fresh one)
    grants: int = 0  #: reserved shares granted, to any lane
    releases: int = 0  #: held shares given back
    reserved_returned: int = 0  #: reserved shares given back unread (``finish_read``, ``cancel_read``)
    reservations: int = 0  #: objects reserved for writing
    publishes: int = 0  #: objects published
    published_bytes: int = 0  #: payload bytes of the objects published
    aborts: int = 0  #: writes given back by their writer
    deletes: int = 0  #: objects that a caller deleted
    evictions: int = 0  #: objects that the cache evicted
    evicted_bytes: int = 0  #: payload bytes of the objects evicted
    no_space: int = 0  #: reservations refused because no run of blocks could be freed
    leases_revoked: int = 0  #: reserved shares revoked after ``read_lease_s``
    writes_detached: int = 0  #: writers that lost their key after ``write_lease_s``
    reaped_shares: int = 0  #: shares taken back from dead lanes
    reaped_writes: int = 0  #: half-written objects taken back from dead lanes
    lock_steals: int = 0  #: times the arena lock was taken from a dead holder
    rebuilds: int = 0  #: times index and block map were rebuilt from the slots


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """One row of the share table. ``pid``, ``command`` and ``started`` are for people, never for deciding."""

    index: int
    role: str  #: ``"private"``, ``"rank"``, ``"controller"`` or ``"free"`` (set free by its group)
    state: str  #: ``"alive"``, ``"dead"`` (not yet reaped) or ``"vacant"`` (nobody there, nothing left)
    group: str  #: empty for a private lane
    rank: int | None  #: None for a controller
    world_size: int
    incarnation: int  #: how often the lane was taken
    pid: int  #: 0 where nobody is there
    command: str
    started: float  #: Unix time of the attach, seconds
    reserved: int  #: shares granted, not yet claimed
    held: int  #: shares claimed, not yet given back
    writing: int  #: objects this lane is writing
    counters: Counters


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds the arena lock at this moment."""

    lane: int
    incarnation: int
    pid: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Stats:
    """Occupancy and counters of an arena."""

    capacity: int  #: payload bytes
    block_size: int  #: bytes
    used_bytes: int  #: payload bytes in blocks that objects occupy
    resident_bytes: int  #: bytes of the segment that are allocated in memory, metadata included
    slots: int  #: objects at most
    objects: int  #: objects that are readable
    writing: int  #: objects that are being written
    reserved: int  #: shares granted, not yet claimed
    held: int  #: shares claimed, not yet given back
    lanes_alive: int
    lanes_dead: int  #: dead lanes that nobody has reaped yet
    counters: Counters

    @property
    def hit_rate(self) -> float | None:
        """Keys read / keys asked of ``read``, 0 to 1; None before the first."""
        asked = self.counters.read_hits + self.counters.read_misses
        return self.counters.read_hits / asked if asked else None


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What ``inspect(name)`` sees from outside. Where ``problem`` is set the arena cannot be read
    (damaged, foreign, of another version) and all after ``problem`` is empty."""

    name: str
    path: str
    segment_bytes: int
    problem: str | None = None
    fingerprint: str = ""
    created: float = 0.0  #: Unix time, seconds
    read_lease_s: float = 0.0
    write_lease_s: float = 0.0
    lock_timeout_s: float = 0.0
    lane_limit: int = 0  #: lanes at most
    layouts: int = 0  #: layouts in the layout table
    lock: LockInfo | None = None  #: None while nobody holds it
    stats: Stats | None = None
    lanes: tuple[LaneInfo, ...] = field(default=())

    @property
    def stale(self) -> bool:
        """True where no process is attached: what ``shmcache-cleanup --stale`` removes."""
        return self.problem is None and not any(lane.state == "alive" for lane in self.lanes)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON."""
        return {**asdict(self), "stale": self.stale}


@dataclass(frozen=True, slots=True)
class ReapReport:
    """What ``Cache.reap()`` took back from dead lanes."""

    lanes: int = 0  #: dead lanes found
    shares: int = 0  #: shares, reserved and held
    writes: int = 0  #: half-written objects
    lock: bool = False  #: the arena lock had been held by a dead lane
