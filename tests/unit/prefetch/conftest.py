"""A group of four, and no thread that outlives a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from arena_support import Join
from prefetch_support import RANKS
from storage_support import (
    check_no_thread_stays,
)

from shmcache import Cache


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does."""
    yield
    check_no_thread_stays()


@pytest.fixture
def controller(join: Join) -> Cache:
    """A controller of a group of four."""
    return join("engine", None, RANKS)


@pytest.fixture
def ranks(join: Join) -> list[Cache]:
    """The ranks of that group."""
    return [join("engine", rank, RANKS) for rank in range(RANKS)]
