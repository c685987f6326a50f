"""What an arena says of itself: the dataclasses behind ``Cache.stats()``, ``Cache.reap()`` and ``inspect()``.

Every number is a snapshot taken without a lock; numbers of one snapshot may differ by the operations
that ran meanwhile. Counters count since the arena was created and are the sum over its lanes.

The text beside each field says what it is to people and to programs: metrics and the JSON schema are made of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final


@dataclass(frozen=True, slots=True)
class Counters:
    """Events since the arena was created. Names match ``SC_COUNTERS`` in ``native/layout.h``."""

    lookup_hits: Annotated[int, "keys that lookup found readable"] = 0
    lookup_misses: Annotated[int, "keys at which lookup stopped"] = 0
    read_hits: Annotated[int, "keys that read returned"] = 0
    read_misses: Annotated[int, "keys that read did not find, or found being written"] = 0
    claims: Annotated[int, "reads that claimed a reserved share (the others took a fresh one)"] = 0
    grants: Annotated[int, "reserved shares granted, to any lane"] = 0
    releases: Annotated[int, "held shares given back"] = 0
    reserved_returned: Annotated[int, "reserved shares given back unread (finish_read, cancel_read)"] = 0
    reservations: Annotated[int, "objects reserved for writing"] = 0
    publishes: Annotated[int, "objects published"] = 0
    published_bytes: Annotated[int, "payload bytes of the objects published"] = 0
    aborts: Annotated[int, "writes given back by their writer"] = 0
    deletes: Annotated[int, "objects that a caller deleted"] = 0
    evictions: Annotated[int, "objects that the cache evicted"] = 0
    evicted_bytes: Annotated[int, "payload bytes of the objects evicted"] = 0
    no_space: Annotated[int, "reservations refused because no run of blocks could be freed"] = 0
    leases_revoked: Annotated[int, "reserved shares revoked after read_lease_s"] = 0
    writes_detached: Annotated[int, "writers that lost their key after write_lease_s"] = 0
    reaped_shares: Annotated[int, "shares taken back from dead lanes"] = 0
    reaped_writes: Annotated[int, "half-written objects taken back from dead lanes"] = 0
    lock_steals: Annotated[int, "times the arena lock was taken from a dead holder"] = 0
    rebuilds: Annotated[int, "times index and block map were rebuilt from the slots"] = 0
    prefetch_requests: Annotated[int, "prefetches submitted"] = 0
    prefetch_keys: Annotated[int, "keys that prefetches asked for"] = 0
    prefetch_l1_hits: Annotated[int, "keys that prefetches asked for and granted from the arena"] = 0
    prefetch_l2_hits: Annotated[int, "keys that prefetches asked for, loaded from L2 and granted"] = 0
    prefetch_cancels: Annotated[int, "prefetches cancelled"] = 0
    prefetch_contended: Annotated[int, "prefetches that waited in vain for a key which another writer had in hand"] = 0
    prefetch_no_space: Annotated[int, "prefetches that were cut short, since the arena had no room"] = 0
    prefetch_errors: Annotated[int, "prefetches whose result carries an error"] = 0
    l2_lookups: Annotated[int, "keys looked up in an L2"] = 0
    l2_lookup_hits: Annotated[int, "keys looked up in an L2 that were there"] = 0
    l2_lookup_errors: Annotated[int, "look-ups that raised or answered wrongly"] = 0
    l2_loads: Annotated[int, "objects loaded from L2"] = 0
    l2_loaded_bytes: Annotated[int, "payload bytes of the objects loaded from L2"] = 0
    l2_load_misses: Annotated[int, "objects that look-up had promised and load did not find"] = 0
    l2_load_errors: Annotated[int, "loads that raised or answered wrongly"] = 0
    l2_timeouts: Annotated[int, "calls of an L2 that took longer than l2_timeout_s"] = 0
    l2_damaged: Annotated[int, "objects of an L2 that were not what had been stored"] = 0
    l2_stores: Annotated[int, "objects stored to an L2"] = 0
    l2_stored_bytes: Annotated[int, "payload bytes of the objects stored to an L2"] = 0
    l2_store_skips: Annotated[int, "objects not stored, since the L2 had them"] = 0
    l2_store_retries: Annotated[int, "stores tried again after an error"] = 0
    l2_store_errors: Annotated[int, "objects given up after the last try"] = 0
    l2_store_no_space: Annotated[int, "objects that the L2 had no room for"] = 0
    l2_store_drops: Annotated[int, "objects not stored, one an L2, since it hung or too much waited for it"] = 0
    l2_evictions: Annotated[int, "objects that a store of limited capacity removed to make room"] = 0
    l2_evicted_bytes: Annotated[int, "bytes of the objects that a store of limited capacity removed to make room"] = 0


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is going on at this moment, in processes that live. Names match ``SC_GAUGES``."""

    prefetch_queued: Annotated[int, "prefetches that wait for their turn"] = 0
    prefetch_in_flight: Annotated[int, "prefetches being worked on"] = 0
    l2_loading: Annotated[int, "objects being loaded from L2"] = 0
    l2_storing: Annotated[int, "objects being stored to L2"] = 0
    l2_backlog_bytes: Annotated[int, "payload bytes held until they are stored to L2"] = 0
    pinned_bytes: Annotated[int, "payload bytes that a process has page-locked for a GPU"] = 0


