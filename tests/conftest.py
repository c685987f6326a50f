"""What tests of arenas share: a name that is gone afterwards, a small configuration, caches that get closed."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_double
import cuda_support
import pytest
from arena_support import Join

import shmcache

for _signum in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        # As nohup, or a shell without job control, starts what runs beside it; what tests start would inherit that.
        signal.signal(_signum, lambda *_: None)


@pytest.fixture
def arena_name() -> Iterator[str]:
    """A name that no arena has; what gets it is destroyed after the test."""
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    with contextlib.suppress(shmcache.ArenaNotFoundError):
        shmcache.destroy(name, force=True)


@pytest.fixture
def config() -> shmcache.ArenaConfig:
    """A small arena; parametrize ``config`` for another one."""
    return shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=16)


@pytest.fixture
def arena(arena_name: str, config: shmcache.ArenaConfig) -> str:
    """The name of an arena of ``config`` that nobody is attached to."""
    shmcache.create(arena_name, config)
    return arena_name


@pytest.fixture
def join(arena: str) -> Iterator[Join]:
    """Attaches to ``arena``, as ``attach`` does; what is still open after the test is closed."""
    caches: list[shmcache.Cache] = []

    def attach(group: str | None = None, rank: int | None = None, world_size: int = 1) -> shmcache.Cache:
        caches.append(shmcache.attach(arena, group=group, rank=rank, world_size=world_size))
        return caches[-1]

    yield attach
    while caches:
        caches.pop().close()


@pytest.fixture
def cache(join: Join) -> shmcache.Cache:
    """A cache without a group."""
    return join()


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads take turns as often as Python can make them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=cuda_support.KINDS)
def gpus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """The double, and the real ones. To be named before the caches, which are closed with it."""
    with cuda_support.gpus(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def double(tmp_path: Path) -> Iterator[cuda_double.Double]:
    """For what only the double can be made to do. Nothing is left of its memory."""
    with cuda_support.gpus("double", tmp_path) as found:
        yield found.driver
    assert cuda_double.allocations(tmp_path) == []
