"""What the processes of test_cleanup_races.py do: come and go in arenas, and clean up."""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
from collections import Counter
from collections.abc import Sequence

import shmcache
from shmcache.segment import path_of
from shmcache_tools.cleanup import __main__ as cleanup

CONFIG = shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=16)
_NAP_S = 0.004


def visit(names: Sequence[str], seed: int, seconds: float) -> Counter[str]:
    """Attaches, puts and reads back, detaches, again and again: how often."""
    chance, done = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = chance.choice(names)
        with shmcache.attach(name, create=CONFIG) as cache:
            _stay(cache, chance)
            assert _has_its_name(cache), f"{name} was taken away under a live process"
        done["visits"] += 1
        time.sleep(chance.random() * _NAP_S)
    return done


def _stay(cache: shmcache.Cache, chance: random.Random) -> None:
    for _ in range(chance.randrange(4)):
        key, value = chance.randbytes(16), chance.randbytes(chance.randrange(1, 5000))
        assert cache.put(key, value) == shmcache.Status.OK
        time.sleep(chance.random() * _NAP_S)
        assert _has_its_name(cache), f"{cache.name} was taken away under a live process"
        with cache.read([key]) as batch:
            assert batch.hits == 1, f"{cache.name} lost what was just put"
            assert batch.views[0] == value


def _has_its_name(cache: shmcache.Cache) -> bool:
    """Whether the name still leads to what this process is attached to."""
    try:
        named = path_of(cache.name).stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(cache._attachment.fd))


def clean_up(names: Sequence[str], seed: int, seconds: float) -> Counter[str]:
    """Runs shmcache-cleanup again and again: how often it destroyed, and how often it was refused."""
    chance, done = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cleanup.main([*names, "--yes"])
        told = out.getvalue() + err.getvalue()
        assert len(told.splitlines()) == len(names), told
        assert code == int(bool(err.getvalue())), told
        done["destroyed"] += told.count(": destroyed (stale")
        done["refused"] += len(err.getvalue().splitlines())
        time.sleep(chance.random() * _NAP_S)
    return done
