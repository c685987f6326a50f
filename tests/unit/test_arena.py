"""Arenas by name: what is made, found, refused and removed, whatever lies in the way or became of the file."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, contents, descriptors, mappings, pattern, run_python

import shmcache
from shmcache import (
    ArenaBusyError,
    ArenaConfig,
    ArenaDamagedError,
    ArenaExistsError,
    ArenaNotFoundError,
    ArenaPermissionError,
    ArenaSpaceError,
    ArenaVersionError,
    FingerprintError,
    GroupError,
    LaneInUseError,
    NoLaneError,
    Status,
)
from shmcache.segment import path_of

OK = Status.OK

FORMAT_AT = 8  #: the offset of the header's format word
CHECKED = [*range(112), *range(128, 392)]  #: the offsets of the header's bytes that its checksum, or itself, covers
CHECKSUM = range(104, 112)


@pytest.fixture
def path(arena_name: str) -> Iterator[Path]:
    """Where the arena's file would be, for something else; that is removed after the test."""
    path = path_of(arena_name)
    yield path
    if path.is_dir() and not path.is_symlink():
        path.rmdir()


def overwrite(name: str, at: int, data: bytes) -> None:
    with path_of(name).open("r+b") as file:
        file.seek(at)
        file.write(data)


# Creating and destroying


def test_an_arena_is_there_from_create_to_destroy(arena_name: str, config: ArenaConfig) -> None:
    before = descriptors()
    assert arena_name not in shmcache.arenas()
    shmcache.create(arena_name, config)
    assert arena_name in shmcache.arenas()
    assert shmcache.arenas() == sorted(shmcache.arenas())
    assert path_of(arena_name).stat().st_mode & 0o777 == 0o600
    shmcache.destroy(arena_name)
    assert arena_name not in shmcache.arenas()
    assert not path_of(arena_name).exists()
    assert descriptors() == before
    assert mappings(arena_name) == []


def test_creating_what_is_there(arena: str, config: ArenaConfig) -> None:
    before = descriptors()
    with pytest.raises(ArenaExistsError, match=arena):
        shmcache.create(arena, config)
    assert descriptors() == before


@pytest.mark.parametrize("call", [shmcache.attach, shmcache.destroy, shmcache.inspect])
def test_an_arena_that_is_not_there(arena_name: str, call: Callable[[str], object]) -> None:
    with pytest.raises(ArenaNotFoundError, match=arena_name):
        call(arena_name)


def test_destroying_while_somebody_is_attached(arena: str, join: Join) -> None:
    cache = join()
    with pytest.raises(ArenaBusyError, match=str(os.getpid())):
        shmcache.destroy(arena)
    assert cache.put(b"k", b"x") == OK
    cache.close()
    shmcache.destroy(arena)
    assert arena not in shmcache.arenas()


def test_who_is_attached_keeps_what_a_forced_destroy_removes(arena: str, join: Join, config: ArenaConfig) -> None:
    old = join()
    old.put(b"k", b"old")
    shmcache.destroy(arena, force=True)
    with pytest.raises(ArenaNotFoundError):
        shmcache.attach(arena)
    assert old.put(b"l", b"old, too") == OK
    with shmcache.attach(arena, create=config) as new, old.read([b"k", b"l"]) as found:
        assert new.status([b"k", b"l"]) == [Status.NOT_FOUND] * 2
        assert contents(found) == [b"old", b"old, too"]
    assert old.verify() == []


def test_populate_touches_every_page(arena_name: str) -> None:
    shmcache.create(arena_name, ArenaConfig("8MiB", block_size="4KiB", populate=True))
    with shmcache.attach(arena_name) as cache:
        resident = cache.stats().resident_bytes
        assert resident >= 8 << 20
        assert cache.put(b"k", pattern(b"k", 8 << 20)) == OK
        assert cache.stats().resident_bytes == resident
        assert cache.verify() == []


def test_memory_is_allocated_when_it_is_first_reserved(cache: shmcache.Cache) -> None:
    before = cache.stats().resident_bytes
    with cache.reserve_write([b"k"], 100 * 4096):
        grown = cache.stats().resident_bytes - before
    assert 100 * 4096 <= grown < 256 * 4096


# Attaching


def test_the_geometry_of_what_is_there_wins(arena: str) -> None:
    other = ArenaConfig("2MiB", block_size="8KiB", slots=7, lanes=3)
    with shmcache.attach(arena, create=other) as cache:
        stats = cache.stats()
        assert (stats.capacity, stats.block_size, stats.slots) == (1 << 20, 4096, 256)


