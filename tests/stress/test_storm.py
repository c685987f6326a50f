"""Processes of every part die at any moment, many a second, and are replaced at once: those who live are never
disturbed, and at the end nothing is left of the dead."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from processes._crew import Member
from processes._whole import check_whole

import shmcache
from shmcache import ArenaConfig, Cache, Status

SECONDS = 8.0
WORLD_SIZE = 2
KEYS = [b"%d" % i for i in range(40)]
KEPT = [b"kept %d" % i for i in range(4)]
READ = ["read", "read", "read_twice", "wait_and_read"]
RANK = [*READ, "give_back", "write"]
CONTROLLER = ["grant", "write_and_grant", "take_back", "delete_by_force", "verify"]
ALONE = [*READ, "write", "put", "abandon", "delete", "evict", "reap", "verify"]

Part = tuple[str | None, int | None, list[str]]  #: group, rank, operations
PARTS: list[Part] = [
    *(("engine", rank, RANK) for rank in range(WORLD_SIZE)),
    *[("engine", None, CONTROLLER)] * 2,
    *[(None, None, ALONE)] * 2,
]


class Storm:
    """Workers that are killed and replaced."""

    def __init__(self, arena: str, start: Callable[[], Member], chance: random.Random) -> None:
        self._arena = arena
        self._start = start
        self._chance = chance
        self._workers: list[Member] = []
        self.deaths = 0
        for part in PARTS:
            self._workers.append(self._worker(*part))

    def _worker(self, group: str | None, rank: int | None, operations: list[str]) -> Member:
        member = self._start()
        member.do("from stress._work import Worker")
        member.attach(self._arena, group, rank, WORLD_SIZE if group else 1)
        seed = self._chance.randrange(1 << 32)
        member.begin(f"Worker(cache, {KEYS!r}, {seed}).work({operations!r}, 600)")
        return member

    def strike(self) -> None:
        """Kills one, perhaps after it stood still, and starts its successor."""
        i = self._chance.randrange(len(self._workers))
        member = self._workers[i]
        if not member.busy:
            pytest.fail(f"a worker ended: {member.answer()}")
        if self._chance.random() < 0.3:
            member.stop()
            time.sleep(self._chance.uniform(0, 0.01))
        member.kill()
        self.deaths += 1
        self._workers[i] = self._worker(*PARTS[i])
        time.sleep(self._chance.uniform(0, 0.01))

    def end(self) -> None:
        """Kills all."""
        for member in self._workers:
            assert member.busy, member.answer()
            member.kill()


@pytest.mark.parametrize("config", [ArenaConfig("256KiB", block_size="4KiB", slots=24, lanes=12)])
def test_storm(arena: str, cache: Cache, start: Callable[[], Member], chance: random.Random) -> None:
    for key in KEPT:
        assert cache.put(key, key * 100) == Status.OK
    with cache.read(KEPT[:2]) as held:
        assert cache.reserve_read(KEPT[2:]) == [Status.OK] * 2
        storm = Storm(arena, start, chance)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            storm.strike()
            assert [bytes(view or b"") for view in held.views] == [key * 100 for key in KEPT[:2]]
            assert cache.lookup(KEPT) == len(KEPT), "an object with shares of the living left"
        storm.end()
    assert cache.finish_read(KEPT[2:]) == [Status.OK] * 2
    print(f"{storm.deaths} deaths, {cache.stats().counters}")
    assert storm.deaths > len(PARTS)
    cache.reap()
    assert (cache.stats().held, cache.stats().writing) == (0, 0)
    # Grants to ranks that died before their controllers did wait for a successor; another group size ends them.
    shmcache.attach(arena, group="engine", rank=0, world_size=1).close()
    check_whole(cache)
