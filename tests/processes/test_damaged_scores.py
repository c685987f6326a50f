"""Scores that somebody wrote over: what is worth most by mistake can still be evicted, and a use mends it."""

from __future__ import annotations

import struct
import time

import pytest
from processes._segment import Segment

from shmcache import ArenaConfig, Cache, Status

BLOCK = 4096
SLOTS = 16


@pytest.fixture
def config() -> ArenaConfig:
    return ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=SLOTS, lanes=2)


def write_over(cache: Cache, score: int) -> None:
    """All scores."""
    Segment(cache.name).overwrite("scores", struct.pack("<Q", score))


@pytest.mark.parametrize("score", [2**64 - 1, 2**64 - 2, 0, 1])
def test_there_is_room_for_what_needs_a_run(cache: Cache, score: int) -> None:
    for number in range(SLOTS):
        assert cache.put(b"%d" % number, b"x") is Status.OK
    write_over(cache, score)
    assert cache.put(b"wide", bytes(2 * BLOCK)) is Status.OK
    assert cache.verify() == []


@pytest.mark.parametrize("score", [2**64 - 1, 2**63, 3, 2])
def test_a_use_mends_it(cache: Cache, score: int) -> None:
    cache.put(b"a", b"a")
    cache.put(b"b", b"b")
    write_over(cache, score)
    for _ in range(3):
        for key in (b"a", b"b"):
            cache.touch([key])
            time.sleep(0.01)
    assert cache.evict(1) == BLOCK
    assert (cache.lookup([b"a"]), cache.lookup([b"b"])) == (0, 1)