def test_attach_creates_what_is_not_there(arena_name: str, config: ArenaConfig) -> None:
    with shmcache.attach(arena_name, create=config) as cache:
        assert cache.stats().capacity == config.capacity
    assert arena_name in shmcache.arenas()


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", fingerprint="modèle-7b/bf16")])
def test_fingerprints(arena: str, config: ArenaConfig) -> None:
    before = descriptors()
    shmcache.attach(arena).close()
    shmcache.attach(arena, fingerprint="modèle-7b/bf16").close()
    shmcache.attach(arena, create=config).close()
    refused: list[dict[str, Any]] = [
        {"fingerprint": "modèle-8b/bf16"},
        {"fingerprint": ""},
        {"create": ArenaConfig("1MiB", block_size="4KiB")},
        {"create": config, "fingerprint": "another"},
    ]
    for options in refused:
        with pytest.raises(FingerprintError, match="modèle-7b/bf16"):
            shmcache.attach(arena, **options)
    other = ArenaConfig("1MiB", block_size="4KiB", fingerprint="another")
    shmcache.attach(arena, create=other, fingerprint="modèle-7b/bf16").close()
    assert shmcache.inspect(arena).fingerprint == "modèle-7b/bf16"
    assert descriptors() == before


@pytest.mark.parametrize("config", [ArenaConfig("64KiB", block_size="4KiB", lanes=2)])
def test_every_lane_taken(arena: str, join: Join) -> None:
    join()
    other = join()
    before = descriptors()
    with pytest.raises(NoLaneError, match=arena):
        join()
    assert descriptors() == before
    other.close()
    join()


def test_a_rank_belongs_to_one_process(arena: str, join: Join) -> None:
    first = join("engine", 0, 2)
    before = descriptors()
    with pytest.raises(LaneInUseError, match=f"process {os.getpid()} "):
        join("engine", 0, 2)
    assert descriptors() == before
    lanes = {first.lane, join("engine", 1, 2).lane, join("another", 0, 2).lane, join("engine", None, 2).lane}
    lanes.add(join("engine", None, 2).lane)
    assert len(lanes) == 5
    first.close()
    assert join("engine", 0, 2).lane == first.lane
    assert {lane.index for lane in shmcache.inspect(arena).lanes if lane.state == "alive"} == lanes


def test_a_group_states_one_world_size(join: Join) -> None:
    rank = join("engine", 0, 2)
    for stated in (1, 3):
        with pytest.raises(GroupError, match="engine"):
            join("engine", None, stated)
    join("another", 0, 3)
    rank.close()
    controller = join("engine", None, 3)
    assert controller.world_size == 3
    with pytest.raises(GroupError):
        join("engine", 0, 2)


def test_what_a_cache_says_of_itself(join: Join) -> None:
    private, rank, controller = join(), join("engine", 1, 2), join("engine", None, 2)
    assert (private.group, private.rank, private.world_size) == (None, 0, 1)
    assert (rank.group, rank.rank, rank.world_size) == ("engine", 1, 2)
    assert (controller.group, controller.rank, controller.world_size) == ("engine", None, 2)
    assert "rank=1 of 2" in repr(rank)


# Arguments

BAD_NAMES: list[Any] = ["", ".hidden", "a/b", "x" * 65, "é", "a b", None, 7, b"name"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("call", ["create", "attach", "destroy", "inspect"])
def test_names_that_no_arena_has(name: Any, call: str, config: ArenaConfig) -> None:
    arguments = (name, config) if call == "create" else (name,)
    with pytest.raises((TypeError, ValueError), match="name of an arena"):
        getattr(shmcache, call)(*arguments)


BAD_MEMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"group": 1}, TypeError, "group"),
    ({"group": b"engine"}, TypeError, "group"),
    ({"group": "", "rank": 0}, ValueError, "group"),
    ({"group": "x" * 65, "rank": 0}, ValueError, "group"),
    ({"group": "é" * 33, "rank": 0}, ValueError, "group"),
    ({"group": "a\nb", "rank": 0}, ValueError, "group"),
    ({"group": "\udc80", "rank": 0}, ValueError, "group"),
    ({"group": "engine", "rank": "0"}, TypeError, "rank"),
    ({"group": "engine", "rank": True}, TypeError, "rank"),
    ({"group": "engine", "rank": 0.0}, TypeError, "rank"),
    ({"group": "engine", "rank": -1, "world_size": 2}, ValueError, "rank"),
    ({"group": "engine", "rank": 2, "world_size": 2}, ValueError, "rank"),
    ({"rank": 1}, ValueError, "rank"),
    ({"world_size": 2}, ValueError, "world_size"),
    ({"group": "engine", "world_size": 0}, ValueError, "world_size"),
    ({"group": "engine", "world_size": -1}, ValueError, "world_size"),
    ({"group": "engine", "world_size": 257}, ValueError, "world_size"),
    ({"group": "engine", "world_size": None}, TypeError, "world_size"),
    ({"group": "engine", "world_size": True}, TypeError, "world_size"),
    ({"group": "engine", "world_size": 2.0}, TypeError, "world_size"),
    ({"create": {"capacity": "1MiB"}}, TypeError, "create"),
    ({"create": True}, TypeError, "create"),
    ({"fingerprint": b"bytes"}, TypeError, "fingerprint"),
    ({"fingerprint": "x" * 257}, ValueError, "fingerprint"),
]


