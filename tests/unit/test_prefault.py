"""What has memory is mapped into a process in the background, from its first view on; holes never get any by that.
And huge pages: where the tmpfs has them, mappings of the payload get them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arena_support import TIMEOUT_S, mappings, run_python

import shmcache
from shmcache import ArenaConfig
from shmcache._binding import ffi, lib
from shmcache.segment import path_of

MIB = 1 << 20
CAPACITY = 128 * MIB
HALF = CAPACITY // 2
BLOCK = 64 * 1024


@pytest.fixture
def half_full(arena_name: str) -> str:
    """An arena with one object, in the first half of its payload; the other half is a hole."""
    shmcache.create(arena_name, ArenaConfig(CAPACITY, block_size=BLOCK, lanes=4))
    with shmcache.attach(arena_name) as cache:
        cache.put(b"half", bytes(HALF))
    return arena_name


def _mapped(name: str, permissions: str) -> int:
    """Bytes of this process's mappings of the arena, with these permissions, that it can use without a fault."""
    spans = {f"{begin:x}-{end:x}" for begin, end, found in mappings(name) if found == permissions}
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", fields[0]):
            within = fields[0] in spans
        elif within and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _first_byte(cache: shmcache.Cache, key: bytes) -> int:
    with cache.read([key]) as batch:
        view = batch.views[0]
        assert view is not None
        return int(view[0])


def _resident(name: str) -> int:
    return path_of(name).stat().st_blocks * 512


def test_a_reader_finds_mapped_what_has_memory_and_holes_stay_holes(half_full: str) -> None:
    before = _resident(half_full)
    assert HALF < before < CAPACITY
    with shmcache.attach(half_full) as cache:
        assert mappings(half_full)
        assert _mapped(half_full, "r--s") == 0, "who reads nothing pays nothing"
        assert _first_byte(cache, b"half") == 0
        _until(lambda: _mapped(half_full, "r--s") >= HALF)
        assert _mapped(half_full, "r--s") == HALF
    assert _resident(half_full) == before


def test_a_writer_does_too_and_writes_without_faults(half_full: str) -> None:
    before = _resident(half_full)
    with shmcache.attach(half_full) as cache:
        with cache.reserve_write([b"more"], BLOCK) as batch:
            view = batch.views[0]
            assert view is not None
            view[0] = 1
            _until(lambda: _mapped(half_full, "rw-s") >= HALF)
            del view
        assert _resident(half_full) <= before + BLOCK
        assert _first_byte(cache, b"more") == 1


def test_it_can_be_left_out(half_full: str) -> None:
    with shmcache.attach(half_full, prefault=False) as cache:
        assert _first_byte(cache, b"half") == 0
        time.sleep(0.05)
        assert _mapped(half_full, "r--s") <= MIB
    for wrong in (1, None, "no"):
        with pytest.raises(TypeError, match="prefault"):
            shmcache.attach(half_full, prefault=wrong)  # type: ignore[arg-type]


def test_a_small_arena_is_worth_no_thread(arena_name: str) -> None:
    shmcache.create(arena_name, ArenaConfig("16MiB", block_size=BLOCK, lanes=4, populate=True))
    threads = Path("/proc/self/task")
    with shmcache.attach(arena_name) as cache:
        cache.put(b"key", b"x")
        before = len(list(threads.iterdir()))
        assert _first_byte(cache, b"key") == ord("x")
        assert len(list(threads.iterdir())) == before


@pytest.fixture
def large(arena_name: str) -> str:
    shmcache.create(arena_name, ArenaConfig("256MiB", block_size=BLOCK, lanes=4, populate=True))
    with shmcache.attach(arena_name, prefault=False) as cache:
        cache.put(b"key", b"x")
    return arena_name


def test_close_does_not_wait_for_the_end_of_it(large: str) -> None:
    """Each time close comes at another moment; the mapping goes, and nothing is touched after."""
    for n in range(40):
        cache = shmcache.attach(large)
        assert _first_byte(cache, b"key") == ord("x")
        time.sleep(n * 0.0005)
        cache.close()
        assert mappings(large) == []
    with shmcache.attach(large) as cache:
        assert cache.verify() == []


def test_a_core_that_is_closed_touches_nothing(large: str) -> None:
    cache = shmcache.attach(large)
    handle: Any = cache._attachment.handle
    cache.close()
    assert lib.sc_prefault(handle, ffi.cast("char *", 4096)) == lib.SC_E_CLOSED


def test_a_segment_that_is_cut_meanwhile(large: str) -> None:
    program = """
import os, sys, shmcache
from shmcache.segment import path_of
for _ in range(2):
    cache = shmcache.attach(sys.argv[1])
    with cache.read([b"key"]) as batch:
        del batch
    if _ == 1:
        os.truncate(path_of(sys.argv[1]), 0)
        try:
            cache.lookup([b"key"])
        except shmcache.ArenaDamagedError:
            print("damaged")
    cache.close()
"""
    done = run_python(program, large)
    assert (done.returncode, done.stdout, done.stderr) == (0, "damaged\n", "")


