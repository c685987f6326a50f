"""Few slots, hot keys: each slot and block changes hands all the time, while processes read, hold, grant and are
stopped in the middle of it. No reader ever sees a byte of another object, and no share is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from processes._crew import Member
from processes._whole import check_whole

from shmcache import ArenaConfig, Cache

SECONDS = 2.0
KEYS = [b"k", b"key", b"key of more than a word", *(b"%060d" % i for i in range(5))]
WRITER = ["write", "write", "put", "write_and_read", "abandon", "delete", "evict"]
READER = ["read", "read", "read_twice", "wait_and_read", "grant_and_read", "grant_and_give_back"]
FAST = ["read_many", "read_many", "grant_many"]
WATCHER = [*WRITER, *READER, "verify", "reap"]


@pytest.fixture
def members(enlist: Callable[..., Member]) -> list[Member]:
    return [enlist() for _ in range(5)]


def _disturb(members: list[Member], chance: random.Random) -> None:
    """Stops one after the other for a moment, wherever it is; most often the last."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        member = chance.choice([*members, *members[-1:] * 3])
        os.kill(member.pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0, 0.002))
        member.resume()
        time.sleep(chance.uniform(0, 0.002))


@pytest.mark.parametrize(
    "config",
    [
        ArenaConfig("16KiB", block_size="4KiB", slots=2, lanes=8),
        ArenaConfig("32KiB", block_size="4KiB", slots=32, lanes=8),
        ArenaConfig("64KiB", block_size="4KiB", slots=5, lanes=8),
    ],
    ids=["2 slots", "8 blocks", "5 slots"],
)
def test_hot_slots(cache: Cache, members: list[Member], chance: random.Random) -> None:
    for member, operations in zip(members, [WRITER, WRITER, WATCHER, READER, FAST], strict=True):
        member.do("from stress._work import Worker")
        member.begin(f"Worker(cache, {KEYS!r}, {chance.randrange(1 << 32)}).work({operations!r}, {SECONDS})")
    _disturb(members, chance)
    checked = [member.answer() for member in members]
    stats = cache.stats()
    assert all(checked[2:4]), "readers read nothing"
    assert stats.counters.deletes + stats.counters.evictions > 200, "slots were hardly used again"
    assert (stats.reserved, stats.held, stats.writing) == (0, 0, 0)
    assert cache.verify() == []
    assert stats.counters.lock_steals == stats.counters.reaped_shares == 0, "somebody was taken for dead"
    for member in members:
        member.kill()
    check_whole(cache)