@pytest.mark.parametrize(("options", "error", "what"), BAD_MEMBERS)
def test_wrong_options_of_attach(arena: str, options: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=f"^{what}: expected"):
        shmcache.attach(arena, **options)
    assert shmcache.inspect(arena).lanes == ()


@pytest.mark.parametrize("config", [None, "1MiB", {"capacity": "1MiB"}, 1 << 20])
def test_create_takes_a_config_only(arena_name: str, config: Any) -> None:
    with pytest.raises(TypeError, match="^config: expected an ArenaConfig"):
        shmcache.create(arena_name, config)


@pytest.mark.parametrize("force", ["no", 1, None])
def test_destroy_takes_a_bool_only(arena: str, force: Any) -> None:
    with pytest.raises(TypeError, match="^force: expected bool"):
        shmcache.destroy(arena, force=force)
    assert arena in shmcache.arenas()


@pytest.mark.parametrize("group", ["x" * 64, "é" * 32, "7", "engine 0 (blue)"])
def test_group_names(arena: str, join: Join, group: str) -> None:
    join(group, 0, 1)
    assert [lane.group for lane in shmcache.inspect(arena).lanes] == [group]


# What lies in the way


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "shmcache-test-no-such-file")


def linked(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def looping(path: Path) -> None:
    path.symlink_to(path)


OBSTACLES = [dangling, linked, looping, os.mkfifo, Path.mkdir]


@pytest.mark.parametrize("put_there", OBSTACLES)
def test_what_is_no_file_is_neither_followed_nor_opened(
    arena_name: str, path: Path, config: ArenaConfig, put_there: Callable[[Path], None]
) -> None:
    put_there(path)
    before = descriptors()
    with pytest.raises(ArenaExistsError):
        shmcache.create(arena_name, config)
    for call in (shmcache.attach, shmcache.inspect, shmcache.destroy):
        with pytest.raises(ArenaPermissionError, match="regular file"):
            call(arena_name)
    with pytest.raises(ArenaPermissionError, match="regular file"):
        shmcache.attach(arena_name, create=config)
    assert arena_name not in shmcache.arenas()
    assert os.path.lexists(path), "only force removes it"
    assert descriptors() == before


@pytest.mark.parametrize("put_there", OBSTACLES[:-1])
def test_force_removes_what_is_no_file_but_not_what_it_points_to(
    arena_name: str, path: Path, put_there: Callable[[Path], None]
) -> None:
    put_there(path)
    shmcache.destroy(arena_name, force=True)
    assert not os.path.lexists(path)
    assert Path("/etc/hostname").exists()


def test_force_does_not_remove_a_directory(arena_name: str, path: Path) -> None:
    path.mkdir()
    with pytest.raises(ArenaPermissionError):
        shmcache.destroy(arena_name, force=True)
    assert path.is_dir()


def test_a_link_to_another_arena_is_not_followed(arena: str, path: Path) -> None:
    name = arena + "-link"
    link = path_of(name)
    link.symlink_to(path)
    try:
        with pytest.raises(ArenaPermissionError):
            shmcache.attach(name)
        shmcache.destroy(name, force=True)
        assert arena in shmcache.arenas()
    finally:
        link.unlink(missing_ok=True)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602, 0o400, 0o000])
def test_a_file_of_another_mode_is_refused(arena: str, path: Path, mode: int) -> None:
    path.chmod(mode)
    if mode & 0o077 == 0 and os.access(path, os.W_OK):
        pytest.skip("needs a user without the right to open any file, so not root")
    for call in (shmcache.attach, shmcache.destroy):
        with pytest.raises(ArenaPermissionError, match=f"{mode:04o}|let this user in"):
            call(arena)
    assert path.exists()
    shmcache.destroy(arena, force=True)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 4096, pattern(b"noise", 3 << 20)])
def test_a_foreign_file_is_damaged(arena_name: str, path: Path, config: ArenaConfig, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)
    is_refused(arena_name, config, ArenaDamagedError)
    assert path.read_bytes() == content


