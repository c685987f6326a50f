"""Two engines with one arena and one L2: hits across, deaths, and what is left of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import _support as support
from engine._storm import storm
from engine._support import BLOCK, check_sound, forget, prompt, reset, wait_dead, wait_stored

import shmcache
from shmcache_tools.engine.client import Answer, Engine, Request, shmcache_connector

support.need_vllm()

FULL = 14  #: blocks of a prompt


class Host:
    """The engines ``x`` and ``y``; each is started when it is asked for and not there."""

    def __init__(self, model: Path, arena: str, l2: Path) -> None:
        self.arena = arena
        self.l2 = l2
        self._model = model
        self.running: dict[str, Engine] = {}

    def engines(self, *names: str) -> list[Engine]:
        """All at once, as they start slowly."""
        missing = [name for name in names if name not in self.running]
        threads = [threading.Thread(target=self._start, args=(name,)) for name in missing]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self.running[name] for name in names]

    def _start(self, name: str) -> None:
        connector = shmcache_connector(self.arena, capacity="1GiB", l2=str(self.l2))
        self.running[name] = support.engine(self._model, connector).__enter__()

    def bury(self, *names: str) -> None:
        """They have been killed, or some of their processes have: no process and no lane of theirs stays."""
        for name in names:
            wait_dead(self.running[name])
            self.running.pop(name).close()
        lanes = shmcache.inspect(self.arena).lanes
        alive = {lane.pid for lane in lanes if lane.state == "alive"}
        assert alive == {pid for engine in self.running.values() for pid in support.attached(engine)}
        check_sound(self.arena)

    def close(self) -> None:
        for engine in self.running.values():
            engine.kill("all")
            engine.close()


@pytest.fixture(scope="module")
def host(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with support.new_arena() as arena:
        host = Host(llama, arena, tmp_path_factory.mktemp("l2"))
        yield host
        host.close()


def keep_busy(engine: Engine, arena: str, known: list[int], chance: random.Random) -> list[Request]:
    """Requests that load, compute, store or wait, at some moment of all that."""
    reset(engine)
    requests = [engine.submit(asked, 60) for asked in (known, prompt(), prompt(shared=known[:1000]), known, prompt())]
    support.wait_until(lambda: bool(support.shares(arena)), lambda: "nobody does anything")
    time.sleep(chance.random() * 0.3)
    return requests


def test_hits_across(host: Host) -> None:
    x, y = host.engines("x", "y")
    before = support.stats(host.arena).objects
    for one, other in ((x, y), (y, x)):
        asked = prompt()
        cold = one.generate(asked)
        before += FULL
        wait_stored(host.arena, before)
        loaded = other.generate(asked)
        assert [cold.cached_tokens, loaded.cached_tokens] == [0, FULL * BLOCK]
        assert loaded.tokens == cold.tokens
    support.wait_idle(host.arena)
    assert support.stats(host.arena).objects == before
    check_sound(host.arena)


def test_both_compute_the_same_at_once(host: Host) -> None:
    engines = host.engines("x", "y")
    before = support.stats(host.arena).objects
    prompts = [prompt() for _ in range(3)]
    requests = [[engine.submit(asked) for engine in engines] for asked in prompts]
    found = [[request.result().tokens for request in pair] for pair in requests]
    wait_stored(host.arena, before + 3 * FULL)
    assert support.stats(host.arena).objects == before + 3 * FULL
    for engine in engines:
        forget(engine)
        assert [[engine.generate(asked).tokens] * 2 for asked in prompts] == found
    check_sound(host.arena)


def test_a_worker_is_killed(host: Host, chance: random.Random) -> None:
    x, y = host.engines("x", "y")
    known = prompt()
    cold = x.generate(known)
    wait_stored(host.arena, FULL)
    requests = keep_busy(x, host.arena, known, chance)
    x.kill("worker", chance.randrange(2))
    host.bury("x")
    assert any(request.done() for request in requests)
    assert_hit(y, known, cold)
    (x,) = host.engines("x")
    assert_hit(x, known, cold)
    check_sound(host.arena)


def test_all_are_killed(host: Host, chance: random.Random) -> None:
    """Of one engine the core, with which its workers go; of the other all processes at once."""
    x, y = host.engines("x", "y")
    known = [prompt(), prompt()]
    cold = [engine.generate(asked) for engine, asked in zip((x, y), known, strict=True)]
    support.wait_idle(host.arena)
    for engine, asked in zip((x, y), known, strict=True):
        keep_busy(engine, host.arena, asked, chance)
    x.kill("core")
    y.kill("all")
    host.bury("x", "y")
    (x,) = host.engines("x")
    for asked, answer in zip(known, cold, strict=True):
        assert_hit(x, asked, answer)
    check_sound(host.arena)


def test_l2_only(host: Host) -> None:
    """All that is left is the folder."""
    (x,) = host.engines("x")
    known = prompt()
    cold = x.generate(known)
    wait_stored_in_l2(host.arena)
    x.kill("all")
    names = list(host.running)
    for name in names:
        host.running[name].kill("all")
    host.bury(*names)
    shmcache.destroy(host.arena)
    (x,) = host.engines("x")
    assert_hit(x, known, cold)
    assert support.stats(host.arena).counters.prefetch_l2_hits == FULL
    check_sound(host.arena)


def test_a_storm_of_aborts_with_l2(host: Host, chance: random.Random) -> None:
    """What the arena loses meanwhile is loaded from L2."""
    (x,) = host.engines("x")
    known = [prompt() for _ in range(3)]
    cold = [x.generate(asked) for asked in known]
    wait_stored_in_l2(host.arena)
    contents = support.contents(host.arena)
    before = support.stats(host.arena).counters.prefetch_l2_hits
    with shmcache.attach(host.arena) as cache:
        assert storm(x, chance, known, cache.clear) > 0
    check_sound(host.arena)
    assert support.stats(host.arena).counters.prefetch_l2_hits > before
    for asked, answer in zip(known, cold, strict=True):
        assert_hit(x, asked, answer)
    support.check_same_kv(contents, host.arena)


def assert_hit(engine: Engine, asked: list[int], cold: Answer) -> None:
    """The engine has all blocks without computing them, and goes on as one that computed them."""
    reset(engine)
    found = engine.generate(asked)
    assert found.cached_tokens == FULL * BLOCK
    assert found.tokens == cold.tokens


def wait_stored_in_l2(arena: str) -> None:
    """Until what was published is in the folder."""

    def done() -> bool:
        found = support.stats(arena)
        return not (found.writing or found.held or found.gauges.l2_storing or found.gauges.l2_backlog_bytes)

    support.wait_until(done, lambda: support.stats(arena))
