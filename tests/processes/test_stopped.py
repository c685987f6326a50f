"""A process is stopped, not dead: nothing is taken from it but what time alone may take (reserved shares, the key of a
write), who waits for it too long is told which process it is, and the others go on reading."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from arena_support import pattern
from processes._crew import Member, wait_until
from processes._segment import Segment
from processes._whole import check_whole

import shmcache
from shmcache import ArenaBusyError, ArenaConfig, Cache, ReapReport, Status

OK, NOT_FOUND, IN_FLIGHT, LOCKED = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.LOCKED
Enlist = Callable[..., Member]

LEASE_S = 0.2


@pytest.fixture
def config() -> ArenaConfig:
    return ArenaConfig(
        "1MiB", block_size="4KiB", lanes=8, read_lease_s=LEASE_S, write_lease_s=LEASE_S, lock_timeout_s=0.3
    )


@pytest.fixture
def segment(arena: str) -> Segment:
    """The arena's bytes."""
    return Segment(arena)


# A lock holder


@pytest.fixture
def holder(arena: str, cache: Cache, enlist: Enlist) -> Member:
    """Stopped while it holds the arena lock, a share of a, and an object half-written."""
    assert [cache.put(key, pattern(key, 5000)) for key in (b"a", b"b", b"c")] == [OK] * 3
    member = enlist()
    member.do("batch = cache.read([b'a'])")
    member.do("unfinished = cache.reserve_write([b'w'], 9000)")
    member.do(f"segment = Segment({arena!r}); segment.take_lock(cache.lane)")
    member.stop()
    return member


def _resume(holder: Member) -> None:
    holder.resume()
    holder.do("segment.give_lock()")
    assert holder.do("unfinished.publish()") == [OK]
    assert holder.do("bytes(batch.views[0]) == pattern(b'a', 5000)")
    assert holder.do("batch.release()") is None


CHANGES: dict[str, Callable[[Cache], object]] = {
    "put": lambda cache: cache.put(b"x", b"x"),
    "reserve": lambda cache: cache.reserve_write([b"x", b"y"], 1),
    "delete": lambda cache: cache.delete([b"b"]),
    "delete by force": lambda cache: cache.delete([b"b"], force=True),
    "evict": lambda cache: cache.evict(1),
    "clear": lambda cache: cache.clear(),
    "verify": lambda cache: cache.verify(),
    "attach": lambda cache: shmcache.attach(cache.name),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_name_the_holder(cache: Cache, holder: Member, segment: Segment, change: str) -> None:
    lock = segment.holder()
    with pytest.raises(ArenaBusyError) as caught:
        CHANGES[change](cache)
    message = str(caught.value)
    assert cache.name in message
    assert f"process {holder.pid} (stopped)" in message
    assert segment.holder() == lock is not None, "a living holder keeps the lock"
    _resume(holder)
    assert cache.lookup([b"a", b"b", b"c"]) == 3, "the change was not made"
    assert cache.status([b"x"]) == [NOT_FOUND]
    assert cache.stats().counters.lock_steals == 0
    holder.kill()
    check_whole(cache)


def test_reading_goes_on(cache: Cache, holder: Member) -> None:
    with cache.read([b"a", b"b", b"c"]) as batch:
        assert batch.status == [OK] * 3
        assert bytes(batch.views[1] or b"") == pattern(b"b", 5000)
    assert cache.lookup([b"a", b"b", b"c"]) == 3
    assert cache.status([b"a", b"w", b"none"]) == [OK, IN_FLIGHT, NOT_FOUND]
    assert cache.reserve_read([b"a"]) == [OK]
    assert cache.finish_read([b"a"]) == [OK]
    assert cache.touch([b"a"]) == [OK]
    assert cache.read([b"w"], wait_s=0.1).status == [IN_FLIGHT]
    assert cache.reap() == ReapReport()
    assert cache.stats().lanes_alive == 2
    _resume(holder)
    holder.kill()
    check_whole(cache)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=8, lock_timeout_s=20.0)])