def is_refused(name: str, config: ArenaConfig, error: type[Exception]) -> str:
    """Nothing but inspect takes what is under this name; returns inspect's word on it."""
    before = descriptors()
    with pytest.raises(ArenaExistsError):
        shmcache.create(name, config)
    with pytest.raises(error, match=name) as caught:
        shmcache.attach(name)
    with pytest.raises(error):
        shmcache.attach(name, create=config)
    with pytest.raises(error):
        shmcache.destroy(name)
    info = shmcache.inspect(name)
    assert info.problem == str(caught.value)
    assert (info.stats, info.lanes, info.lock, info.stale) == (None, (), None, False)
    assert info.segment_bytes == path_of(name).stat().st_size
    assert name in shmcache.arenas()
    del caught
    assert descriptors() == before
    assert mappings(name) == []
    return info.problem


@pytest.mark.parametrize("cut", [0, 100, 4095, 4096, 2 << 20, -1, 1, 4096 << 10])
def test_a_file_of_another_length_is_damaged(arena: str, path: Path, config: ArenaConfig, cut: int) -> None:
    whole = path.stat().st_size
    os.truncate(path, cut if 0 <= cut != 1 else whole + cut)
    is_refused(arena, config, ArenaDamagedError)
    shmcache.destroy(arena, force=True)
    assert arena not in shmcache.arenas()


@pytest.mark.parametrize("version", [0, 1, 99])
def test_another_format_is_refused_by_name(arena: str, config: ArenaConfig, version: int) -> None:
    with path_of(arena).open("rb") as file:
        own = struct.unpack_from("<4H", file.read(64), FORMAT_AT)
    overwrite(arena, FORMAT_AT, struct.pack("<4H", version, *own[1:]))
    problem = is_refused(arena, config, ArenaVersionError)
    assert f"expected memory format version {own[0]} " in problem
    assert f"found version {version} " in problem
    shmcache.destroy(arena, force=True)
    assert arena not in shmcache.arenas()


def test_every_byte_of_the_header_is_checked(arena: str, config: ArenaConfig, path: Path) -> None:
    header = path.read_bytes()[:512]
    for at in CHECKED:
        overwrite(arena, at, bytes([header[at] ^ 0x40]))
        error = ArenaVersionError if FORMAT_AT <= at < FORMAT_AT + 8 else ArenaDamagedError
        with pytest.raises(error):
            shmcache.attach(arena)
        assert shmcache.inspect(arena).problem, f"byte {at}"
        overwrite(arena, at, header[at : at + 1])
    shmcache.attach(arena, create=config).close()
    assert {*CHECKSUM} < {*CHECKED}


# Inspecting


def test_inspect_takes_no_lane_and_changes_nothing(arena: str, join: Join, path: Path) -> None:
    join().put(b"k", b"x")
    join("engine", 1, 2)
    before = path.read_bytes()
    info = shmcache.inspect(arena)
    assert path.read_bytes() == before
    assert info.problem is None
    assert not info.stale
    assert [(lane.role, lane.group, lane.rank, lane.state) for lane in info.lanes] == [
        ("private", "", 0, "alive"),
        ("rank", "engine", 1, "alive"),
        ("rank", "engine", 0, "vacant"),
    ]
    assert info.lanes[0].pid == os.getpid()
    assert (info.lane_limit, info.read_lease_s, info.write_lease_s, info.lock_timeout_s) == (16, 300, 600, 5)
    assert info.stats is not None
    assert (info.stats.objects, info.stats.lanes_alive, info.stats.capacity) == (1, 2, 1 << 20)
    assert info.as_dict()["stats"]["objects"] == 1


def test_an_arena_is_stale_while_nobody_is_attached(arena: str, join: Join) -> None:
    assert shmcache.inspect(arena).stale
    cache = join()
    assert not shmcache.inspect(arena).stale
    cache.close()
    assert shmcache.inspect(arena).stale


# Overwrites an arena's metadata behind the header's constant part, again and again, and looks.
NOISE = """
import random, sys, shmcache
from shmcache.segment import path_of
rng = random.Random(int(sys.argv[2]))
metadata = 700_000
for _ in range(20):
    with path_of(sys.argv[1]).open("r+b") as file:
        for _ in range(rng.choice([1, 100, 5000])):
            file.seek(rng.randrange(512, metadata))
            file.write(rng.choice([rng.randbytes(8), b"\\xff" * 8, b"\\0" * 8, rng.randbytes(64)]))
    info = shmcache.inspect(sys.argv[1])
    assert info.problem is None and info.stats is not None
    repr(info.as_dict())
"""


