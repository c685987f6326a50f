"""Processes race to create, attach to and destroy one name: all end up in one arena, and nobody in an arena that has
lost its name, unless it was taken by force."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes._crew import Member
from processes._segment import DOOR, Segment
from processes._whole import check_whole

import shmcache
from shmcache import ArenaBusyError, ArenaConfig, ArenaExistsError, ArenaNotFoundError, Cache, Status
from shmcache.segment import path_of

OK = Status.OK
Start = Callable[[], Member]
Enlist = Callable[..., Member]

RACERS = 8
ROUNDS = 25
CONFIG = "shmcache.ArenaConfig('256KiB', block_size='4KiB', lanes=10)"


@pytest.fixture
def racers(start: Start) -> list[Member]:
    """Processes that are in no arena."""
    return [start() for _ in range(RACERS)]


def test_create_is_won_by_one(arena_name: str, racers: list[Member]) -> None:
    for _ in range(ROUNDS):
        for racer in racers:
            racer.begin(f"shmcache.create({arena_name!r}, {CONFIG})")
        lost = 0
        for racer in racers:
            try:
                assert racer.answer() is None
            except ArenaExistsError:
                lost += 1
        assert lost == RACERS - 1
        shmcache.destroy(arena_name)


def test_all_attach_to_one_arena(arena_name: str, racers: list[Member]) -> None:
    keys = [b"%d" % i for i in range(RACERS)]
    for _ in range(ROUNDS):
        for racer in racers:
            racer.begin(f"cache = shmcache.attach({arena_name!r}, create={CONFIG})")
        for key, racer in zip(keys, racers, strict=True):
            racer.answer()
            assert racer.do(f"cache.put({key!r}, pattern({key!r}, 5000))") == OK
        assert len({racer.do("cache.lane") for racer in racers}) == RACERS
        for racer in racers:
            racer.begin(
                f"with cache.read({keys!r}) as batch:\n"
                f"    assert [bytes(view) for view in batch.views] == [pattern(key, 5000) for key in {keys!r}]\n"
                "cache.close()"
            )
        for racer in racers:
            racer.answer()
        with shmcache.attach(arena_name) as cache:
            check_whole(cache)
        shmcache.destroy(arena_name)
    assert arena_name not in shmcache.arenas()


def test_other_geometry_loses(arena_name: str, racers: list[Member]) -> None:
    for i, racer in enumerate(racers):
        size = 64 << 10 << i
        racer.begin(f"cache = shmcache.attach({arena_name!r}, create=shmcache.ArenaConfig({size}))")
    for racer in racers:
        racer.answer()
    assert len({racer.do("cache.stats().capacity") for racer in racers}) == 1


ATTACHER = """
from shmcache.segment import path_of

def live(name, config, lives):
    others = 0
    for i in range(lives):
        with shmcache.attach(name, create=config) as cache:
            mine = os.fstat(cache._attachment.fd)
            for _ in range(3):
                named = os.stat(path_of(name))
                assert (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino), "an arena without a name"
                assert cache.put(b"%d %d" % (os.getpid(), i), b"x" * 5000) == 0
                cache.delete([b"%d %d" % (os.getpid(), i)])
            others += cache.stats().lanes_alive > 1
    return others
"""
DESTROYER = """
def destroy_on(name, enough):
    destroyed = 0
    while not os.path.exists(enough):
        try:
            shmcache.destroy(name)
            destroyed += 1
        except (shmcache.ArenaBusyError, shmcache.ArenaNotFoundError):
            time.sleep(0.0005)
    return destroyed
