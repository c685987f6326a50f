"""A process is killed in each part that it can have, and the others go on: its shares are back, what it was writing
is gone, what it had published or granted stays, and all memory can be used again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from arena_support import TIMEOUT_S, Join, pattern
from processes._crew import Member, wait_until
from processes._whole import check_whole

import shmcache
from shmcache import ArenaConfig, Cache, ReapReport, Status

OK, NOT_FOUND, IN_FLIGHT, LOCKED = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.LOCKED
Enlist = Callable[..., Member]

NBYTES = 5000  #: two blocks


def _put(cache: Cache, *keys: bytes) -> None:
    assert [cache.put(key, pattern(key, NBYTES)) for key in keys] == [OK] * len(keys)


def _check_readable(cache: Cache, *keys: bytes) -> None:
    with cache.read(keys) as batch:
        assert batch.status == [OK] * len(keys)
        assert [bytes(view) for view in batch.views if view is not None] == [pattern(key, NBYTES) for key in keys]


# A reader


@pytest.fixture
def reader(cache: Cache, enlist: Enlist) -> Member:
    """Holds two shares of a and one of b, and has one of b reserved."""
    _put(cache, b"a", b"b")
    member = enlist()
    member.do("batches = cache.read([b'a', b'b']), cache.read([b'a'])")
    assert member.do("cache.reserve_read([b'b'])") == [OK]
    return member


def test_reader(cache: Cache, reader: Member) -> None:
    for force in (False, True):
        assert cache.delete([b"a", b"b"], force=force) == [LOCKED] * 2
    assert cache.evict(1 << 20) == 0
    reader.kill()
    assert cache.stats().held == 3
    assert cache.reap() == ReapReport(lanes=1, shares=4, writes=0, lock=False)
    _check_readable(cache, b"a", b"b")
    assert cache.delete([b"a", b"b"]) == [OK] * 2
    check_whole(cache)


def _evict_all(cache: Cache) -> bool:
    return cache.evict(1 << 20) == 4 * 4096


def _delete_all(cache: Cache) -> bool:
    return cache.delete([b"a", b"b"]) == [OK] * 2


def _clear_all(cache: Cache) -> bool:
    return cache.clear() == 2


def _fill_all(cache: Cache) -> bool:
    return cache.put(b"all", b"x" * (1 << 20)) == OK


@pytest.mark.parametrize("need", [_evict_all, _delete_all, _clear_all, _fill_all])
def test_shares_of_a_dead_reader_are_back_when_needed(
    cache: Cache, reader: Member, need: Callable[[Cache], bool]
) -> None:
    reader.kill()
    assert need(cache)
    check_whole(cache)


def test_reader_of_a_temporary_object(cache: Cache, enlist: Enlist) -> None:
    reader = enlist()
    cache.reserve_write([b"t"], NBYTES, temporary=True).publish_and_reserve_read()
    reader.do("batch = cache.read([b't'])")
    assert cache.finish_read([b"t"]) == [OK]
    assert cache.status([b"t"]) == [OK]
    reader.kill()
    cache.reap()
    assert cache.status([b"t"]) == [NOT_FOUND], "its last share is gone"
    check_whole(cache)


def test_readers_of_one_object_do_not_die_for_one_another(cache: Cache, enlist: Enlist) -> None:
    _put(cache, b"a")
    readers = [enlist() for _ in range(3)]
    for reader in readers:
        reader.do("batch = cache.read([b'a'])")
    for reader in readers:
        assert cache.delete([b"a"], force=True) == [LOCKED]
        reader.kill()
        assert cache.reap().shares == 1
    assert cache.delete([b"a"]) == [OK]
    check_whole(cache)


# A writer


@pytest.fixture
def writer(enlist: Enlist) -> Member:
    """Has published a, filled w, and reserved 63 more keys."""
    member = enlist()
    member.do(f"cache.put(b'a', pattern(b'a', {NBYTES}))")
    member.do(f"batch = cache.reserve_write([b'w'] + [b'w%d' % i for i in range(63)], {NBYTES})")
    member.do(f"batch.views[0][:] = pattern(b'w', {NBYTES})")
    return member


def test_writer(cache: Cache, writer: Member) -> None:
    assert cache.status([b"a", b"w", b"w62"]) == [OK, IN_FLIGHT, IN_FLIGHT]
    writer.kill()
    assert cache.lookup([b"w"]) == 0, "nothing but its writer publishes"
    assert cache.read([b"w", b"w0"]).hits == 0
    assert cache.reap() == ReapReport(lanes=1, shares=0, writes=64, lock=False)
    assert cache.status([b"a", b"w", b"w62"]) == [OK, NOT_FOUND, NOT_FOUND]
    _check_readable(cache, b"a")
    check_whole(cache)


def test_keys_of_a_dead_writer_can_be_written(cache: Cache, writer: Member) -> None:
    assert cache.put(b"w", b"mine") == IN_FLIGHT
    writer.kill()
    _put(cache, b"w")
    _check_readable(cache, b"a", b"w")
    check_whole(cache)


@pytest.mark.parametrize("config", [ArenaConfig("516KiB", block_size="4KiB", lanes=4)])
def test_memory_of_a_dead_writer_is_back_when_needed(cache: Cache, writer: Member) -> None:
    """Its 64 keys have 128 of the arena's 129 blocks."""
    writer.kill()
    assert cache.put(b"all", b"x" * cache.stats().capacity) == OK
    check_whole(cache)


