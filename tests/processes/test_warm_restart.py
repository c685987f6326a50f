"""Every process of an engine is killed, and a new engine finds the arena as it was: all that was published, with its
bytes, and nothing that was not. An arena of another fingerprint, or of another boot, is never taken for it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, pattern
from fuzz._segment import BOOT_ID, Bytes
from processes._crew import Member
from processes._segment import DERIVED, EVICTING, READY, Segment
from processes._whole import check_whole

import shmcache
from shmcache import ArenaConfig, Cache, Status
from shmcache.segment import path_of

Enlist = Callable[..., Member]
Successor = tuple[str | None, int]  #: group and world_size

NBYTES = 5000  #: two blocks
CONFIG = ArenaConfig("16MiB", block_size="4KiB", slots=2048, lanes=16, fingerprint="model/1")
SUCCESSORS: list[Successor] = [("engine", 2), ("engine", 4), ("other", 3), (None, 1)]

#: Publishes one object after the other, and tells of each in a file once it is; always has another half-written.
WRITER = f"""
import itertools
told = open({{path!r}}, "ab", buffering=0)
for i in itertools.count():
    key, next_key = b"{{who}}-%d" % i, b"{{who}}-half-%d" % i
    half = cache.reserve_write([next_key], {NBYTES})
    half.views[0][:100] = pattern(next_key, {NBYTES})[:100]
    batch = cache.reserve_write([key], {NBYTES})
    batch.views[0][:] = pattern(key, {NBYTES})
    batch.publish_and_reserve_read({{extra}})
    told.write(key + b"\\n")
    if i > 300:
        time.sleep(600)
    half.abort()
"""
READER = """
held = []
for i in range(100000):
    batch = cache.read([b"{who}-%d" % j for j in range(i % 50)])
    if len(held) < 10:
        held.append(batch)
    else:
        batch.release()
