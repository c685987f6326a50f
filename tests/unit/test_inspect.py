"""What inspect lists of objects and shares: each with its place, its standing, and since when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import cuda_double
import pytest
from arena_support import Join, run_python

import shmcache
from shmcache.stats import ArenaInfo, ObjectInfo, ShareInfo, Stats

BLOCK = 4096
WAIT_S = 0.05  #: longer than the table of times tells apart (16 ms)
STANDINGS = ("ready", "reserved", "writing", "held", "dead")


def look(name: str) -> ArenaInfo:
    return shmcache.inspect(name, objects=True, shares=True)


def objects_of(name: str) -> dict[bytes, ObjectInfo]:
    objects = look(name).objects
    assert objects is not None
    return {found.key: found for found in objects}


def shares_of(name: str) -> list[ShareInfo]:
    shares = look(name).shares
    assert shares is not None
    return list(shares)


def stats_of(name: str) -> Stats:
    stats = shmcache.inspect(name).stats
    assert stats is not None
    return stats


def test_lists_are_there_only_where_asked_for(cache: shmcache.Cache) -> None:
    cache.put(b"k", b"x")
    plain, objects = shmcache.inspect(cache.name), shmcache.inspect(cache.name, objects=True)
    shares = shmcache.inspect(cache.name, shares=True)
    assert (plain.objects, plain.shares) == (None, None)
    assert objects.objects is not None
    assert (len(objects.objects), objects.shares) == (1, None)
    assert (shares.objects, shares.shares) == (None, ())


@pytest.mark.parametrize("what", ["objects", "shares"])
def test_lists_are_asked_for_by_bool(arena: str, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        shmcache.inspect(arena, **{what: 1})  # type: ignore[arg-type]


def test_objects_have_their_place(cache: shmcache.Cache) -> None:
    before = time.time()
    sizes = {b"one": 1, b"two": BLOCK + 1, b"\xff" * 64: 3 * BLOCK}
    for key, nbytes in sizes.items():
        cache.put(key, bytes(nbytes))
    listed = look(cache.name).objects
    assert listed is not None
    assert [found.block for found in listed] == sorted(found.block for found in listed)
    found = objects_of(cache.name)
    assert {key: o.nbytes for key, o in found.items()} == sizes
    assert [found[key].blocks for key in sizes] == [1, 2, 3]
    taken = [block for o in found.values() for block in range(o.block, o.block + o.blocks)]
    assert len(taken) == len(set(taken)) == 6
    assert all(0 <= block < 256 for block in taken)
    assert {o.owner for o in found.values()} == {cache.lane}
    assert all(before - 1 <= o.written <= time.time() + 1 for o in found.values())


def test_standings(arena: str, join: Join) -> None:
    engine = join("g", None, 2)
    rank = join("g", 1, 2)
    for key in (b"ready", b"held", b"reserved"):
        engine.put(key, bytes(BLOCK))
    engine.put(b"both", bytes(2 * BLOCK))
    with engine.reserve_write([b"writing"], 3 * BLOCK), rank.read([b"held", b"both"]):
        engine.reserve_read([b"reserved", b"both"], extra_count=1)
        found = objects_of(arena)
        standings = {key: o.standing for key, o in found.items()}
        assert standings == {
            b"ready": "ready",
            b"held": "held",
            b"reserved": "reserved",
            b"both": "held",
            b"writing": "writing",
        }
        assert (found[b"both"].held, found[b"both"].reserved) == (1, 2)
        stats = stats_of(arena)
        blocks = {name: getattr(stats, f"{name}_bytes") // BLOCK for name in STANDINGS}
        assert blocks == {"ready": 1, "reserved": 1, "writing": 3, "held": 3, "dead": 0}
        assert stats.used_bytes == 8 * BLOCK
        assert stats.groups == 1
    stats = stats_of(arena)
    assert (stats.ready_bytes, stats.reserved_bytes, stats.held_bytes) == (5 * BLOCK, 3 * BLOCK, 0)


def test_shares_of_a_rank_that_has_not_come_are_reserved(arena: str, join: Join) -> None:
    engine = join("g", 0, 2)
    engine.put(b"k", bytes(BLOCK))
    engine.reserve_read([b"k"], extra_count=1)
    engine.finish_read([b"k"])
    assert objects_of(arena)[b"k"].standing == "reserved"
    (share,) = shares_of(arena)
    assert (share.kind, shmcache.inspect(arena).lanes[share.lane].state) == ("reserved", "vacant")


@pytest.mark.parametrize("config", [shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=4, read_lease_s=0.05)])
def test_a_share_whose_lease_is_over_keeps_nothing(cache: shmcache.Cache) -> None:
    cache.put(b"k", bytes(BLOCK))
    cache.reserve_read([b"k"])
    assert objects_of(cache.name)[b"k"].standing == "reserved"
    time.sleep(2 * WAIT_S)
    found = objects_of(cache.name)[b"k"]
    assert (found.standing, found.reserved) == ("ready", 1)
    assert stats_of(cache.name).ready_bytes == BLOCK


def test_shares_say_who_holds_what_since_when(arena: str, join: Join) -> None:
    writer, reader = join(), join("g", 0, 1)
    for key in (b"a", b"b"):
        writer.put(key, bytes(BLOCK))
    began = time.time()
    with reader.read([b"a"]):
        time.sleep(WAIT_S)
        middle = time.time()
        with reader.read([b"a"]), reader.read([b"b"]):  # the second share of a keeps the time of the first
            reader.reserve_read([b"b"])
            batch = writer.reserve_write([b"c"], BLOCK)
            found = shares_of(arena)
            batch.abort()
            held = [(share.key, share.count) for share in found if share.kind == "held"]
            assert held == [(b"a", 2), (b"b", 1)]
            assert {(share.kind, share.lane, share.key) for share in found if share.kind != "held"} == {
                ("reserved", reader.lane, b"b"),  # its time is known to a thousandth of the lease
                ("writing", writer.lane, b"c"),
            }
            assert [share.since for share in found] == sorted(share.since for share in found)
            assert began - 0.02 <= found[0].since <= middle - WAIT_S / 2
            assert all(middle - 0.02 <= share.since <= time.time() for share in found[1:])
            (lane,) = [lane for lane in shmcache.inspect(arena).lanes if lane.index == reader.lane]
            assert (lane.held, lane.reserved, lane.held_bytes) == (3, 1, 2 * BLOCK)
            assert lane.oldest_held is not None
            assert abs(lane.oldest_held - found[0].since) < 1
    assert [(share.kind, share.key) for share in shares_of(arena)] == [("reserved", b"b")]
    assert shmcache.inspect(arena).lanes[reader.lane].oldest_held is None


def test_a_share_taken_anew_has_a_new_time(arena: str, cache: shmcache.Cache) -> None:
    cache.put(b"k", bytes(BLOCK))
    with cache.read([b"k"]):
        pass
    time.sleep(WAIT_S)
    again = time.time()
    with cache.read([b"k"]):
        (share,) = shares_of(arena)
        assert share.since >= again - 0.02
    cache.delete([b"k"])
    cache.put(b"k", bytes(BLOCK))
    time.sleep(WAIT_S)
    again = time.time()
    with cache.read([b"k"]):
        (share,) = shares_of(arena)
        assert share.since >= again - 0.02


def test_json_has_keys_in_hex(cache: shmcache.Cache) -> None:
    cache.put(b"\x00\xff", b"x")
    with cache.read([b"\x00\xff"]):
        document = look(cache.name).as_dict()
    assert [o["key"] for o in document["objects"]] == ["00ff"]
    assert [share["key"] for share in document["shares"]] == ["00ff"]
    assert shmcache.inspect(cache.name).as_dict()["objects"] is None


def test_destroy_means_the_arena_that_was_seen(arena: str, config: shmcache.ArenaConfig) -> None:
    inode = shmcache.inspect(arena).inode
    shmcache.destroy(arena, inode=inode)
    shmcache.create(arena, config)
    assert shmcache.inspect(arena).inode != inode
    for force in (False, True):
        with pytest.raises(shmcache.ArenaNotFoundError, match="made under its name since"):
            shmcache.destroy(arena, inode=inode, force=force)
    shmcache.destroy(arena, inode=shmcache.inspect(arena).inode)
    assert arena not in shmcache.arenas()


OUT_OF_DESCRIPTORS = """
import resource, sys, shmcache
usual = resource.getrlimit(resource.RLIMIT_NOFILE)
for call in (shmcache.inspect, shmcache.attach, shmcache.destroy):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
    try:
        call(sys.argv[1])
    except OSError:
        pass
    else:
        raise AssertionError(call)
    resource.setrlimit(resource.RLIMIT_NOFILE, usual)
