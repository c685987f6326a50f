"""Other processes in the test's arena, and the modules of the benchmarks."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from processes._crew import Member

BENCH = Path(__file__).parents[2] / "tools/bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the bench; none of them stays known, as ``vllm`` would be taken for vLLM."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCH)):
            del sys.modules[name]


@pytest.fixture
def chance() -> random.Random:
    """Random choices, from a seed that a test that fails shows, and that may be given as SHMCACHE_TEST_SEED."""
    seed = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"SHMCACHE_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def start() -> Iterator[Callable[[], Member]]:
    """Starts a process that is in no arena yet; all of them are killed after the test."""
    members: list[Member] = []

    def start_one() -> Member:
        members.append(Member())
        return members[-1]

    yield start_one
    for member in members:
        member.kill()


@pytest.fixture
def enlist(start: Callable[[], Member], arena: str) -> Callable[..., Member]:
    """Starts a process that has attached to the arena: ``enlist(group, rank, world_size)``."""

    def enlist_one(group: str | None = None, rank: int | None = None, world_size: int = 1) -> Member:
        member = start()
        member.attach(arena, group, rank, world_size)
        return member

    return enlist_one
