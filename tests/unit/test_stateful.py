"""One arena against a model in plain Python: whatever a controller and two ranks do, every status is foretold.

The model knows which blocks an object lies in, so it can tell NO_SPACE from a mere lack of free blocks, also where
objects without shares are evicted. Which of them go is the arena's choice; the model is told, and checks that no
others went.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from typing import Any

from arena_support import pattern
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import shmcache
from shmcache import ArenaConfig, Cache, ReadBatch, Status, ViewInUseError, WriteBatch

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NO_SPACE, NO_SHARE, LOCKED, NOT_OWNER = Status.NO_SPACE, Status.NO_SHARE, Status.LOCKED, Status.NOT_OWNER

BLOCK = 4096
CONTROLLER = 2  #: members 0 and 1 are the ranks
ALL_SPACE = 2**40

KEYS = tuple(b"key" * (i % 3) + b"%d" % i for i in range(9))
NUMBERS = st.integers(0, 3 * len(KEYS))  #: of keys; see Arena.key
BATCHES = st.lists(NUMBERS, min_size=1, max_size=4)
MEMBERS = st.integers(0, CONTROLLER)
EXTRA = st.integers(0, 1)
SIZES = st.sampled_from([1, 100, BLOCK, BLOCK + 1, 2 * BLOCK, 4 * BLOCK])
ANY = st.integers(0, 2**16)


def leading(found: list[Status]) -> int:
    """How many statuses in front are OK."""
    return next((i for i, status in enumerate(found) if status != OK), len(found))


@dataclass(eq=False)
class Object:
    """What the model knows of one object."""

    data: bytes
    owner: int
    block: int
    temporary: bool
    ready: bool = False
    reserved: list[int] = field(default_factory=lambda: [0, 0, 0])
    held: list[int] = field(default_factory=lambda: [0, 0, 0])

    @property
    def blocks(self) -> range:
        return range(self.block, self.block - -len(self.data) // BLOCK)

    @property
    def shares(self) -> int:
        return sum(self.reserved) + sum(self.held)

    @property
    def stays(self) -> bool:
        """Whether no eviction may take it."""
        return not self.ready or self.shares > 0


@dataclass
class Reading:
    """A read batch that is not released, and its objects."""

    member: int
    batch: ReadBatch
    objects: list[tuple[bytes, Object]]
    looked_at: bool


@dataclass
class Writing:
    """A write batch that is not finished, and what it reserved: an object or another status a key."""

    member: int
    batch: WriteBatch
    outcomes: list[tuple[bytes, Object | Status]]


class Arena(RuleBasedStateMachine):
    """A controller and two ranks of one group in one process."""

    config: ArenaConfig
    together = 4  #: keys that one reserve_write takes

    def __init__(self) -> None:
        super().__init__()
        self.name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.objects: dict[bytes, Object] = {}
        self.reads: list[Reading] = []
        self.writes: list[Writing] = []
        self.caches: list[Cache | None] = []
        self.serial = 0

    @initialize(wanted=st.lists(st.tuples(MEMBERS, SIZES, st.booleans(), st.none() | EXTRA), max_size=6))
    def attach(self, wanted: list[tuple[int, int, bool, int | None]]) -> None:
        shmcache.create(self.name, self.config)
        self.caches = [self.join(member) for member in (0, 1, CONTROLLER)]
        for number, (member, nbytes, temporary, grant) in enumerate(wanted):
            self.reserve_write(member, [number], nbytes, temporary)
            self.publish_batch(0, grant)

    def join(self, member: int) -> Cache:
        rank = None if member == CONTROLLER else member
        return shmcache.attach(self.name, group="engine", rank=rank, world_size=2)

    def member(self, wanted: int) -> tuple[int, Cache]:
        """This one, or the controller where it has left."""
        cache = self.caches[wanted]
        if cache is None:
            wanted, cache = CONTROLLER, self.caches[CONTROLLER]
        assert cache is not None
        return wanted, cache

    def key(self, number: int) -> bytes:
        """One key of all, or more often one that the arena has."""
        there = list(self.objects)
        return there[number % len(there)] if there and number > len(KEYS) else KEYS[number % len(KEYS)]

    def keys(self, numbers: list[int]) -> list[bytes]:
        return [self.key(number) for number in numbers]

    @property
    def controller(self) -> Cache:
        return self.member(CONTROLLER)[1]

    # Writing

    @rule(member=MEMBERS, numbers=BATCHES, nbytes=SIZES, temporary=st.booleans())
    def reserve_write(self, member: int, numbers: list[int], nbytes: int, temporary: bool) -> None:
        member, cache = self.member(member)
        keys = [KEYS[number % len(KEYS)] for number in numbers[: self.together]]
        expected = self.foretell_reserve(keys, nbytes)
        evictions = self.evictions()
        batch = cache.reserve_write(keys, nbytes, temporary=temporary)
        assert batch.status == expected
        self.forget_evicted(evictions, allowed=OK in expected)
        outcomes = [self.reserved(batch, i, member, nbytes, temporary) for i in range(len(keys))]
        self.writes.append(Writing(member, batch, list(zip(keys, outcomes, strict=True))))

    def foretell_reserve(self, keys: list[bytes], nbytes: int) -> list[Status]:
        expected, reserved = [], set()
        for key in keys:
            known = self.objects.get(key)
            if key in reserved or (known and not known.ready):
                expected.append(IN_FLIGHT)
            elif known:
                expected.append(EXISTS)
            elif not self.has_room(-(-nbytes // BLOCK)):
                expected.append(NO_SPACE)
            else:
                expected.append(OK)
                reserved.add(key)
        return expected

    def has_room(self, blocks: int) -> bool:
        """Whether a run of blocks and a slot are free or can be freed."""
        staying = [known for known in self.objects.values() if known.stays]
        taken = {block for known in staying for block in known.blocks}
        total = self.config.capacity // BLOCK
        runs = (range(first, first + blocks) for first in range(total - blocks + 1))
        return len(staying) < self.config.slots and any(taken.isdisjoint(run) for run in runs)

    def reserved(self, batch: WriteBatch, i: int, member: int, nbytes: int, temporary: bool) -> Object | Status:
        if batch.status[i] != OK:
            return batch.status[i]
        self.serial += 1
        data = pattern(b"%d" % self.serial, nbytes)
        view = batch.views[i]
        assert view is not None
        view[:] = data
        known = Object(data, member, batch._refs[i].offset // BLOCK, temporary)
        assert not {block for other in self.objects.values() for block in other.blocks} & {*known.blocks}
        self.objects[batch.keys[i]] = known
        return known

    @precondition(lambda self: self.writes)
    @rule(which=ANY, grant=st.none() | EXTRA)
    def publish_batch(self, which: int, grant: int | None) -> None:
        writing = self.writes.pop(which % len(self.writes))
        expected = [self.finished(key, outcome) for key, outcome in writing.outcomes]
        if grant is None:
            assert writing.batch.publish() == expected
        else:
            assert writing.batch.publish_and_reserve_read(grant) == expected
        for (_, outcome), status in zip(writing.outcomes, expected, strict=True):
            if isinstance(outcome, Object) and status == OK:
                self.publish(outcome, grant)

    @precondition(lambda self: self.writes)
    @rule(which=ANY)
    def abort_batch(self, which: int) -> None:
        writing = self.writes.pop(which % len(self.writes))
        self.abort(writing)

    def abort(self, writing: Writing) -> None:
        expected = [self.finished(key, outcome) for key, outcome in writing.outcomes]
        assert writing.batch.abort() == expected
        for (key, outcome), status in zip(writing.outcomes, expected, strict=True):
            if isinstance(outcome, Object) and status == OK:
                del self.objects[key]

    def finished(self, key: bytes, outcome: Object | Status) -> Status:
        """What finishing a batch says of one of its keys."""
        if isinstance(outcome, Status):
            return outcome
        if self.objects.get(key) is not outcome:
            return NOT_FOUND
        return EXISTS if outcome.ready else OK

    def publish(self, known: Object, grant: int | None) -> None:
        known.ready = True
        if grant is not None:
            self.grant(known, grant)

    def grant(self, known: Object, extra_count: int) -> None:
        for rank in range(extra_count + 1):
            known.reserved[rank] += 1

    def own(self, member: int, key: bytes) -> Status:
        """What finish_write and abort_write say."""
        known = self.objects.get(key)
        if known is None:
            return NOT_FOUND
        if known.ready:
            return EXISTS
        return OK if known.owner == member else NOT_OWNER

    @rule(member=MEMBERS, numbers=BATCHES, grant=st.none() | EXTRA)
    def finish_write(self, member: int, numbers: list[int], grant: int | None) -> None:
        keys = self.keys(numbers)
        member, cache = self.member(member)
        expected = []
        for key in keys:
            expected.append(self.own(member, key))
            if expected[-1] == OK:
                self.publish(self.objects[key], grant)
        if grant is None:
            assert cache.finish_write(keys) == expected
        else:
            assert cache.finish_write_and_reserve_read(keys, grant) == expected

    @rule(member=MEMBERS, numbers=BATCHES)
    def abort_write(self, member: int, numbers: list[int]) -> None:
        keys = self.keys(numbers)
        member, cache = self.member(member)
        expected = []
        for key in keys:
            expected.append(self.own(member, key))
            if expected[-1] == OK:
                del self.objects[key]
        assert cache.abort_write(keys) == expected

    @rule(member=MEMBERS, key=st.sampled_from(KEYS), nbytes=SIZES)
    def put(self, member: int, key: bytes, nbytes: int) -> None:
        member, cache = self.member(member)
        expected = self.foretell_reserve([key], nbytes)[0]
        self.serial += 1
        data = pattern(b"%d" % self.serial, nbytes)
        evictions = self.evictions()
        assert cache.put(key, data) == expected
        self.forget_evicted(evictions, allowed=expected == OK)
        if expected == OK:
            with cache.read([key]) as batch:
                block = batch._refs[0].offset // BLOCK
            self.objects[key] = Object(data, member, block, temporary=False, ready=True)

    # Reading

    @rule(member=MEMBERS, numbers=BATCHES)
    def look(self, member: int, numbers: list[int]) -> None:
        keys = self.keys(numbers)
        _, cache = self.member(member)
        expected = [self.seen(key) for key in keys]
        assert cache.status(keys) == expected
        assert cache.touch(keys) == expected
        assert cache.lookup(keys) == leading(expected)

    def seen(self, key: bytes) -> Status:
        known = self.objects.get(key)
        if known is None:
            return NOT_FOUND
        return OK if known.ready else IN_FLIGHT

    @rule(member=MEMBERS, numbers=BATCHES, extra_count=EXTRA)
    def reserve_read(self, member: int, numbers: list[int], extra_count: int) -> None:
        keys = self.keys(numbers)
        _, cache = self.member(member)
        expected = [self.seen(key) for key in keys]
        assert cache.reserve_read(keys, extra_count) == expected
        for key, status in zip(keys, expected, strict=True):
            if status == OK:
                self.grant(self.objects[key], extra_count)

    @rule(member=MEMBERS, numbers=BATCHES, prefix=st.booleans(), looked_at=st.booleans())
    def read(self, member: int, numbers: list[int], prefix: bool, looked_at: bool) -> None:
        keys = self.keys(numbers)
        member, cache = self.member(member)
        expected = [self.seen(key) for key in keys]
        if prefix:
            behind = leading(expected) + 1
            expected[behind:] = [NOT_FOUND] * len(expected[behind:])
        batch = cache.read(keys, prefix=prefix)
        assert batch.status == expected
        found = [(key, self.objects[key]) for key, status in zip(keys, expected, strict=True) if status == OK]
        for _, known in found:
            known.reserved[member] -= known.reserved[member] > 0
            known.held[member] += 1
        self.reads.append(Reading(member, batch, found, looked_at))

    @precondition(lambda self: self.reads)
    @rule(which=ANY)
    def release(self, which: int) -> None:
        self.release_reading(self.reads.pop(which % len(self.reads)))

    def release_reading(self, reading: Reading) -> None:
        reading.batch.release()
        for key, known in reading.objects:
            known.held[reading.member] -= 1
            self.drop_temporary(key, known)

    def drop_temporary(self, key: bytes, known: Object) -> None:
        """A temporary object goes with its last share."""
        if known.temporary and known.shares == 0 and self.objects.get(key) is known:
            del self.objects[key]

    @rule(member=MEMBERS, numbers=BATCHES)
    def finish_read(self, member: int, numbers: list[int]) -> None:
        keys = self.keys(numbers)
        member, cache = self.member(member)
        expected = [self.take_back(key, [member]) for key in keys]
        assert cache.finish_read(keys) == expected

    @rule(numbers=BATCHES, extra_count=EXTRA)
    def cancel_read(self, numbers: list[int], extra_count: int) -> None:
        keys = self.keys(numbers)
        expected = [self.take_back(key, list(range(extra_count + 1))) for key in keys]
        assert self.controller.cancel_read(keys, extra_count) == expected

    def take_back(self, key: bytes, members: list[int]) -> Status:
        known = self.objects.get(key)
        if known is None:
            return NOT_FOUND
        having = [member for member in members if known.reserved[member]]
        for member in having:
            known.reserved[member] -= 1
        if having:
            self.drop_temporary(key, known)
        return OK if having else NO_SHARE

    # Removing

    @rule(member=MEMBERS, numbers=BATCHES, force=st.booleans())
    def delete(self, member: int, numbers: list[int], force: bool) -> None:
        keys = self.keys(numbers)
        _, cache = self.member(member)
        assert cache.delete(keys, force=force) == [self.delete_one(key, force) for key in keys]

    def delete_one(self, key: bytes, force: bool) -> Status:
        known = self.objects.get(key)
        if known is None:
            return NOT_FOUND
        if not known.ready or any(known.held) or (known.shares > 0 and not force):
            return LOCKED
        del self.objects[key]
        return OK

    @precondition(lambda self: len(self.objects) > 4)
    @rule(evict=st.booleans())
    def remove_all(self, evict: bool) -> None:
        gone = [known for known in self.objects.values() if not known.stays]
        self.objects = {key: known for key, known in self.objects.items() if known.stays}
        if evict:
            assert self.controller.evict(ALL_SPACE) == BLOCK * sum(len(known.blocks) for known in gone)
        else:
            assert self.controller.clear() == len(gone)

    @precondition(lambda self: len(self.objects) > 4)
    @rule(blocks=st.integers(1, 4))
    def evict_some(self, blocks: int) -> None:
        can_go = sum(len(known.blocks) for known in self.objects.values() if not known.stays)
        before = self.controller.stats().used_bytes
        evictions = self.evictions()
        freed = self.controller.evict(blocks * BLOCK)
        assert freed >= min(blocks, can_go) * BLOCK
        assert self.controller.stats().used_bytes == before - freed
        self.forget_evicted(evictions, allowed=True)

    # Coming and going

    @rule(rank=st.integers(0, 1))
    def close_or_join(self, rank: int) -> None:
        cache = self.caches[rank]
        if cache is None:
            self.caches[rank] = self.join(rank)
            return
        self.end_batches(rank, cache)
        cache.close()
        self.caches[rank] = None
        for key, known in list(self.objects.items()):
            had = known.reserved[rank] + known.held[rank]
            known.reserved[rank] = known.held[rank] = 0
            if had:
                self.drop_temporary(key, known)

    def end_batches(self, rank: int, cache: Cache) -> None:
        """Close refuses while views live, and does nothing; the shares of other batches go with it."""
        viewed = [reading for reading in self.reads if reading.member == rank and reading.looked_at and reading.objects]
        written = [writing for writing in self.writes if writing.member == rank]
        if viewed or any(OK in writing.batch.status for writing in written):
            try:
                cache.close()
            except ViewInUseError:
                pass
            else:
                raise AssertionError("closed while views live")
        for reading in viewed:
            self.release_reading(reading)
        for writing in written:
            self.abort(writing)
        self.reads = [reading for reading in self.reads if reading.member != rank]
        self.writes = [writing for writing in self.writes if writing.member != rank]

    # What always holds

    def evictions(self) -> int:
        return self.controller.stats().counters.evictions

    def forget_evicted(self, before: int, allowed: bool) -> None:
        """Takes out of the model what is gone: only what nobody had a share of, and each counted."""
        keys = list(self.objects)
        statuses = self.controller.status(keys)
        gone = [key for key, status in zip(keys, statuses, strict=True) if status == NOT_FOUND]
        assert self.evictions() - before == len(gone)
        assert allowed or not gone
        for key in gone:
            assert not self.objects.pop(key).stays

    @invariant()
    def nothing_held_has_changed(self) -> None:
        for reading in self.reads:
            if reading.looked_at:
                seen = [view for view in reading.batch.views if view is not None]
                assert seen == [known.data for _, known in reading.objects]

    @invariant()
    def the_shares_are_those_of_the_model(self) -> None:
        if not self.caches:
            return
        rows: dict[int, tuple[int, int]] = {}
        for lane in shmcache.inspect(self.name).lanes:
            if lane.role != "free":
                rows[CONTROLLER if lane.rank is None else lane.rank] = (lane.reserved, lane.held)
        for member in range(3):
            expected = (
                sum(known.reserved[member] for known in self.objects.values()),
                sum(known.held[member] for known in self.objects.values()),
            )
            assert rows[member] == expected

    @invariant()
    def the_arena_is_sound(self) -> None:
        if not self.caches:
            return
        assert self.controller.verify() == []
        stats = self.controller.stats()
        ready = sum(known.ready for known in self.objects.values())
        assert (stats.objects, stats.writing) == (ready, len(self.objects) - ready)
        assert stats.used_bytes == BLOCK * sum(len(known.blocks) for known in self.objects.values())

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            shmcache.destroy(self.name, force=True)

    def end(self) -> None:
        for reading in self.reads:
            self.release_reading(reading)
        for writing in self.writes:
            self.abort(writing)
        for cache in self.caches:
            if cache is not None:
                cache.close()


class RoomyArena(Arena):
    """Nothing is ever evicted to make room."""

    config = ArenaConfig("1MiB", block_size=BLOCK, slots=64, lanes=4)


class TinyArena(Arena):
    """Room is scarce, and so are slots: every few steps something is evicted or refused, and slots change hands."""

    config = ArenaConfig(8 * BLOCK, block_size=BLOCK, slots=6, lanes=4)
    together = 1


def _tested(machine: type[Arena]) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return case


TestRoomyArena = _tested(RoomyArena)
TestTinyArena = _tested(TinyArena)