assert shmcache.inspect(sys.argv[1]).problem is None
"""


def test_a_process_without_descriptors_finds_no_fault_with_the_arena(arena: str) -> None:
    done = run_python(OUT_OF_DESCRIPTORS, arena)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def owner(tmp_path: Path, join: Join) -> Iterator[shmcache.Cache]:
    """A cache with a region on each of two GPUs that are not there."""
    with cuda_double.installed(tmp_path, devices=2, torch=False):
        owner = join()
        owner.add_region("cuda:0", "64KiB")
        owner.add_region("cuda:1", "4MiB")
        yield owner
        owner.close()
    assert cuda_double.violations(tmp_path) == []


def _write(cache: shmcache.Cache, key: bytes, nbytes: int, region: int) -> None:
    with cache.reserve_write([key], nbytes, region=region) as batch:
        batch.publish()


def test_regions(owner: shmcache.Cache) -> None:
    info = look(owner.name)
    one, two = info.regions
    assert (info.region_limit, one.number, two.number) == (8, 1, 2)
    assert one.uuid != two.uuid
    assert {found.state for found in info.regions} == {"live"}
    assert {found.owner for found in info.regions} == {owner.lane}
    assert [found.device for found in info.regions] == [0, 1]
    assert [found.capacity for found in info.regions] == [2**16, 2**22]
    assert [found.block_size for found in info.regions] == [BLOCK, 4 * BLOCK]  # no more blocks than host memory has
    assert [(found.used_bytes, found.opened) for found in info.regions] == [(0, ()), (0, ())]
    document = info.as_dict()
    assert [found["number"] for found in document["regions"]] == [1, 2]


def test_objects_and_shares_have_their_region(owner: shmcache.Cache) -> None:
    owner.put(b"host", bytes(BLOCK))
    _write(owner, b"one", BLOCK + 1, 1)
    _write(owner, b"two", 5 * BLOCK, 2)
    with owner.read([b"two", b"host"]), owner.reserve_write([b"new"], BLOCK, region=1):
        owner.reserve_read([b"one"])
        found, stats = look(owner.name), stats_of(owner.name)
        places = {o.key: (o.region, o.block, o.blocks) for o in found.objects or ()}
        assert places == {b"host": (0, 0, 1), b"one": (1, 0, 2), b"new": (1, 2, 1), b"two": (2, 0, 2)}
        regions = {(share.kind, share.key): share.region for share in found.shares or ()}
        assert regions == {
            ("held", b"host"): 0,
            ("held", b"two"): 2,
            ("writing", b"new"): 1,
            ("reserved", b"one"): 1,
        }
        assert [region.used_bytes for region in found.regions] == [3 * BLOCK, 8 * BLOCK]
        assert (stats.capacity, stats.used_bytes, stats.held_bytes) == (2**20, BLOCK, BLOCK)  # of host memory
        assert (stats.objects, stats.writing, stats.held) == (3, 1, 2)  # wherever they are
        assert found.lanes[owner.lane].held_bytes == 9 * BLOCK


def test_a_region_that_its_owner_gives_up_is_lost_until_the_last_share_is_back(
    owner: shmcache.Cache, join: Join
) -> None:
    reader = join()
    _write(owner, b"one", BLOCK, 1)
    batch = reader.read([b"one"])
    owner.remove_region(1)
    lost, live = look(owner.name).regions
    assert [(region.number, region.state) for region in (lost, live)] == [(1, "lost"), (2, "live")]
    assert lost.used_bytes == BLOCK
    batch.release()
    reader.reap()
    assert [region.number for region in look(owner.name).regions] == [2]
