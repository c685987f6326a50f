"""Writers of one object together, of whom one is killed or stopped: the object is whole or not there, its key is free
again, and its memory is nobody else's while a survivor fills it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from arena_support import Join, contents, pattern
from processes._crew import Member
from processes._whole import check_whole

from shmcache import ArenaConfig, Cache, Status

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT
NOT_OWNER = Status.NOT_OWNER
Enlist = Callable[..., Member]

PART = 3000  #: bytes a writer; three make three blocks
WORLD = 3
RESERVE = f"batch = cache.reserve_write([b'k'], {WORLD * PART}, writers={WORLD})"
FILL = f"batch.views[0][cache.rank * {PART} : (cache.rank + 1) * {PART}] = pattern(bytes([cache.rank]), {PART})"
WHOLE = b"".join(pattern(bytes([rank]), PART) for rank in range(WORLD))


@pytest.fixture
def scheduler(join: Join) -> Cache:
    return join("engine", None, WORLD)


@pytest.fixture
def stranger(join: Join) -> Cache:
    """In no group: where all writers are gone, theirs is."""
    return join()


@pytest.fixture
def writers(enlist: Enlist) -> list[Member]:
    """Three ranks that have filled their parts, and finished none."""
    members = [enlist("engine", rank, WORLD) for rank in range(WORLD)]
    for member in members:
        member.do(RESERVE)
        member.do(FILL)
        assert member.do("batch.status") == [OK]
    return members


def _is_readable(cache: Cache) -> bool:
    with cache.read([b"k"]) as found:
        return contents(found) == [WHOLE]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_one_dies_before_its_part_is_done(scheduler: Cache, writers: list[Member], done: int) -> None:
    for member in writers[:done]:
        assert member.do("batch.publish()") == [OK]
    writers[2].kill()
    assert scheduler.status([b"k"]) == [IN_FLIGHT]
    assert scheduler.put(b"k", b"another") == OK, "the next write of the key finds the death"
    for member in writers[done:2]:
        member.do(FILL)
    with scheduler.read([b"k"]) as found:
        assert contents(found) == [b"another"]
    for member in writers[done:2]:
        assert member.do("batch.publish()")[0] in {NOT_OWNER, NOT_FOUND}
    check_whole(scheduler)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_part_that_is_done_outlives_its_writer(
    scheduler: Cache, writers: list[Member], order: tuple[int, ...]
) -> None:
    first, *rest = order
    assert writers[first].do("batch.publish_and_reserve_read(2)") == [OK]
    writers[first].kill()
    assert scheduler.reap().writes == 0
    for rank in rest:
        assert scheduler.status([b"k"]) == [IN_FLIGHT]
        assert writers[rank].do("batch.publish()") == [OK]
    assert scheduler.stats().reserved == WORLD, "what the dead one asked for"
    assert _is_readable(scheduler)
    assert scheduler.cancel_read([b"k"], WORLD - 1) == [OK]
    check_whole(scheduler)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_all_die(stranger: Cache, writers: list[Member], done: int) -> None:
    for member in writers[:done]:
        assert member.do("batch.publish()") == [OK]
    for member in writers:
        member.kill()
    assert stranger.reap().writes == 1
    stats = stranger.stats()
    assert (stats.writing, stats.objects, stats.used_bytes) == (0, 0, 0)
    check_whole(stranger)


def test_the_engine_dies_while_another_writer_is_to_come(stranger: Cache, enlist: Enlist) -> None:
    for rank in range(2):
        member = enlist("engine", rank, WORLD)
        member.do(RESERVE)
        assert member.do("batch.publish()") == [OK]
        member.kill()
    assert stranger.reap().writes == 1
    assert stranger.stats().used_bytes == 0
    check_whole(stranger)


def test_another_writer_comes_after_the_others_died(scheduler: Cache, enlist: Enlist) -> None:
    for rank in range(WORLD):
        member = enlist("engine", rank, WORLD)
        member.do(RESERVE)
        member.do(FILL)
        assert member.do("batch.publish()") == [OK]
        member.kill()
    scheduler.reap()
    assert _is_readable(scheduler)
    check_whole(scheduler)


def test_a_successor_writes_the_key_anew(scheduler: Cache, writers: list[Member], enlist: Enlist) -> None:
    writers[0].kill()
    again = enlist("engine", 0, WORLD)  # its coming reaps its predecessor
    assert scheduler.status([b"k"]) == [NOT_FOUND]
    for member in writers[1:]:
        assert member.do("batch.publish()")[0] in {NOT_OWNER, NOT_FOUND}
    for member in (again, *writers[1:]):
        member.do(RESERVE)
        member.do(FILL)
        assert member.do("batch.publish()") == [OK]
    assert _is_readable(scheduler)
    check_whole(scheduler)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=16, write_lease_s=0.05)])
def test_a_stopped_writer_keeps_the_memory_not_the_key(scheduler: Cache, writers: list[Member]) -> None:
    for member in writers[:2]:
        assert member.do("batch.publish()") == [OK]
    writers[2].stop()
    scheduler.reap()
    assert scheduler.status([b"k"]) == [IN_FLIGHT], "it is not dead"
    time.sleep(0.06)
    assert scheduler.put(b"k", b"another") == OK
    assert scheduler.stats().writing == 1
    assert scheduler.evict(1 << 20) == 4096
    writers[2].resume()
    writers[2].do(FILL)
    assert writers[2].do("batch.publish()") == [NOT_OWNER]
    assert scheduler.stats().used_bytes == 0
    check_whole(scheduler)


def test_a_stopped_writer_goes_on(scheduler: Cache, writers: list[Member]) -> None:
    writers[1].stop()
    for member in (writers[0], writers[2]):
        assert member.do("batch.publish()") == [OK]
    scheduler.reap()
    writers[1].resume()
    assert writers[1].do("batch.publish()") == [OK]
    assert _is_readable(scheduler)
    check_whole(scheduler)


WRITE_ON = f"""
import itertools
for i in itertools.count():
    key = b'%d' % (i % 7)
    with cache.reserve_write([key], {WORLD * PART}, writers={WORLD}) as batch:
        if batch.views[0] is not None:
            batch.views[0][cache.rank * {PART} : (cache.rank + 1) * {PART}] = pattern(bytes([cache.rank]), {PART})
    cache.delete([key])
"""


def test_killed_at_any_moment(stranger: Cache, enlist: Enlist, chance: random.Random) -> None:
    keys = [b"%d" % i for i in range(7)]
    members = [enlist("engine", rank, WORLD) for rank in range(WORLD)]
    for member in members:
        member.begin(WRITE_ON)
    for _ in range(60):
        time.sleep(chance.uniform(0, 0.01))
        rank = chance.randrange(WORLD)
        members[rank].kill()
        with stranger.read(keys) as found:
            assert {data for data in contents(found) if data is not None} <= {WHOLE}
        members[rank] = enlist("engine", rank, WORLD)
        members[rank].begin(WRITE_ON)
        assert stranger.verify() == []
    assert stranger.stats().counters.publishes > 0
    for member in members:
        member.kill()
    stranger.reap()
    assert stranger.stats().writing == 0
    check_whole(stranger)