#: Upper bounds of a histogram's buckets, seconds: 16 us, doubled 21 times, and infinity.
BUCKETS_S: Final[tuple[float, ...]] = (*(16e-6 * 2**b for b in range(22)), math.inf)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took. Bucket b counts times up to ``BUCKETS_S[b]`` and above the one before."""

    sum_s: Annotated[float, "sum of the times, seconds"] = 0.0
    buckets: Annotated[
        tuple[int, ...],
        "how many times were above the bucket before and up to 16 us * 2**b; the last has all that are longer",
    ] = (0,) * len(BUCKETS_S)

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

    prefetch_queue: Annotated[Histogram, "from submit to its turn"] = Histogram()
    prefetch_first_key: Annotated[Histogram, "from submit to the first readable key"] = Histogram()
    prefetch_total: Annotated[Histogram, "from submit to the result"] = Histogram()
    l2_lookup: Annotated[Histogram, "a look-up call"] = Histogram()
    l2_load: Annotated[Histogram, "a load call"] = Histogram()
    l2_store: Annotated[Histogram, "a store call"] = Histogram()


@dataclass(frozen=True, slots=True)
class LaneInfo:
    """One row of the share table. ``pid``, ``command`` and ``started`` are for people, never for deciding."""

    index: Annotated[int, "its row of the share table"]
    role: Annotated[str, "'private', 'rank', 'controller' or 'free' (set free by its group)"]
    state: Annotated[str, "'alive', 'dead' (not yet reaped) or 'vacant' (nobody there, nothing left)"]
    group: Annotated[str, "empty for a private lane"]
    rank: Annotated[int | None, "None for a controller"]
    world_size: Annotated[int, "how many ranks its group has"]
    incarnation: Annotated[int, "how often the lane was taken"]
    pid: Annotated[int, "of who is there, or was last; 0 after a close"]
    command: Annotated[str, "the name of its process"]
    started: Annotated[float, "Unix time of the attach, seconds"]
    reserved: Annotated[int, "shares granted, not yet claimed"]
    held: Annotated[int, "shares claimed, not yet given back"]
    writing: Annotated[int, "objects that the lane is writing"]
    counters: Counters
    held_bytes: Annotated[int, "payload bytes in blocks of the objects that the lane holds shares of"] = 0
    oldest_held: Annotated[float | None, "Unix time since which the lane has held a share longest, seconds"] = None
    stopped: Annotated[bool, "alive, but its process is stopped (SIGSTOP, a debugger), as far as /proc tells"] = False
    gauges: Gauges = Gauges()
    histograms: Histograms = Histograms()


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds the arena lock at this moment."""

    lane: Annotated[int, "the index of the holder's lane"]
    incarnation: Annotated[int, "of that lane"]
    pid: Annotated[int, "of the holder"]
    alive: Annotated[bool, "false: the holder is dead, and the next who wants the lock takes it"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Occupancy and counters of an arena."""

    capacity: Annotated[int, "payload bytes of host memory that the arena has room for"]
    block_size: Annotated[int, "bytes of a block, the unit in which payload is allocated"]
    used_bytes: Annotated[int, "payload bytes in blocks that objects occupy: ready + reserved + writing + held + dead"]
    resident_bytes: Annotated[int, "bytes of the segment that are allocated in memory, metadata included"]
    slots: Annotated[int, "objects at most"]
    objects: Annotated[int, "objects that are readable"]
    writing: Annotated[int, "objects that are being written"]
    reserved: Annotated[int, "shares granted, not yet claimed"]
    held: Annotated[int, "shares claimed, not yet given back"]
    lanes_alive: Annotated[int, "lanes of processes that live"]
    lanes_dead: Annotated[int, "dead lanes that nobody has reaped yet"]
    counters: Counters
    groups: Annotated[int, "groups with a live lane"] = 0
    ready_bytes: Annotated[int, "of used_bytes: what can be evicted at once"] = 0
    reserved_bytes: Annotated[int, "of used_bytes: kept by reserved shares whose lease is not over"] = 0
    writing_bytes: Annotated[int, "of used_bytes: being written"] = 0
    held_bytes: Annotated[int, "of used_bytes: kept by held shares"] = 0
    dead_bytes: Annotated[int, "of used_bytes: kept by shares or writes of the dead only, until they are reaped"] = 0
    gauges: Gauges = Gauges()
    histograms: Histograms = Histograms()

    @property
    def hit_rate(self) -> float | None:
        """Keys read / keys asked of ``read``, 0 to 1; None before the first."""
        asked = self.counters.read_hits + self.counters.read_misses
        return self.counters.read_hits / asked if asked else None


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object and its place.

    ``standing`` is why its blocks are not to be had, the strongest reason first: ``"held"``, ``"writing"``,
    ``"reserved"`` (a reserved share, its lease not over), ``"dead"`` (one of these, but all of it belongs to dead lanes
    that nobody has reaped yet); else ``"ready"``: it can be evicted.
    """

    key: Annotated[bytes, "in JSON as hex"]
    nbytes: Annotated[int, "payload bytes"]
    block: Annotated[int, "its first block, in its region"]
    blocks: Annotated[int, "how many it occupies"]
    standing: Annotated[str, "'held', 'writing', 'reserved', 'dead' (kept by the dead) or 'ready' (can be evicted)"]
    written: Annotated[float, "Unix time at which its memory was reserved, seconds"]
    owner: Annotated[int, "the lane that writes it, or wrote it"]
    reserved: Annotated[int, "shares of all lanes granted, not yet claimed"]
    held: Annotated[int, "shares of all lanes claimed, not yet given back"]
    region: Annotated[int, "where it lies: 0 is host memory, others are regions of device memory"] = 0


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One region of device memory."""

    number: Annotated[int, "1 and up; 0 is host memory"]
    state: Annotated[str, "'live', or 'lost' (its owner is gone, and somebody still has shares of objects in it)"]
    owner: Annotated[int, "the lane whose process has allocated it"]
    device: Annotated[int, "the owner's number of the device: cuda:<device>"]
    uuid: Annotated[str, "of the device, as nvidia-smi -L shows it"]
    capacity: Annotated[int, "payload bytes that it has room for"]
    used_bytes: Annotated[int, "payload bytes in blocks that objects occupy"]
    block_size: Annotated[int, "bytes of a block in it"]
    opened: Annotated[tuple[int, ...], "the lanes whose processes have opened it, beside the owner's"] = ()
    incarnation: Annotated[int, "of the owner's lane: in another one the owner is gone"] = 0


@dataclass(frozen=True, slots=True)
class ShareInfo:
    """What one lane has of one object."""

    kind: Annotated[str, "'held', 'reserved' or 'writing'"]
    lane: Annotated[int, "the index of its lane"]
    key: Annotated[bytes, "of the object; in JSON as hex"]
    nbytes: Annotated[int, "payload bytes of the object"]
    count: Annotated[int, "how many of that kind"]
    since: Annotated[float, "Unix time since which it holds it, of the last grant, or of the write's begin, seconds"]
    region: Annotated[int, "where the object lies: 0 is host memory"] = 0


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What ``inspect(name)`` sees from outside. Where ``problem`` is set the arena cannot be read
    (damaged, foreign, of another version) and all after ``inode`` is empty."""

    name: str
    path: Annotated[str, "of the segment's file"]
    segment_bytes: Annotated[int, "length of that file; what of it is in memory is resident_bytes"]
    problem: Annotated[str | None, "why it cannot be read"] = None
    old: Annotated[bool, "made before the last boot, so that nobody can be attached"] = False
    inode: Annotated[int, "of the segment's file: another one under the same name is another arena"] = 0
    fingerprint: Annotated[str, "what it was created under"] = ""
    created: Annotated[float, "Unix time of the arena's creation, seconds"] = 0.0
    read_lease_s: Annotated[float, "after which a reserved share keeps nothing"] = 0.0
    write_lease_s: Annotated[float, "after which a write may lose its key"] = 0.0
    lock_timeout_s: Annotated[float, "after which who waits for the arena lock gives up"] = 0.0
    eviction_window_s: Annotated[float, "what one more request is worth; 0: eviction is by time alone"] = 0.0
    lane_limit: Annotated[int, "lanes at most"] = 0
    layouts: Annotated[int, "layouts in the layout table"] = 0
    lock: Annotated[LockInfo | None, "None while nobody holds it"] = None
    stats: Annotated[Stats | None, "None where it cannot be read"] = None
    lanes: Annotated[tuple[LaneInfo, ...], "every lane that was ever taken, by index"] = ()
    huge: Annotated[str, "the option huge= of the tmpfs that it lies on, as for mount(8); empty: unknown"] = ""
    regions: Annotated[tuple[RegionInfo, ...], "of device memory, by number"] = ()
    region_limit: Annotated[int, "regions of device memory at most"] = 0
    objects: Annotated[tuple[ObjectInfo, ...] | None, "by place; None unless inspect was asked for them"] = None
    shares: Annotated[tuple[ShareInfo, ...] | None, "longest first; None unless inspect was asked for them"] = None

    @property
    def stale(self) -> bool:
        """True where no process is attached: what ``shmcache-cleanup --stale`` removes."""
        readable = self.problem is None
        return self.old or (readable and not any(lane.state == "alive" for lane in self.lanes))

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON; keys in hex."""
        plain = asdict(self)
        for item in (*(plain["objects"] or ()), *(plain["shares"] or ())):
            item["key"] = item["key"].hex()
        return {**plain, "stale": self.stale}


@dataclass(frozen=True, slots=True)
class ReapReport:
    """What ``Cache.reap()`` took back from dead lanes."""

    lanes: Annotated[int, "dead lanes found"] = 0
    shares: Annotated[int, "shares, reserved and held"] = 0
    writes: Annotated[int, "half-written objects"] = 0
    lock: Annotated[bool, "the arena lock had been held by a dead lane"] = False