"""


def test_destroyers_race_as_well(arena_name: str, racers: list[Member], tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    attachers, destroyers = racers[:5], racers[5:]
    for member in attachers:
        member.do(ATTACHER)
        member.begin(f"live({arena_name!r}, {CONFIG}, 150)")
    for member in destroyers:
        member.do(DESTROYER)
        member.begin(f"destroy_on({arena_name!r}, {str(enough)!r})")
    shared = sum(member.answer() for member in attachers)
    enough.touch()
    destroyed = sum(member.answer() for member in destroyers)
    assert destroyed > 0, "no destroyer ever came between"
    assert shared > 0, "no two were ever in one arena"


def test_destroyers_are_killed(arena_name: str, start: Start, tmp_path: Path) -> None:
    """At any moment; the name is free or the arena whole after each."""
    attacher = start()
    attacher.do(ATTACHER)
    attacher.begin(f"live({arena_name!r}, {CONFIG}, 300)")
    killed = 0
    while attacher.busy:
        destroyer = start()
        destroyer.do(DESTROYER)
        destroyer.begin(f"destroy_on({arena_name!r}, {str(tmp_path / 'never')!r})")
        destroyer.kill()
        killed += 1
    attacher.answer()
    assert killed > 0


def test_an_arena_that_was_half_destroyed_is_gone(arena: str, config: ArenaConfig) -> None:
    with shmcache.attach(arena) as cache:
        cache.put(b"a", b"x")
        Segment(arena).retire()
    with pytest.raises(ArenaNotFoundError):
        shmcache.attach(arena)
    shmcache.create(arena, config)
    Segment(arena).retire()
    with shmcache.attach(arena, create=config) as cache:
        assert cache.status([b"a"]) == [Status.NOT_FOUND]
        check_whole(cache)


def test_creators_are_killed(arena_name: str, start: Start, chance: random.Random) -> None:
    """The arena is whole, or there is none."""
    config = ArenaConfig("8MiB", block_size="4KiB", lanes=4, populate=True)
    for _ in range(20):
        creator = start()
        creator.do(f"name, config = {arena_name!r}, shmcache.{config!r}")
        creator.begin("while True: shmcache.create(name, config); shmcache.destroy(name)")
        time.sleep(chance.uniform(0, 0.02))
        creator.kill()
        with shmcache.attach(arena_name, create=config) as cache:
            check_whole(cache)
        shmcache.destroy(arena_name)


# The door

DOORMAN = f"""
import fcntl, struct
from shmcache.segment import path_of
fd = os.open(path_of(name), os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack('hhqqi', fcntl.F_WRLCK, os.SEEK_SET, {DOOR}, 1, 0))
os.pwrite(fd, struct.pack('<I', os.getpid()), {DOOR})
"""


@pytest.fixture
def doorman(arena: str, start: Start) -> Member:
    """Stands in the door of the arena, as who joins or destroys it does."""
    member = start()
    member.do(f"name = {arena!r}")
    member.do(DOORMAN)
    return member


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", lock_timeout_s=0.3)])
def test_who_is_stopped_in_the_door_is_named(arena: str, doorman: Member) -> None:
    doorman.stop()
    with pytest.raises(ArenaBusyError) as of_attach:
        shmcache.attach(arena)
    with pytest.raises(ArenaBusyError) as of_destroy:
        shmcache.destroy(arena)
    with pytest.raises(ArenaBusyError) as of_force:
        shmcache.destroy(arena, force=True)
    for caught in (of_attach, of_destroy, of_force):
        assert f"process {doorman.pid} (stopped)" in str(caught.value)
    doorman.kill()
    with shmcache.attach(arena) as cache:
        check_whole(cache)


def test_who_dies_in_the_door_opens_it(arena: str, doorman: Member, start: Start) -> None:
    comers = [start() for _ in range(3)]
    for comer in comers:
        comer.begin(f"cache = shmcache.attach({arena!r})")
    doorman.kill()
    for comer in comers:
        comer.answer()
        comer.kill()
    shmcache.destroy(arena)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=4)])
def test_killed_on_the_way_in_or_out(arena: str, cache: Cache, start: Start, chance: random.Random) -> None:
    for _ in range(40):
        comer = start()
        comer.begin(f"while True: shmcache.attach({arena!r}, group='engine', rank=0, world_size=2).close()")
        time.sleep(chance.uniform(0, 0.02))
        comer.kill()
        assert cache.verify() == []
        assert cache.stats().lanes_alive == 1
    lives = [lane.incarnation for lane in shmcache.inspect(arena).lanes if lane.role == "rank"]
    assert sum(lives) > 40, "it came many times"
    check_whole(cache)


# By force


def test_who_is_attached_keeps_what_it_has(arena: str, config: ArenaConfig, enlist: Enlist) -> None:
    old = [enlist(), enlist()]
    assert old[0].do("cache.put(b'a', pattern(b'a', 5000))") == OK
    old[1].do("batch = cache.read([b'a'])")
    with pytest.raises(ArenaBusyError):
        shmcache.destroy(arena)
    shmcache.destroy(arena, force=True)
    assert arena not in shmcache.arenas()
    with pytest.raises(ArenaNotFoundError):
        shmcache.attach(arena)
    with shmcache.attach(arena, create=config) as new:
        assert new.stats().lanes_alive == 1
        assert new.put(b"a", b"the new one's") == OK
        assert old[0].do("cache.put(b'b', b'x' * 9000)") == OK
        assert old[0].do("cache.verify()") == []
        assert old[0].do("cache.stats().objects") == 2
        assert old[1].do("bytes(batch.views[0]) == pattern(b'a', 5000)")
        assert old[0].do("cache.delete([b'a'])") == [Status.LOCKED]
        assert new.status([b"a", b"b"]) == [OK, Status.NOT_FOUND]
        old[1].kill()
        assert new.reap() == shmcache.ReapReport(), "the dead was in another arena"
        assert old[0].do("cache.reap().shares") == 1
        old[0].do("cache.close()")
        with new.read([b"a"]) as batch:
            assert bytes(batch.views[0] or b"") == b"the new one's"
        check_whole(new)
    assert path_of(arena).exists()


def test_many_create_after_force(arena_name: str, racers: list[Member]) -> None:
    """Old arenas live on in old members while new ones come and go under the same name."""
    for racer in racers:
        with shmcache.attach(arena_name, create=ArenaConfig("256KiB", block_size="4KiB")):
            racer.attach(arena_name)
            assert racer.do(f"cache.put(b'{racer.pid}', b'x')") == OK
        shmcache.destroy(arena_name, force=True)
    for racer in racers:
        assert racer.do("cache.stats().objects") == 1
        assert racer.do("cache.stats().lanes_alive") == 1
        assert racer.do(f"cache.lookup([b'{racer.pid}'])") == 1
        assert racer.do("cache.verify()") == []
