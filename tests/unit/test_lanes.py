"""Lanes in one process: groups, ranks and controllers, who gets which lane, and what a lane leaves."""

from __future__ import annotations

import pytest
from arena_support import Join, started

import shmcache
from shmcache import ArenaConfig, NoLaneError, ReapReport, Status

OK = Status.OK

# Attaches as told, holds a share of k, has one reserved, and has begun to write w.
HOLDER = """
import sys, time, shmcache
rank, world_size = int(sys.argv[2]), int(sys.argv[3])
group = {"group": "engine", "rank": rank, "world_size": world_size} if world_size else {}
cache = shmcache.attach(sys.argv[1], **group)
cache.put(b"k", b"x" * 100)
batch = cache.read([b"k"])
if rank == 0:
    cache.reserve_read([b"k"])
unfinished = cache.reserve_write([b"w"], 100)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("world_size", [0, 1, 2])
def test_what_a_killed_process_held_is_reaped(arena: str, join: Join, world_size: int) -> None:
    cache = join()
    with started(HOLDER, arena, "0", str(world_size)) as holder:
        assert cache.delete([b"k", b"w"], force=True) == [Status.LOCKED] * 2
        holder.kill()
        holder.wait()
        assert cache.stats().lanes_dead == 1
        assert cache.reap() == ReapReport(lanes=1, shares=2, writes=1)
        assert cache.reap() == ReapReport()
    assert cache.status([b"k", b"w"]) == [OK, Status.NOT_FOUND]
    assert cache.delete([b"k"]) == [OK]
    assert cache.verify() == []


def test_a_successor_that_is_killed_is_reaped_as_well(arena: str, join: Join) -> None:
    cache = join()
    for _ in range(3):
        with started(HOLDER, arena, "0", "1") as holder:
            holder.kill()
            holder.wait()
        assert cache.reap() == ReapReport(lanes=1, shares=2, writes=1)


@pytest.mark.parametrize("config", [ArenaConfig("64KiB", block_size="4KiB", lanes=4)])
def test_a_group_that_finds_too_few_lanes_leaves_none_behind(arena: str, join: Join) -> None:
    join("first", 0, 2)
    with pytest.raises(NoLaneError) as caught:
        shmcache.attach(arena, group="second", rank=0, world_size=3)
    assert "second" in str(caught.value)
    join()
    join()