def test_waiting_for_a_dead_writer(cache: Cache, writer: Member, enlist: Enlist) -> None:
    reader, prefix_reader = enlist(), enlist()
    reader.begin(f"cache.read([b'a', b'w', b'w0'], wait_s={TIMEOUT_S}).status")
    prefix_reader.begin(f"cache.read([b'a', b'w', b'w0'], prefix=True, wait_s={TIMEOUT_S}).status")
    time.sleep(0.1)
    assert reader.busy
    assert prefix_reader.busy
    killed = time.monotonic()
    writer.kill()
    for waiter in (reader, prefix_reader):
        assert waiter.answer() == [OK, NOT_FOUND, NOT_FOUND]
    assert time.monotonic() - killed < TIMEOUT_S / 2, "they sat the time out"
    reader.kill()
    prefix_reader.kill()
    check_whole(cache)


def test_waiter(cache: Cache, writer: Member, enlist: Enlist) -> None:
    waiter = enlist()
    waiter.begin(f"cache.read([b'a', b'w'], wait_s={TIMEOUT_S}).status")
    wait_until(lambda: cache.stats().held == 1)
    waiter.kill()
    assert cache.reap() == ReapReport(lanes=1, shares=1, writes=0, lock=False)
    assert writer.do("batch.publish()[0]") == OK
    _check_readable(cache, b"a", b"w")
    writer.kill()
    check_whole(cache)


# A controller


def test_controller_that_granted(join: Join, enlist: Enlist) -> None:
    controller, ranks = enlist("engine", None, 2), [join("engine", rank, 2) for rank in range(2)]
    controller.do(f"cache.put(b'a', pattern(b'a', {NBYTES}))")
    assert controller.do("cache.reserve_read([b'a'], 1)") == [OK]
    controller.do(f"batch = cache.reserve_write([b'b'], {NBYTES})")
    controller.do(f"batch.views[0][:] = pattern(b'b', {NBYTES})")
    assert controller.do("batch.publish_and_reserve_read(1)") == [OK]
    controller.kill()
    assert ranks[0].reap() == ReapReport(lanes=1, shares=0, writes=0, lock=False)
    assert ranks[0].delete([b"a", b"b"]) == [LOCKED] * 2, "what it granted belongs to the ranks"
    for rank in ranks:
        _check_readable(rank, b"a", b"b")
    assert ranks[0].stats().counters.claims == 4
    assert ranks[0].delete([b"a", b"b"]) == [OK] * 2
    check_whole(ranks[0])


def test_a_new_controller_takes_back_what_a_dead_one_granted(join: Join, enlist: Enlist) -> None:
    rank, controller = join("engine", 0, 1), enlist("engine", None, 1)
    _put(rank, b"a")
    assert controller.do("cache.reserve_read([b'a'])") == [OK]
    controller.kill()
    successor = join("engine", None, 1)
    assert successor.cancel_read([b"a"]) == [OK]
    assert successor.delete([b"a"]) == [OK]
    check_whole(successor)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=8, read_lease_s=0.2)])
def test_grants_to_ranks_that_never_come_end_with_their_lease(cache: Cache, enlist: Enlist) -> None:
    _put(cache, b"a")
    controller = enlist("engine", None, 3)
    assert controller.do("cache.reserve_read([b'a'], 2)") == [OK]
    controller.kill()
    wait_until(lambda: cache.evict(1 << 20) > 0)
    assert cache.stats().counters.leases_revoked == 3
    check_whole(cache)


# At any moment

CHURN = {
    "evict": "while True: cache.put(b'%d' % next(numbers), data); cache.evict(1 << 30)",
    "delete": "while True: cache.reserve_write(keys, 5000).publish(); cache.delete(keys)",
    "abort": "while True: cache.reserve_write(keys, 5000).abort()",
    "read": "while True: cache.reserve_read(keys); cache.read(keys).release()",
    "put": "while True: cache.put(b'%d' % next(numbers), data)",
    "put_and_hold": "held = [cache.read([key]) for key in keys if not cache.put(key, data)]",
}
SETUP = "import itertools; numbers = itertools.count(); keys = [b'k%d' % i for i in range(64)]; data = bytes(9000)"


@pytest.mark.parametrize("what", CHURN)
def test_killed_at_any_moment(cache: Cache, enlist: Enlist, chance: random.Random, what: str) -> None:
    bystander = enlist()
    bystander.do(f"cache.put(b'kept', pattern(b'kept', {NBYTES})), cache.reserve_read([b'kept'])")
    for _ in range(25):
        member = enlist()
        member.do(SETUP)
        member.begin(CHURN[what])
        time.sleep(chance.uniform(0, 0.03))
        member.kill()
        assert cache.verify() == []
        _check_readable(cache, b"kept")
    assert bystander.do("cache.finish_read([b'kept'])") == [OK]
    check_whole(cache)


def test_gone_without_a_clean_exit(arena: str, cache: Cache, enlist: Enlist) -> None:
    _put(cache, b"a")
    for _ in range(3):
        member = enlist()
        member.do("batch = cache.read([b'a'])")
        member.do("unfinished = cache.reserve_write([b'w'], 100)")
        member.begin("os._exit(0)")
        wait_until(lambda: cache.stats().lanes_alive == 1)
        assert cache.reap() == ReapReport(lanes=1, shares=1, writes=1, lock=False)
    assert cache.stats().lanes_dead == 0
    check_whole(cache)
    cache.close()
    shmcache.destroy(arena)
