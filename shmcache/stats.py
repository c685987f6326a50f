"""What an arena says of itself: the dataclasses behind ``Cache.stats()``, ``Cache.reap()`` and ``inspect()``.

Every number is a snapshot taken without a lock; numbers of one snapshot may differ by the operations
that ran meanwhile. Counters count since the arena was created and are the sum over its lanes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final


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
    prefetch_requests: int = 0  #: prefetches submitted
    prefetch_keys: int = 0  #: keys that they asked for
    prefetch_l1_hits: int = 0  #: of these, granted from the arena
    prefetch_l2_hits: int = 0  #: of these, loaded from L2 and granted
    prefetch_cancels: int = 0  #: prefetches cancelled
    prefetch_contended: int = 0  #: prefetches that waited in vain for a key which another writer had in hand
    prefetch_no_space: int = 0  #: prefetches that were cut short, since the arena had no room
    prefetch_errors: int = 0  #: prefetches whose result carries an error
    l2_lookups: int = 0  #: keys looked up in an L2
    l2_lookup_hits: int = 0  #: of these, there
    l2_lookup_errors: int = 0  #: look-ups that raised or answered wrongly
    l2_loads: int = 0  #: objects loaded from L2
    l2_loaded_bytes: int = 0  #: payload bytes of these
    l2_load_misses: int = 0  #: objects that look-up had promised and load did not find
    l2_load_errors: int = 0  #: loads that raised or answered wrongly
    l2_timeouts: int = 0  #: calls of an L2 that took longer than ``l2_timeout_s``
    l2_damaged: int = 0  #: objects of an L2 that were not what had been stored
    l2_stores: int = 0  #: objects stored to an L2
    l2_stored_bytes: int = 0  #: payload bytes of these
    l2_store_skips: int = 0  #: objects not stored, since the L2 had them
    l2_store_retries: int = 0  #: stores tried again after an error
    l2_store_errors: int = 0  #: objects given up after the last try
    l2_store_no_space: int = 0  #: objects that the L2 had no room for
    l2_store_drops: int = 0  #: objects not stored, one an L2, since it hung or too much waited for it
    l2_evictions: int = 0  #: objects that a store of limited capacity removed to make room
    l2_evicted_bytes: int = 0  #: bytes of these


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is going on at this moment, in processes that live. Names match ``SC_GAUGES``."""

    prefetch_queued: int = 0  #: prefetches that wait for their turn
    prefetch_in_flight: int = 0  #: prefetches being worked on
    l2_loading: int = 0  #: objects being loaded from L2
    l2_storing: int = 0  #: objects being stored to L2
    l2_backlog_bytes: int = 0  #: payload bytes held until they are stored to L2


#: Upper bounds of a histogram's buckets, seconds: 16 us, doubled 21 times, and infinity.
BUCKETS_S: Final[tuple[float, ...]] = (*(16e-6 * 2**b for b in range(22)), math.inf)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took. Bucket b counts times up to ``BUCKETS_S[b]`` and above the one before."""

    sum_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * len(BUCKETS_S)

    @property
    def count(self) -> int:
        """How many times were noted."""
        return sum(self.buckets)

    def quantile_s(self, q: float) -> float | None:
        """The upper bound of the bucket that quantile ``q`` (0 to 1) is in: infinity in the last; None of nothing."""
        rank, below = q * self.count, 0
        for bound, n in zip(BUCKETS_S, self.buckets, strict=True):
            below += n
            if n and below >= rank:
                return bound
        return None

    def __add__(self, other: Histogram) -> Histogram:
        pairs = zip(self.buckets, other.buckets, strict=True)
        return Histogram(self.sum_s + other.sum_s, tuple(a + b for a, b in pairs))


@dataclass(frozen=True, slots=True)
class Histograms:
    """Times since the arena was created. Names match ``SC_HISTOGRAMS``."""

    prefetch_queue: Histogram = Histogram()  #: from submit to its turn
    prefetch_first_key: Histogram = Histogram()  #: from submit to the first readable key
    prefetch_total: Histogram = Histogram()  #: from submit to the result
    l2_lookup: Histogram = Histogram()  #: a look-up call
    l2_load: Histogram = Histogram()  #: a load call
    l2_store: Histogram = Histogram()  #: a store call


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
    gauges: Gauges = field(default=Gauges())
    histograms: Histograms = field(default=Histograms())


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
    gauges: Gauges = field(default=Gauges())
    histograms: Histograms = field(default=Histograms())

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
    old: bool = False  #: made before the last boot, so that nobody can be attached
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
        readable = self.problem is None
        return self.old or (readable and not any(lane.state == "alive" for lane in self.lanes))

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
