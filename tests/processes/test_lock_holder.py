"""A process dies holding the arena lock, and whoever needs the lock next takes it and repairs what was half changed.

Most deaths here are made to measure: a process writes the lock word in its own name and changes what is derived from
the slots, as the core may have done half-way, before it is killed. The last tests kill the core itself at random.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from arena_support import Join, pattern
from processes._crew import Member, wait_until
from processes._segment import DERIVED, EVICTING, READY, Segment
from processes._whole import check_whole

import shmcache
from shmcache import ArenaConfig, Cache, ReapReport, Status

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT
Enlist = Callable[..., Member]

KEYS = [b"key %d" % i for i in range(20)]


def _nbytes(key: bytes) -> int:
    return 1000 + 50 * pattern(key, 1)[0]


def _put(cache: Cache, *keys: bytes) -> None:
    assert [cache.put(key, pattern(key, _nbytes(key))) for key in keys] == [OK] * len(keys)


def _check_readable(cache: Cache, *keys: bytes) -> None:
    with cache.read(keys) as batch:
        assert batch.status == [OK] * len(keys)
        assert [bytes(view) for view in batch.views if view is not None] == [pattern(key, _nbytes(key)) for key in keys]


@pytest.fixture
def segment(arena: str) -> Segment:
    """The arena's bytes."""
    return Segment(arena)


@pytest.fixture
def holder(arena: str, enlist: Enlist) -> Member:
    """Holds the arena lock, a share of the first key, and an object half-written."""
    member = enlist()
    member.do("batch = cache.read([b'key 0'])")
    member.do("unfinished = cache.reserve_write([b'w'], 9000)")
    member.do(f"segment = Segment({arena!r}); segment.take_lock(cache.lane)")
    return member


@pytest.fixture
def waiters(enlist: Enlist) -> list[Member]:
    """Processes that attached before anybody held the lock."""
    return [enlist() for _ in range(6)]


@pytest.fixture
def filled(cache: Cache) -> Cache:
    """The test's own cache, after it has put all keys, deleted every fourth, and put the first of these again."""
    _put(cache, *KEYS)
    assert cache.delete(KEYS[::4]) == [OK] * 5
    _put(cache, KEYS[0])
    return cache


THERE = [key for key in KEYS if key not in KEYS[4::4]]


def _put_new(cache: Cache) -> None:
    _put(cache, b"new")


def _delete_one(cache: Cache) -> None:
    assert cache.delete([KEYS[1]]) == [OK]
    _put(cache, KEYS[1])


def _abort_one(cache: Cache) -> None:
    assert cache.reserve_write([b"new"], 5000).abort() == [OK]


def _evict_none(cache: Cache) -> None:
    assert cache.evict(1) > 0
    _put(cache, *(key for key in THERE if cache.status([key]) == [NOT_FOUND]))


def _verify(cache: Cache) -> None:
    assert cache.verify() == []


def _reap(cache: Cache) -> None:
    assert cache.reap() == ReapReport(lanes=1, shares=1, writes=1, lock=True)


NEEDS = [_put_new, _delete_one, _abort_one, _evict_none, _verify, _reap]


@pytest.mark.parametrize("need", NEEDS)
def test_whoever_needs_the_lock_takes_it(
    filled: Cache, segment: Segment, holder: Member, need: Callable[[Cache], None]
) -> None:
    holder.kill()
    assert segment.holder() is not None, "it was killed with the lock"
    _check_readable(filled, *THERE)
    need(filled)
    assert segment.holder() is None
    counters = filled.stats().counters
    assert (counters.lock_steals, counters.rebuilds) == (1, 1)
    _check_readable(filled, *THERE)
    assert filled.status([*KEYS[4::4], b"w"]) == [NOT_FOUND] * 5
    check_whole(filled)