def test_inspect_bears_any_damage(arena: str, join: Join) -> None:
    cache = join("engine", 0, 2)
    for i in range(100):
        cache.put(b"%d" % i, b"x" * 5000)
    cache.reserve_read([b"%d" % i for i in range(50)], 1)
    cache.close()
    seed = random.SystemRandom().randrange(2**32)
    print(f"{seed=}")
    done = run_python(NOISE, arena, str(seed))
    assert (done.returncode, done.stderr) == (0, "")


# Memory that is not there


def test_a_capacity_beyond_what_is_free(arena_name: str) -> None:
    before = descriptors()
    for capacity in (1 << 46, 1 << 51):
        with pytest.raises(ArenaSpaceError) as caught:
            shmcache.create(arena_name, ArenaConfig(capacity, block_size="1GiB"))
        found = re.search(r"needs ([0-9,]+) bytes .* has ([0-9,]+) free; .* remount", str(caught.value))
        assert found is not None
        needed, free = (int(number.replace(",", "")) for number in found.groups())
        assert needed >= capacity > free
    assert arena_name not in shmcache.arenas()
    assert descriptors() == before


SMALL_DEV_SHM = "mount -t tmpfs -o size=8m none /dev/shm && exec {python} -c '{program}'"


def run_with_small_dev_shm(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program (without single quotes) where /dev/shm is a tmpfs of 8 MiB of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no program unshare")
    command = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*command, "mount -t tmpfs none /dev/shm"], capture_output=True, check=False).returncode:
        pytest.skip("unshare may not make a mount namespace here")
    script = SMALL_DEV_SHM.format(python=sys.executable, program=program)
    return subprocess.run([*command, script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


RUNS_OUT_LATER = """
import pathlib, shmcache
from shmcache import ArenaConfig, ArenaSpaceError, Status
cache = shmcache.attach("full", create=ArenaConfig("6MiB", block_size="4KiB", lanes=16))
assert cache.put(b"there", b"t" * 4096) == Status.OK
ballast = pathlib.Path("/dev/shm/ballast")
try:
    ballast.write_bytes(bytes(16 << 20))
except OSError:
    pass

def refused(call):
    try:
        call()
    except ArenaSpaceError as error:
        assert "full" in str(error) and "remount" in str(error), error
        stats = cache.stats()
        assert (stats.writing, stats.objects, stats.used_bytes) == (0, 1, 4096), stats
        assert cache.verify() == []
        return
    raise AssertionError("there is memory")

keys = [b"%d" % i for i in range(100)]
for _ in range(3):
    refused(lambda: cache.put(b"k", bytes(1 << 20)))
    refused(lambda: cache.reserve_write(keys, 5000))
    refused(lambda: cache.reserve_write([b"there", *keys], 5000, temporary=True))
assert cache.status([b"k", *keys]) == [Status.NOT_FOUND] * 101
with cache.read([b"there"]) as batch:
    assert bytes(batch.views[0]) == b"t" * 4096
assert cache.delete([b"there"]) == [Status.OK]
ballast.unlink()
assert cache.put(b"k", b"k" * (1 << 20)) == Status.OK
with cache.reserve_write(keys, 5000) as batch:
    for view in batch.views:
        view[:] = bytes(5000)
assert cache.lookup(keys) == 100
assert cache.verify() == []
cache.close()
for populate in (False, True):
    try:
        shmcache.create("more", ArenaConfig("8MiB", block_size="4KiB", populate=populate))
    except ArenaSpaceError as error:
        assert "remount" in str(error)
    else:
        raise AssertionError("there is memory")
assert shmcache.arenas() == ["full"]
shmcache.destroy("full")
print(sorted(path.name for path in pathlib.Path("/dev/shm").iterdir()))
"""


def test_memory_that_runs_out_later_is_an_error_and_nothing_stays_reserved() -> None:
    done = run_with_small_dev_shm(RUNS_OUT_LATER)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_cycle_of_a_cache_and_its_batches_can_be_collected(arena: str) -> None:
    """The order in which a cycle's parts are finalized is anybody's guess: none may use what another has freed."""
    program = """
import gc, sys, shmcache
for _ in range(100):
    cache = shmcache.attach(sys.argv[1])
    cycle = [cache._attachment.handle, cache, cache.reserve_write([b"key"], 10), cache.read([b"other"])]
    cycle.append(cycle)
    del cache, cycle
    gc.collect()
"""
    done = run_python(program, arena)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with shmcache.attach(arena) as cache:
        assert cache.verify() == []
        assert cache.stats().writing == 0
