"""Every view of shmcache-stat while arenas come, go, break and lose their processes under it."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from processes._crew import Member

import shmcache
from shmcache.segment import path_of
from shmcache_tools.stat import __main__ as stat
from shmcache_tools.stat.documents import JSON_SCHEMA

SECONDS = 8.0
NAMES = 3
CREW = 4

# What each of the crew does until it is killed: makes arenas, lives in them, destroys them.
LIFE = """
import random, time, shmcache
def live(names, seed):
    rng = random.Random(seed)
    batches = []
    while True:
        name = rng.choice(names)
        config = shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=rng.choice([4, 8, 64]))
        try:
            cache = shmcache.attach(name, create=config, group=rng.choice(["a", "b", None]))
            keys = [b"%d" % rng.randrange(300) for _ in range(20)]
            for key in keys:
                cache.put(key, b"x" * rng.randrange(1, 20000))
            batches.append(cache.read(keys))
            batches.append(cache.reserve_write([b"w%d" % rng.randrange(9)], 5000))
            cache.reserve_read(keys[:5])
            if rng.random() < 0.5:
                batches[-2].release()
                batches[-1].abort()
                cache.close()
            if rng.random() < 0.5:
                shmcache.destroy(name, force=rng.random() < 0.5)
        except shmcache.ShmcacheError:
            pass
"""


@pytest.fixture
def names(arena_name: str) -> Iterator[list[str]]:
    """Names of arenas that are gone after the test, whatever they are then."""
    names = [f"{arena_name}-{i}" for i in range(NAMES)]
    yield names
    for name in names:
        with suppress(shmcache.ArenaNotFoundError):
            shmcache.destroy(name, force=True)


def run(*arguments: str) -> tuple[int, str, str]:
    """The program in this process: exit code, output, complaints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = stat.main(arguments)
    return code, out.getvalue(), err.getvalue()


def check(names: list[str], chance: random.Random, folder: Path) -> None:
    """One look, in some way: what comes is a view or one line that says why not."""
    name = chance.choice(names)
    view = chance.choice([[], ["--shares"], ["--map"]])
    way = chance.choice([[], ["--json"]])
    if "--map" in view and chance.random() < 0.1:
        way = ["--output", str(folder / "map.svg")]
    code, out, err = run(*chance.choice([[], [name]]), *view, *way)
    assert code in (0, 1), (view, way)
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 1, err
    assert out or err
    if way == ["--json"] and out:
        assert json.loads(out)["schema"] == JSON_SCHEMA


def damage(name: str, chance: random.Random) -> None:
    """Cuts an arena, or overwrites some of it, as a stray tool would."""
    with suppress(FileNotFoundError), path_of(name).open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return
        if chance.random() < 0.3:
            file.truncate(chance.randrange(size))
        else:
            file.seek(chance.randrange(min(size, 1 << 20)))
            file.write(chance.randbytes(chance.choice([8, 64, 4096])))


@pytest.mark.parametrize("harm", [False, True], ids=["whole", "damaged"])
def test_every_view_in_a_storm(
    names: list[str], start: Callable[[], Member], chance: random.Random, tmp_path: Path, harm: bool
) -> None:
    def enlist() -> Member:
        member = start()
        member.do(LIFE)
        member.begin(f"live({names!r}, {chance.randrange(1 << 32)})")
        return member

    crew = [enlist() for _ in range(CREW)]
    looks, deadline = 0, time.monotonic() + SECONDS
    while time.monotonic() < deadline or looks < 20:
        i = chance.randrange(CREW)
        match chance.randrange(8):
            case 0:
                crew[i].kill()
                crew[i] = enlist()
            case 1:
                # Not stop(), which waits until it is: what was damaged under it may have ended it.
                os.kill(crew[i].pid, signal.SIGSTOP)
                check(names, chance, tmp_path)
                crew[i].resume()
            case 2 if harm:
                damage(chance.choice(names), chance)
            case _:
                check(names, chance, tmp_path)
                looks += 1
    print(f"{looks} looks")
