"""Ranks and groups through deaths and restarts: who may take a rank's lane, and what is found in it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from arena_support import Join
from processes._crew import Member
from processes._segment import Segment
from processes._whole import check_whole

import shmcache
from shmcache import ArenaConfig, Cache, GroupError, LaneInUseError, NoLaneError, Status

OK, LOCKED = Status.OK, Status.LOCKED
Enlist = Callable[..., Member]


def _reserved(cache: Cache, lane: int) -> tuple[int, int]:
    """Reserved and held shares of a lane."""
    info = shmcache.inspect(cache.name).lanes[lane]
    return info.reserved, info.held


@pytest.fixture
def controller(join: Join) -> Cache:
    """The controller of the group engine, of two ranks; a is there."""
    cache = join("engine", None, 2)
    assert cache.put(b"a", b"x" * 100) == OK
    return cache


@pytest.fixture
def rank(enlist: Enlist) -> Member:
    """Rank 1, with one share of a held and one reserved."""
    member = enlist("engine", 1, 2)
    member.do("batch = cache.read([b'a'])")
    assert member.do("cache.reserve_read([b'a'], 1)") == [OK]
    assert member.do("cache.cancel_read([b'a'], 0)") == [OK]
    return member


def test_a_rank_is_taken_over_after_its_death(
    arena: str, controller: Cache, rank: Member, start: Callable[[], Member]
) -> None:
    lane = rank.do("cache.lane")
    with pytest.raises(LaneInUseError) as caught:
        shmcache.attach(arena, group="engine", rank=1, world_size=2)
    assert all(part in str(caught.value) for part in (arena, "rank 1", "'engine'", f"process {rank.pid}"))
    assert _reserved(controller, lane) == (1, 1), "a refusal takes nothing"
    before = Segment(arena).incarnation(lane)
    rank.kill()
    successor = start()
    successor.attach(arena, "engine", 1, 2)
    assert successor.do("cache.lane") == lane
    assert Segment(arena).incarnation(lane) == before + 1
    assert _reserved(controller, lane) == (0, 0), "its predecessor's shares are gone"
    info = shmcache.inspect(arena).lanes[lane]
    assert (info.state, info.pid, info.rank) == ("alive", successor.pid, 1)
    assert controller.delete([b"a"]) == [OK]
    successor.kill()
    check_whole(controller)


def test_a_stopped_rank_is_not_taken_over(arena: str, controller: Cache, rank: Member) -> None:
    rank.stop()
    with pytest.raises(LaneInUseError) as caught:
        shmcache.attach(arena, group="engine", rank=1, world_size=2)
    assert f"process {rank.pid} (stopped)" in str(caught.value)
    rank.resume()
    assert rank.do("batch.release()") is None
    assert rank.do("cache.finish_read([b'a'])") == [OK]
    rank.kill()
    check_whole(controller)


@pytest.mark.parametrize("reaped", [True, False])
def test_many_successors(arena: str, controller: Cache, enlist: Enlist, reaped: bool) -> None:
    for life in range(1, 8):
        member = enlist("engine", 1, 2)
        member.do("batch = cache.read([b'a'])")
        member.do("unfinished = cache.reserve_write([b'w'], 9000)")
        lane = member.do("cache.lane")
        assert Segment(arena).incarnation(lane) == life
        assert _reserved(controller, lane) == (0, 1)
        member.kill()
        if reaped:
            assert controller.reap() == shmcache.ReapReport(lanes=1, shares=1, writes=1)
    check_whole(controller)


def test_grants_to_a_vacant_rank_are_found_by_who_takes_it(controller: Cache, rank: Member, join: Join) -> None:
    lane = rank.do("cache.lane")
    rank.kill()
    assert controller.reap().shares == 2
    assert controller.reserve_read([b"a"], 1) == [OK]
    assert controller.reap() == shmcache.ReapReport(), "a rank that has not come is not dead"
    assert _reserved(controller, lane) == (1, 0)
    successor = join("engine", 1, 2)
    assert _reserved(controller, lane) == (1, 0)
    assert successor.read([b"a"]).hits == 1
    assert successor.stats().counters.claims == 1
    assert controller.cancel_read([b"a"], 0) == [OK]
    assert controller.delete([b"a"]) == [OK]
    check_whole(controller)


def test_grants_to_ranks_that_come_later(controller: Cache, join: Join, enlist: Enlist) -> None:
    assert controller.reserve_read([b"a"], 1) == [OK]
    ranks = [enlist("engine", 0, 2), enlist("engine", 1, 2)]
    for member in ranks:
        assert member.do("cache.finish_read([b'a'])") == [OK]
    assert controller.delete([b"a"]) == [OK]
    for member in ranks:
        member.kill()
    check_whole(join())


def test_a_lane_of_the_dead_that_is_set_aside_keeps_what_is_granted(cache: Cache, enlist: Enlist, join: Join) -> None:
    assert cache.put(b"k", b"x") == OK
    for dead in [enlist() for _ in range(3)]:
        dead.do("batch = cache.read([b'k'])")
        dead.kill()
    controller = join("engine", None, 2)  # takes the first of their lanes, and sets the others aside for its ranks
    assert controller.reserve_read([b"k"], 1) == [OK]
    controller.reap()
    for rank in range(2):
        assert join("engine", rank, 2).finish_read([b"k"]) == [OK]
    assert controller.verify() == []


def test_a_rank_that_came_for_its_grants_and_died_loses_them(controller: Cache, enlist: Enlist, join: Join) -> None:
    assert controller.reserve_read([b"a"], 1) == [OK]
    enlist("engine", 1, 2).kill()
    assert controller.reap().shares == 1
    assert join("engine", 1, 2).finish_read([b"a"]) == [Status.NO_SHARE]
    assert controller.cancel_read([b"a"]) == [OK]
    check_whole(controller)


def _spin(seconds: float) -> None:
    """Less than a sleep can be."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize("config", [ArenaConfig("64KiB", block_size="4KiB", lanes=3)])