def test_the_process_may_end_or_fork_at_any_moment_of_it(large: str) -> None:
    program = """
import os, sys, time, shmcache
name, pause_s, fork = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "fork"
cache = shmcache.attach(name)
with cache.read([b"key"]) as batch:
    del batch
time.sleep(pause_s)
if fork:
    child = os.fork()
    if child == 0:
        with shmcache.attach(name) as other:
            assert other.lookup([b"key"]) == 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    cache.close()
"""
    for how in ("end", "fork"):
        for pause_s in ("0", "0.001", "0.005", "0.02"):
            command = [sys.executable, "-W", "ignore", "-c", program, large, pause_s, how]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), how
    with shmcache.attach(large) as cache:
        assert cache.verify() == []
        assert cache.stats().held == 0


def _run_on_tmpfs(options: str, program: str) -> str:
    """What a program prints where ``SHMCACHE_DIRECTORY`` is a tmpfs of its own. Nothing of it is left behind."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no program unshare")
    command = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o mode=755,{options} none /mnt"
    tried = subprocess.run([*command, mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a tmpfs with {options} cannot be mounted here: {tried.stderr.strip()}")
    script = f'{mount} && exec "$0" -c "$1"'
    environment = {**os.environ, "SHMCACHE_DIRECTORY": "/mnt"}
    whole = [*command, script, sys.executable, program]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


HUGE = """
import re, shmcache
from shmcache import ArenaConfig
shmcache.create("kv", ArenaConfig("32MiB", block_size="64KiB", lanes=4, populate=True))
with shmcache.attach("kv") as cache:
    cache.put(b"key", b"x")
    with cache.read([b"key"]) as batch:
        assert bytes(batch.views[0]) == b"x"
    maps = open("/proc/self/smaps").read()
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", maps)
    ours = [b for b in blocks if "shmcache.0.kv" in b and "32768 kB" in b]
    assert len(ours) == 2, ours
    for block in ours:
        assert int(block.split("-")[0], 16) % (2 << 20) == 0, block
        print(block.split()[1], int(re.search(r"ShmemPmdMapped: +([0-9]+)", block)[1]) > 0)
    print(shmcache.inspect("kv").huge)
"""


@pytest.mark.parametrize("option", ["always", "within_size", "advise"])
def test_huge_pages_where_the_tmpfs_has_them(option: str) -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not switch.exists() or "[deny]" in switch.read_text(encoding="ascii"):
        pytest.skip("this kernel has no huge pages for tmpfs, or they are switched off")
    found = _run_on_tmpfs(f"size=64m,huge={option}", HUGE).splitlines()
    assert sorted(found) == sorted(["r--s True", "rw-s True", option])


NEARLY_FULL = """
import os, shmcache
from shmcache import ArenaConfig, ArenaSpaceError

def free():
    found = os.statvfs("/mnt")
    return found.f_bavail * found.f_frsize

def ballast(nbytes):
    fd = os.open("/mnt/ballast", os.O_CREAT | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, nbytes)
    os.close(fd)

config = ArenaConfig(13 * 1024 * 1024 + 65536, block_size="64KiB", lanes=4, slots=256)
shmcache.create("kv", config)
segment = shmcache.inspect("kv").segment_bytes
shmcache.destroy("kv")
ballast(free() - segment - 131072)
for populate in (False, True):
    shmcache.create("kv", ArenaConfig(config.capacity, block_size="64KiB", lanes=4, slots=256, populate=populate))
    with shmcache.attach("kv") as cache:
        for n in range(209):
            cache.put(b"%d" % n, b"x" * 65536)
        assert cache.stats().objects == 209, "what was promised is there, though the last huge page does not fit"
        assert cache.verify() == []
    shmcache.destroy("kv")
os.unlink("/mnt/ballast")
shmcache.create("kv", config)
ballast(free() - 3 * 1024 * 1024 - 20480)
with shmcache.attach("kv") as cache:
    try:
        for n in range(209):
            cache.put(b"%d" % n, b"x" * 65536)
    except ArenaSpaceError:
        print("no space after", "many" if n >= 40 else n)
    for i in range(n):
        with cache.read([b"%d" % i]) as batch:
            assert bytes(batch.views[0]) == b"x" * 65536
    assert cache.verify() == []
"""


@pytest.mark.parametrize("option", ["never", "always", "within_size", "advise"])
def test_a_tmpfs_with_huge_pages_that_is_nearly_full(option: str) -> None:
    assert _run_on_tmpfs(f"size=32m,huge={option}", NEARLY_FULL) == "no space after many\n"
