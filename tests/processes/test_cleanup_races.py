"""shmcache-cleanup against processes that come, go and die: nobody loses an arena to which he is attached."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from processes._crew import Member
from processes._visits import CONFIG

import shmcache
from shmcache.stats import ArenaInfo
from shmcache_tools.cleanup import __main__ as cleanup

_ROUND_S = 1.0
_ROUNDS = 5
_MOST_ROUNDS = 40
_ENOUGH = 20  #: of each kind of event
_VISITORS = 4
_CLEANERS = 2


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Two names for arenas, which are gone after the test."""
    names = [f"test-{os.getpid()}-{secrets.token_hex(4)}" for _ in range(2)]
    yield names
    for name in names:
        with suppress(shmcache.ArenaNotFoundError):
            shmcache.destroy(name, force=True)


@pytest.fixture
def looked_before(arena: str, monkeypatch: pytest.MonkeyPatch) -> ArenaInfo:
    """What shmcache-cleanup saw, at whatever it looks, is how the arena is now: stale."""
    seen = shmcache.inspect(arena)
    assert seen.stale
    monkeypatch.setattr(cleanup, "look_at_all", lambda: [seen])
    return seen


@pytest.mark.usefixtures("looked_before")
@pytest.mark.parametrize("choice", ["--stale", "--all"])
def test_who_attached_since_the_look_keeps_the_arena(
    arena: str, join: Callable[..., shmcache.Cache], choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = join()
    assert cleanup.main([choice, "--yes"]) == 1
    assert f"process {os.getpid()} " in capsys.readouterr().err
    assert arena in shmcache.arenas()
    cache.put(b"key", b"x")


@pytest.mark.parametrize("arguments", [["--stale"], ["--all"], ["--all", "--force"]])
def test_an_arena_made_anew_since_the_look_stays(
    arena: str, config: shmcache.ArenaConfig, looked_before: ArenaInfo, arguments: list[str]
) -> None:
    shmcache.destroy(arena)
    shmcache.create(arena, config)
    assert cleanup.main([*arguments, "--yes"]) == 0
    assert shmcache.inspect(arena).inode != looked_before.inode


class _Crew:
    """Visitors, of which some are killed, and cleaners; a round at a time."""

    def __init__(self, start: Callable[[], Member], names: list[str], chance: random.Random) -> None:
        self._start, self._names, self._chance = start, names, chance
        self._visitors = [self._recruit() for _ in range(_VISITORS)]
        self._cleaners = [self._recruit() for _ in range(_CLEANERS)]

    def round(self) -> Counter[str]:
        """What they did. Raises what one of them found wrong."""
        for members, work in ((self._visitors, "visit"), (self._cleaners, "clean_up")):
            for member in members:
                member.begin(f"_visits.{work}({self._names}, {self._chance.randrange(1 << 32)}, {_ROUND_S})")
        killed = self._chance.sample(range(_VISITORS), 2)
        for i in killed:
            time.sleep(self._chance.random() * _ROUND_S / 2)
            self._visitors[i].kill()
        survivors = [member for i, member in enumerate(self._visitors) if i not in killed]
        done = Counter[str]()
        for member in [*survivors, *self._cleaners]:
            done += member.answer()
        for i in killed:
            self._visitors[i] = self._recruit()
        return done

    def _recruit(self) -> Member:
        member = self._start()
        member.do("from processes import _visits")
        return member


def test_cleanups_among_processes_that_come_and_go(
    names: list[str], start: Callable[[], Member], chance: random.Random
) -> None:
    crew, done = _Crew(start, names, chance), Counter[str]()
    for number in range(_MOST_ROUNDS):
        done += crew.round()
        if number + 1 >= _ROUNDS and min(done[what] for what in ("visits", "destroyed", "refused")) >= _ENOUGH:
            break
    else:
        pytest.fail(f"too little happened: {done}")
    for name in names:
        shmcache.attach(name, create=CONFIG).close()
    assert cleanup.main([*names, "--yes"]) == 0
    assert not set(names) & set(shmcache.arenas())