def test_a_reader_that_waits_does_not_wait_for_the_holder(arena: str, cache: Cache, enlist: Enlist) -> None:
    """There is a dead lane, which it would like to reap, but cannot."""
    dead, holder, writer = enlist(), enlist(), enlist()
    writer.do("batch = cache.reserve_write([b'w'], 100)")
    holder.do(f"segment = Segment({arena!r}); segment.take_lock(cache.lane)")
    holder.stop()
    dead.kill()
    begun = time.monotonic()
    assert cache.read([b"w"], wait_s=0.2).status == [IN_FLIGHT]
    assert time.monotonic() - begun < 10
    holder.resume()
    holder.do("segment.give_lock()")
    for member in (holder, writer):
        member.kill()
    check_whole(cache)


def test_publishing_goes_on(arena: str, enlist: Enlist, cache: Cache) -> None:
    batch = cache.reserve_write([b"mine"], 100)
    holder = enlist()
    holder.do(f"segment = Segment({arena!r}); segment.take_lock(cache.lane)")
    holder.stop()
    assert batch.publish_and_reserve_read() == [OK]
    assert cache.read([b"mine"]).hits == 1
    holder.resume()
    holder.do("segment.give_lock()")
    assert holder.do("cache.put(b'theirs', b'x')") == OK
    holder.kill()
    check_whole(cache)


def test_a_process_leaves_while_the_holder_is_stopped(arena: str, cache: Cache, holder: Member) -> None:
    """It cannot give back what it has; who comes after it does."""
    batch = cache.read([b"b"])
    assert batch.hits == 1
    cache.close()
    _resume(holder)
    assert holder.do("cache.stats().lanes_dead") == 1
    assert holder.do("cache.reap().shares") == 1
    assert holder.do("cache.delete([b'b'])") == [OK]
    holder.kill()
    with shmcache.attach(arena) as later:
        check_whole(later)


def test_a_stopped_holder_is_killed(cache: Cache, holder: Member) -> None:
    with pytest.raises(ArenaBusyError):
        cache.put(b"x", b"x")
    holder.kill()
    assert cache.put(b"x", b"x") == OK
    assert cache.stats().counters.lock_steals == 1
    check_whole(cache)


def test_stopped_at_any_moment(cache: Cache, enlist: Enlist, chance: random.Random) -> None:
    assert cache.put(b"kept", pattern(b"kept", 5000)) == OK
    worker = enlist()
    worker.do("keys = [b'k%d' % i for i in range(64)]")
    worker.begin("while not cache.lookup([b'enough']): cache.reserve_write(keys, 9000).publish(); cache.delete(keys)")
    told: list[str] = []
    for i in range(400):
        time.sleep(chance.uniform(0, 0.003))
        worker.stop()
        with cache.read([b"kept"]) as batch:
            assert bytes(batch.views[0] or b"") == pattern(b"kept", 5000)
        try:
            assert cache.put(b"%d" % i, b"x") == OK
            assert cache.verify() == []
        except ArenaBusyError as error:
            told.append(str(error))
        worker.resume()
        if len(told) == 3:
            break
    assert told, "it was never stopped with the lock"
    assert all(f"process {worker.pid} (stopped)" in message for message in told)
    assert cache.put(b"enough", b"x") == OK
    worker.answer()
    assert cache.stats().counters.lock_steals == 0
    worker.kill()
    check_whole(cache)


# A reader