@pytest.mark.parametrize("content", [b"\0", b"\xff", b"\x01\0\0\0\0\0\0\0", b"rubbish"])
@pytest.mark.parametrize("part", DERIVED)
def test_what_is_derived_is_rebuilt(filled: Cache, segment: Segment, holder: Member, part: str, content: bytes) -> None:
    segment.overwrite(part, content)
    holder.kill()
    _reap(filled)
    assert filled.verify() == []
    _check_readable(filled, *THERE)
    assert filled.status([*KEYS[4::4], b"w"]) == [NOT_FOUND] * 5
    check_whole(filled)


def test_all_that_is_derived_at_random(
    filled: Cache, segment: Segment, enlist: Enlist, arena: str, chance: random.Random
) -> None:
    for _ in range(10):
        member = enlist()
        member.do(f"Segment({arena!r}).take_lock(cache.lane)")
        for part in chance.sample(DERIVED, chance.randint(1, len(DERIVED))):
            segment.overwrite(part, chance.randbytes(997))
        if chance.random() < 0.5:
            segment.begin_rebuild()
        member.kill()
        _put(filled, b"new")
        assert filled.verify() == []
        _check_readable(filled, *THERE)
        assert filled.delete([b"new"]) == [OK]
    assert filled.stats().counters.rebuilds == 10
    check_whole(filled)


def test_reading_while_the_index_is_half_rebuilt(filled: Cache, segment: Segment, holder: Member) -> None:
    segment.begin_rebuild()
    _check_readable(filled, *THERE)
    assert filled.lookup(THERE) == len(THERE)
    assert filled.status([*KEYS[4::4], b"w"]) == [NOT_FOUND] * 4 + [IN_FLIGHT]
    holder.kill()
    _check_readable(filled, *THERE)
    assert filled.verify() == []
    check_whole(filled)


def test_an_eviction_half_done_is_called_off(filled: Cache, segment: Segment, holder: Member) -> None:
    assert segment.change_states(READY, EVICTING) == len(THERE)
    holder.kill()
    assert filled.lookup(THERE) == len(THERE)
    _check_readable(filled, *THERE[:8])
    assert segment.change_states(EVICTING, EVICTING) == len(THERE) - 8, "who reads an object calls it off himself"
    _reap(filled)
    assert segment.change_states(EVICTING, EVICTING) == 0
    _check_readable(filled, *THERE)
    check_whole(filled)


def test_a_slot_half_filled_stays_free(filled: Cache, segment: Segment, holder: Member) -> None:
    """Its fields name memory that others have, and memory that nobody can have."""
    for content in (b"\0" * 120, b"\xff" * 120, b"\x01\0\0\0" * 30):
        segment.overwrite_free_slots(content)
    holder.kill()
    _reap(filled)
    _check_readable(filled, *THERE)
    check_whole(filled)


def test_of_several_that_want_the_lock_one_steals_it(
    filled: Cache, segment: Segment, waiters: list[Member], holder: Member
) -> None:
    for i, member in enumerate(waiters):
        member.begin(f"cache.put(b'new {i}', b'x')")
    wait_until(segment.has_waiters)
    time.sleep(0.05)
    assert all(member.busy for member in waiters), "a live holder keeps the lock"
    holder.kill()
    assert [member.answer() for member in waiters] == [OK] * 6
    counters = filled.stats().counters
    assert (counters.lock_steals, counters.rebuilds) == (1, 1)
    for member in waiters:
        member.kill()
    check_whole(filled)


def test_lock_waiters_are_killed(filled: Cache, segment: Segment, waiters: list[Member], holder: Member) -> None:
    for waiter in waiters:
        waiter.begin("cache.put(b'never', b'x')")
    wait_until(segment.has_waiters)
    for waiter in waiters:
        assert waiter.busy
        waiter.kill()
    holder.do("segment.give_lock()")
    _put(filled, b"new")
    assert segment.holder() is None
    assert filled.status([b"never"]) == [NOT_FOUND]
    assert filled.stats().counters.lock_steals == 0
    holder.kill()
    check_whole(filled)