"""


@pytest.fixture
def config() -> ArenaConfig:
    return CONFIG


def engine(join: Join, successor: Successor) -> list[Cache]:
    """A new engine: its ranks and its scheduler."""
    group, world_size = successor
    if group is None:
        return [join()]
    return [*(join(group, rank, world_size) for rank in range(world_size)), join(group, None, world_size)]


def check_published(cache: Cache, keys: list[bytes]) -> None:
    """All are readable, with their bytes."""
    with cache.read(keys) as batch:
        assert batch.status == [Status.OK] * len(keys)
        assert [bytes(view) for view in batch.views if view is not None] == [pattern(key, NBYTES) for key in keys]


def work_and_die(enlist: Enlist, folder: Path, chance: random.Random) -> list[bytes]:
    """A scheduler, two ranks and others, who write and read until all are killed: what they had published."""
    scheduler, *ranks = [enlist("engine", rank, 2) for rank in (None, 0, 1)]
    readers = [enlist() for _ in range(2)]
    files = []
    for who, member in enumerate([scheduler, *ranks]):
        files.append(folder / f"told-{who}")
        member.begin(WRITER.format(path=str(files[-1]), who=who, extra=1))
    for who, member in enumerate(readers):
        member.begin(READER.format(who=who))
    time.sleep(chance.uniform(0.2, 0.6))
    members = [scheduler, *ranks, *readers]
    chance.shuffle(members)
    for member in members:
        member.kill()
    told = [key for file in files if file.exists() for key in file.read_bytes().split(b"\n")[:-1]]
    assert len(told) > 10, "they did not get to work"
    return told


@pytest.mark.parametrize("successor", SUCCESSORS, ids=str)
def test_killed_in_the_midst_of_work(
    join: Join, enlist: Enlist, tmp_path: Path, chance: random.Random, successor: Successor
) -> None:
    told = work_and_die(enlist, tmp_path, chance)
    caches = engine(join, successor)
    for cache in caches:
        check_published(cache, told)
    halves = [b"%d-half-%d" % (who, i) for who in range(3) for i in range(302)]
    with caches[0].read(halves) as batch:
        assert set(batch.status) <= {Status.NOT_FOUND, Status.IN_FLIGHT}, "nothing half-written is served"
    # Whatever else is there, unknown to us since its writer died before it could tell, is whole.
    others = [key for key in (b"%d-%d" % (who, i) for who in range(3) for i in range(302)) if key not in set(told)]
    there = [key for key, status in zip(others, caches[0].status(others), strict=True) if status == Status.OK]
    check_published(caches[0], there)
    assert len(there) <= 3, "one a writer"
    assert caches[0].verify() == []
    check_all_can_be_used(caches)


def check_all_can_be_used(caches: list[Cache]) -> None:
    """Shares and writes of the dead are gone when they are in the way, and the whole arena can be filled anew."""
    capacity = caches[-1].stats().capacity
    assert caches[-1].put(b"all", bytes(capacity)) == Status.OK
    assert caches[-1].stats().objects == 1
    check_whole(caches[0])


@pytest.mark.parametrize("successor", SUCCESSORS, ids=str)
def test_killed_with_the_lock_and_the_index_half_rebuilt(
    arena: str, join: Join, enlist: Enlist, successor: Successor
) -> None:
    scheduler, rank, other = (enlist("engine", number, 2) for number in (None, 0, 1))
    keys = [b"%d" % i for i in range(100)]
    scheduler.do(f"[cache.put(key, pattern(key, {NBYTES})) for key in {keys!r}]")
    scheduler.do(f"cache.reserve_read({keys!r}, 1)")
    rank.do(f"held = cache.read({keys[:50]!r})")
    rank.do(f"half = cache.reserve_write([b'half'], {NBYTES})")
    scheduler.do(f"segment = Segment({arena!r}); segment.take_lock(cache.lane)")
    for member in (scheduler, rank, other):  # had the other never come, its shares would wait for it, for a lease
        member.kill()
    segment = Segment(arena)
    assert segment.change_states(READY, EVICTING) == 100, "as if it had died while it evicted them all"
    for part in DERIVED:
        segment.overwrite(part, b"\x5a\xa5\xff")
    segment.begin_rebuild()
    caches = engine(join, successor)
    for cache in caches:
        check_published(cache, keys)
        assert cache.status([b"half"]) == [Status.NOT_FOUND]
    assert caches[0].verify() == []
    assert caches[0].stats().counters.lock_steals == 1
    check_all_can_be_used(caches)


def test_one_engine_after_the_other(join: Join, enlist: Enlist) -> None:
    """Each finds what all before it published; what is left of the dead does not add up."""
    keys: list[bytes] = []
    for life in range(8):
        members = [enlist("engine", rank, 1 + life % 3) for rank in (None, 0)]
        for member in members:
            assert member.do(f"cache.lookup({keys!r})") == len(keys) if keys else True
        key = b"life %d" % life
        members[0].do(f"cache.put({key!r}, pattern({key!r}, {NBYTES}))")
        keys.append(key)
        members[0].do(f"cache.reserve_read({keys!r})")
        members[1].do(f"held = cache.read({keys!r})")
        for member in members:
            member.kill()
    cache = join()
    check_published(cache, keys)
    assert cache.stats().lanes_dead <= 4, "lanes are used again"
    check_whole(cache)


# Fingerprints


def test_another_fingerprint_is_refused_and_nothing_is_changed(arena: str, enlist: Enlist) -> None:
    member = enlist("engine", 0, 2)
    member.do(f"cache.put(b'a', pattern(b'a', {NBYTES})), cache.reserve_read([b'a'], 1)")
    member.do(f"half = cache.reserve_write([b'half'], {NBYTES})")
    member.kill()
    before = path_of(arena).read_bytes()
    other = ArenaConfig("1MiB", fingerprint="model/2")
    attempts: list[dict[str, Any]] = [
        {"fingerprint": "model/2"},
        {"create": other},
        {"create": other, "group": "engine", "rank": 0, "world_size": 2},
        {"create": CONFIG, "fingerprint": ""},
    ]
    for attempt in attempts:
        with pytest.raises(shmcache.FingerprintError, match=arena):
            shmcache.attach(arena, **attempt)
    assert path_of(arena).read_bytes() == before, "no lane, no lock, no reaping"
    for attempt in [{"fingerprint": "model/1"}, {"create": CONFIG}, {}]:
        with shmcache.attach(arena, **attempt) as cache:  # type: ignore[arg-type] # a dict has no signature
            check_published(cache, [b"a"])


# Another boot


@pytest.fixture
def old(arena: str, arena_name: str) -> Iterator[str]:
    """An arena of an earlier boot, in a /dev/shm that outlived it: a real file with another boot in its header."""
    with shmcache.attach(arena) as cache:
        cache.put(b"a", pattern(b"a", NBYTES))
    name = f"{arena_name}-old"
    shutil.copy(path_of(arena), path_of(name))
    path_of(name).chmod(0o600)
    segment = Bytes(path_of(name), name)
    segment.patch(BOOT_ID, bytes(16))
    segment.seal()
    segment.close()
    shmcache.destroy(arena)
    yield name
    path_of(name).unlink(missing_ok=True)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"shmcache_tools.{program}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_a_copy_of_this_boot_is_an_arena(arena: str, arena_name: str) -> None:
    """So that what the tests below refuse is refused for its boot."""
    name = f"{arena_name}-copy"
    shutil.copy(path_of(arena), path_of(name))
    path_of(name).chmod(0o600)
    try:
        shmcache.attach(name).close()
        assert shmcache.inspect(name).problem is None
    finally:
        shmcache.destroy(name)


def test_an_old_file_is_never_attached_to(old: str) -> None:
    before = path_of(old).read_bytes()
    for attempt in [{}, {"create": CONFIG}, {"group": "engine", "rank": 0, "world_size": 2}]:
        with pytest.raises(shmcache.ArenaDamagedError, match="before the last boot") as caught:
            shmcache.attach(old, **attempt)  # type: ignore[arg-type] # a dict has no signature
        assert f"shmcache-cleanup {old}" in str(caught.value), "it says what to do"
    with pytest.raises(shmcache.ArenaExistsError):
        shmcache.create(old, CONFIG)
    assert path_of(old).read_bytes() == before


def test_an_old_file_is_told_as_one(old: str) -> None:
    problem = shmcache.inspect(old).problem
    assert problem is not None
    assert "before the last boot" in problem
    for arguments in [[old], ["--json", old]]:
        done = run("stat", *arguments)
        assert done.returncode == 1
        assert "before the last boot" in done.stdout.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_an_old_file_can_be_destroyed_and_made_anew(old: str) -> None:
    """Nobody can live in it, so no force is needed."""
    shmcache.destroy(old)
    with shmcache.attach(old, create=CONFIG) as cache:
        assert cache.status([b"a"]) == [Status.NOT_FOUND]
    shmcache.destroy(old)


def test_the_remedy_that_it_names_is_one(old: str) -> None:
    done = run("cleanup", "--force", "--yes", old)
    assert (done.returncode, old in shmcache.arenas()) == (0, False), done.stderr


def test_an_old_file_is_stale(old: str) -> None:
    info = shmcache.inspect(old)
    assert info.problem is not None
    assert info.stale
    dry = run("cleanup", "--stale", "--dry-run")
    (row,) = [line.split() for line in dry.stdout.splitlines() if line.startswith(f"{old} ")]
    assert row[4:6] == ["destroy", "stale:"]


def test_an_old_file_under_a_name_of_a_race(old: str) -> None:
    """Processes that come at once all refuse it."""
    program = f"import shmcache; shmcache.attach({old!r}, create=shmcache.ArenaConfig('1MiB'))"
    crowd = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    for process in crowd:
        _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert "before the last boot" in said or "FingerprintError" in said