def test_a_stopped_reader_keeps_its_shares(cache: Cache, enlist: Enlist) -> None:
    assert cache.put(b"a", pattern(b"a", 5000)) == OK
    reader = enlist()
    reader.do("batch = cache.read([b'a'])")
    reader.stop()
    time.sleep(2 * LEASE_S)
    assert cache.delete([b"a"]) == [LOCKED]
    assert cache.delete([b"a"], force=True) == [LOCKED]
    assert cache.evict(1 << 20) == 0
    assert cache.clear() == 0
    assert cache.reap() == ReapReport()
    assert cache.put(b"all", b"x" * (1 << 20)) == Status.NO_SPACE
    reader.resume()
    assert reader.do("bytes(batch.views[0]) == pattern(b'a', 5000)")
    assert reader.do("batch.release()") is None
    assert cache.delete([b"a"]) == [OK]
    reader.kill()
    check_whole(cache)


def test_a_reserved_share_of_a_stopped_reader_ends_with_its_lease(cache: Cache, enlist: Enlist) -> None:
    assert cache.put(b"a", pattern(b"a", 5000)) == OK
    reader = enlist()
    assert reader.do("cache.reserve_read([b'a'])") == [OK]
    reader.stop()
    wait_until(lambda: cache.delete([b"a"]) == [OK])
    assert cache.put(b"a", b"another") == OK
    reader.resume()
    assert reader.do("cache.finish_read([b'a'])") == [Status.NO_SHARE]
    reader.do("batch = cache.read([b'a'])")
    assert reader.do("bytes(batch.views[0])") == b"another"
    reader.kill()
    check_whole(cache)


def test_a_granter_that_was_stopped_does_not_shorten_a_lease(cache: Cache, segment: Segment) -> None:
    """As if it had read the clock before it was stopped, and another one had granted since."""
    assert cache.put(b"a", pattern(b"a", 5000)) == OK
    assert cache.reserve_read([b"a"]) == [OK]
    segment.set_leases((time.monotonic_ns() + 60_000_000_000) // 1000)
    assert cache.reserve_read([b"a"]) == [OK]
    time.sleep(2 * LEASE_S)
    assert cache.evict(1 << 20) == 0
    assert cache.delete([b"a"]) == [LOCKED]
    assert cache.finish_read([b"a"] * 2) == [OK] * 2
    check_whole(cache)


# A writer


def test_a_stopped_writer_loses_its_key_and_keeps_its_memory(cache: Cache, enlist: Enlist) -> None:
    writer = enlist()
    writer.do("batch = cache.reserve_write([b'w'], 5000)")
    writer.stop()
    assert cache.put(b"w", b"early") == IN_FLIGHT
    wait_until(lambda: cache.put(b"w", pattern(b"w", 5000)) == OK)
    assert cache.evict(1 << 20) > 0
    assert cache.stats().writing == 1
    assert cache.put(b"all", b"x" * (1 << 20)) == Status.NO_SPACE
    assert cache.put(b"w", pattern(b"w", 5000)) == OK
    writer.resume()
    writer.do("batch.views[0][:] = b'x' * 5000")
    assert writer.do("batch.publish()") == [Status.NOT_OWNER]
    with cache.read([b"w"]) as batch:
        assert bytes(batch.views[0] or b"") == pattern(b"w", 5000)
    assert cache.stats().writing == 0
    writer.kill()
    check_whole(cache)


def test_a_stopped_process_is_told(arena: str, cache: Cache, enlist: Enlist) -> None:
    member = enlist("engine", 0, 1)
    lane = int(member.do("cache.lane"))
    cache.put(b"k", b"x")
    member.do("batch = cache.read([b'k'])")
    member.stop()
    found = shmcache.inspect(arena).lanes
    assert (found[lane].state, found[lane].stopped, found[lane].held) == ("alive", True, 1)
    assert not found[cache.lane].stopped
    member.resume()
    assert not shmcache.inspect(arena).lanes[lane].stopped
    member.kill()
    info = shmcache.inspect(arena, objects=True)
    assert (info.lanes[lane].state, info.lanes[lane].stopped) == ("dead", False)
    assert info.objects is not None
    assert [found.standing for found in info.objects] == ["dead"]
    cache.reap()
    info = shmcache.inspect(arena, objects=True)
    assert info.objects is not None
    assert [found.standing for found in info.objects] == ["ready"]