def test_a_successor_that_comes_while_its_predecessor_is_reaped(
    cache: Cache, enlist: Enlist, start: Callable[[], Member], chance: random.Random
) -> None:
    """Who reaps is stopped on the way, most likely between a look at the lane's lock and one at its incarnation."""
    assert cache.put(b"a", b"x") == OK
    reaper = enlist()
    reaper.begin("while True: cache.reap()")
    for _ in range(300):
        predecessor, successor = enlist("engine", 0, 1), start()
        reaper.stop()
        predecessor.kill()
        reaper.resume()
        _spin(chance.uniform(0, 0.0001))
        os.kill(reaper.pid, signal.SIGSTOP)
        successor.begin(
            f"cache = shmcache.attach({cache.name!r}, group='engine', rank=0, world_size=1); batch = cache.read([b'a'])"
        )
        time.sleep(chance.uniform(0, 0.003))
        reaper.resume()
        successor.answer()
        assert cache.stats().held == 1, "the successor's share was reaped"
        reaper.stop()
        successor.kill()
        cache.reap()
        assert cache.stats().held == 0, "a dead process keeps a share"
        reaper.resume()
    reaper.kill()
    check_whole(cache)


def test_eight_processes_want_one_rank(arena: str, controller: Cache, start: Callable[[], Member]) -> None:
    members = [start() for _ in range(8)]
    for round_ in range(5):
        for member in members:
            member.begin(f"cache = shmcache.attach({arena!r}, group='engine', rank=0, world_size=2)")
        refused = 0
        for member in members:
            try:
                member.answer()
                owner = member
            except LaneInUseError:
                refused += 1
        assert refused == len(members) - 1
        owner.do("batch = cache.read([b'a'])")
        if round_ < 4:
            members.remove(owner)
            owner.kill()
    assert controller.stats().held == 1, "the last owner's"
    owner.kill()
    check_whole(controller)


def _start_group(enlist: Enlist, world_size: int) -> list[Member]:
    members = [enlist("engine", rank, world_size) for rank in (None, *range(world_size))]
    assert members[0].do("cache.put(b'a', b'x' * 100) in (0, 3)")
    assert members[0].do(f"cache.reserve_read([b'a'], {world_size - 1})") == [OK]
    for member in members[1:]:
        member.do("batch = cache.read([b'a'])")
    assert members[0].do(f"cache.reserve_read([b'a'], {world_size - 1})") == [OK]
    return members


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=6)])
@pytest.mark.parametrize("sizes", [(2, 4, 3), (4, 2, 4), (3, 3, 3), (1, 4, 1)])
def test_a_group_restarts_in_another_size(arena: str, join: Join, enlist: Enlist, sizes: tuple[int, ...]) -> None:
    """There are lanes for one group at a time, so that each one needs the lanes of the one before."""
    cache = join()
    for size in sizes:
        members = _start_group(enlist, size)
        cache.reap()
        assert cache.stats().held == cache.stats().reserved == size, "those before have left nothing"
        with pytest.raises(GroupError, match="engine"):
            shmcache.attach(arena, group="engine", rank=0, world_size=size + 1)
        assert cache.delete([b"a"]) == [LOCKED]
        for member in members:
            member.kill()
        assert cache.stats().lanes_alive == 1
    check_whole(cache)


def test_grants_to_ranks_that_never_came_go_with_their_group(join: Join, enlist: Enlist) -> None:
    cache, controller = join(), enlist("engine", None, 4)
    assert controller.do("cache.put(b'a', b'x')") == OK
    assert controller.do("cache.reserve_read([b'a'], 3)") == [OK]
    controller.kill()
    successor = enlist("engine", None, 3)
    assert cache.delete([b"a"]) == [OK]
    successor.kill()
    check_whole(cache)


def test_the_last_member_keeps_the_world_size(arena: str, enlist: Enlist, join: Join) -> None:
    cache, members = join(), _start_group(enlist, 2)
    for member in members[:2]:
        member.kill()
    members[2].stop()
    with pytest.raises(GroupError):
        shmcache.attach(arena, group="engine", rank=0, world_size=3)
    members[2].kill()
    join("engine", 0, 3)
    check_whole(cache)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=4)])
def test_lanes_of_dead_groups_are_used_again(arena: str, join: Join, enlist: Enlist) -> None:
    cache = join()
    assert cache.put(b"a", b"x" * 100) == OK
    for i in range(6):
        group = f"engine {i}"
        members = [enlist(group, rank, 3) for rank in range(3)]
        for member in members:
            member.do("batch = cache.read([b'a'])")
        with pytest.raises(NoLaneError):
            shmcache.attach(arena, group="another", rank=0, world_size=1)
        assert cache.delete([b"a"]) == [LOCKED]
        for member in members:
            member.kill()
    check_whole(cache)


def test_a_lane_that_nobody_reaped_is_dead_until_it_is_taken(arena: str, join: Join, enlist: Enlist) -> None:
    cache = join()
    for _ in range(3):
        enlist().kill()
        assert cache.stats().lanes_dead == 1
    with shmcache.attach(arena) as other:
        assert other.stats().lanes_dead == 0
    assert cache.stats().lanes_dead == 0
