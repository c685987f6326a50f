"""Somebody truncates a segment under its processes: each call gives ArenaDamagedError or what it has, nobody hangs or
dies, and all can leave. Only who looks at the payload by himself, through a view, dies of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

import pytest
from arena_support import TIMEOUT_S, run_python
from fuzz._cut import CONFIG
from fuzz._segment import Bytes, size_of

import shmcache
from shmcache.segment import path_of

WHOLE: Final = size_of(CONFIG.capacity, CONFIG.block_size, CONFIG.slots, CONFIG.lanes, CONFIG.regions)
PROCESSES: Final = 3


@pytest.fixture
def config() -> shmcache.ArenaConfig:
    return CONFIG


@pytest.fixture
def segment(arena: str) -> Iterator[Bytes]:
    found = Bytes(path_of(arena), arena)
    yield found
    found.close()


@pytest.fixture(scope="module")
def parts() -> dict[str, int]:
    """Where each part of the metadata begins, in an arena of ``CONFIG``."""
    name = f"test-{os.getpid()}-parts"
    shmcache.create(name, CONFIG)
    found = Bytes(path_of(name), name)
    shmcache.destroy(name)
    found.close()
    assert found.size_at_first == WHOLE
    return {part: begin for part, (begin, _) in found.parts.items()}


def check_each_call(name: str, size: int) -> None:
    """``_cut.py`` finds nothing amiss."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fuzz._cut", "each", name, str(size)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        for left in shmcache.arenas():
            if left.startswith(name):
                shmcache.destroy(left, force=True)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``_cut.py`` at work."""
    with subprocess.Popen(
        [sys.executable, "-m", "fuzz._cut", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def check_end(process: subprocess.Popen[str]) -> None:
    """It ended by itself, and found nothing amiss."""
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, f"exit {process.returncode}\n{said}"


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_nothing_is_left(arena_name: str, size: int) -> None:
    check_each_call(arena_name, size)


@pytest.mark.parametrize(
    "part", ["lanes", "layouts", "slots", "scores", "ghosts", "shares", "index", "slot_map", "block_map", "owners"]
)
def test_cut_within_a_part(arena_name: str, parts: dict[str, int], part: str) -> None:
    check_each_call(arena_name, parts[part] + 8)


@pytest.mark.parametrize("left", [0, 1, 4096, CONFIG.capacity // 2, CONFIG.capacity - 1])
def test_cut_within_the_payload(arena_name: str, left: int) -> None:
    check_each_call(arena_name, WHOLE - CONFIG.capacity + left)


def test_cut_in_a_storm(arena: str, segment: Bytes, parts: dict[str, int], fresh_seed: int) -> None:
    chance = random.Random(fresh_seed)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running("storm", arena)) for _ in range(PROCESSES)]
        time.sleep(chance.uniform(0, 0.3))
        segment.resize(chance.choice([0, 1, 4096, *parts.values(), WHOLE - CONFIG.capacity]))
        for process in processes:
            check_end(process)


def test_cut_and_made_whole_again(arena: str, segment: Bytes) -> None:
    """All is zeros: no lane is anybody's."""
    with running("storm", arena) as process:
        segment.resize(0)
        segment.resize(WHOLE)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode in (0, 1), "by no signal: an error of ours, of one kind or another"
    cache = shmcache.inspect(arena)
    assert cache.problem is not None


def test_cut_while_somebody_looks(arena: str, segment: Bytes, fresh_seed: int) -> None:
    chance = random.Random(fresh_seed)
    whole = segment.content()
    with running("look", arena) as process:
        for _ in range(200):
            segment.resize(chance.randrange(WHOLE))
            segment.resize(WHOLE)
            segment.patch(0, whole)
        check_end(process)


LOOKER = """
import faulthandler, os, sys
import shmcache
from shmcache.segment import path_of
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
cache = shmcache.attach(sys.argv[1])
cache.put(b"a", b"a" * 5000)
batch = cache.read([b"a"])
view = batch.views[0]
os.truncate(path_of(sys.argv[1]), 0)
print(bytes(view[:10]))
"""


@pytest.mark.parametrize("handler", ["default", "faulthandler"])
def test_who_looks_at_the_payload_dies(arena: str, handler: str) -> None:
    """As README says: a view is memory, and the memory is gone."""
    done = run_python(LOOKER, arena, handler)
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "faulthandler")


HANDLED = """
import faulthandler, os, sys
import shmcache
from shmcache.segment import path_of
if sys.argv[2] == "before":
    faulthandler.enable()
cache = shmcache.attach(sys.argv[1])
if sys.argv[2] == "after":
    faulthandler.enable()
os.truncate(path_of(sys.argv[1]), 0)
try:
    cache.lookup([b"a"])
except shmcache.ArenaDamagedError:
    print("cut")
cache.close()
"""


@pytest.mark.parametrize("when", ["never", "before", "after"])
def test_other_handlers_of_the_signal(arena: str, when: str) -> None:
    done = run_python(HANDLED, arena, when)
    assert (done.returncode, done.stdout) == (0, "cut\n"), done.stderr