def test_a_successor_in_the_holders_lane(join: Join, enlist: Enlist, arena: str, segment: Segment) -> None:
    cache, first = join(), enlist("engine", 0, 1)
    lane = first.do("cache.lane")
    first.do(f"Segment({arena!r}).take_lock(cache.lane)")
    first.kill()
    second = join("engine", 0, 1)
    assert (second.lane, segment.holder()) == (lane, None)
    assert cache.stats().counters.lock_steals == 1
    second.close()
    check_whole(cache)


def test_a_live_successor_is_not_the_holder(cache: Cache, enlist: Enlist, arena: str, segment: Segment) -> None:
    """The lock word names a lane that lives, but an incarnation that does not."""
    enlist("engine", 0, 1).kill()
    second = enlist("engine", 0, 1)
    lane = second.do("cache.lane")
    assert segment.incarnation(lane) == 2
    second.do(f"Segment({arena!r}).take_lock({lane}, incarnation=1)")
    assert cache.put(b"a", b"x") == OK
    assert cache.stats().counters.lock_steals == 1
    assert second.do("cache.put(b'b', b'x')") == OK
    second.kill()
    check_whole(cache)


# The core itself


@pytest.fixture(params=["put", "evict", "delete", "reserve"])
def churn(request: pytest.FixtureRequest) -> str:
    """Orders that hold the lock most of the time."""
    return {
        "put": "while True: cache.put(b'%d' % next(numbers), b'x')",
        "evict": "while True: cache.reserve_write(next(batches), 5000).publish(); cache.evict(1 << 30)",
        "delete": "while True: cache.reserve_write(keys, 5000).publish(); cache.delete(keys)",
        "reserve": "while True: cache.reserve_write(next(batches), 5000).publish()",
    }[str(request.param)]


SETUP = """
import itertools
numbers = itertools.count()
keys = [b'k%d' % i for i in range(100)]
batches = ([b'%d %d' % (n, i) for i in range(100)] for n in itertools.count())
"""
THEFTS = 3
MOST_ROUNDS = 500


def test_killed_until_some_held_the_lock(cache: Cache, enlist: Enlist, churn: str, chance: random.Random) -> None:
    kept = [b"kept %d" % i for i in range(10)]
    _put(cache, *kept)
    assert cache.reserve_read(kept) == [OK] * 10
    for _ in range(MOST_ROUNDS):
        member = enlist()
        member.do(SETUP)
        member.begin(churn)
        time.sleep(chance.uniform(0, 0.01))
        member.kill()
        assert cache.verify() == []
        _check_readable(cache, *kept)
        assert cache.reserve_read(kept) == [OK] * 10
        if cache.stats().counters.lock_steals >= THEFTS:
            break
    else:
        pytest.fail(f"fewer than {THEFTS} of {MOST_ROUNDS} were killed with the lock")
    assert cache.finish_read(kept) == [OK] * 10
    check_whole(cache)


@pytest.fixture
def large(arena_name: str) -> Iterator[Cache]:
    """A cache of an arena that takes some milliseconds to rebuild."""
    config = ArenaConfig("128MiB", block_size="4KiB", lanes=8)
    with shmcache.attach(arena_name, create=config) as cache:
        yield cache


def test_killed_while_repairing(large: Cache, start: Callable[[], Member], chance: random.Random) -> None:
    keys = [b"%d" % i for i in range(20000)]
    assert large.reserve_write(keys, 1).publish() == [OK] * len(keys)
    for _ in range(MOST_ROUNDS):
        holder, thief = start(), start()
        for member in (holder, thief):
            member.attach(large.name)
        holder.do(f"Segment({large.name!r}).take_lock(cache.lane)")
        holder.kill()
        thief.begin("cache.evict(0), cache.put(b'new', b'x')")
        time.sleep(chance.uniform(0, 0.01))
        thief.kill()
        assert large.verify() == []
        assert large.lookup(keys) == len(keys)
        counters = large.stats().counters
        if counters.lock_steals - counters.rebuilds >= THEFTS:
            break
    else:
        pytest.fail(f"fewer than {THEFTS} of {MOST_ROUNDS} were killed while they repaired")
    check_whole(large)
