"""An arena that holds less than what engines ask for: TP=2; all loads between steps; what is lost fails its request."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import _support as support
from engine._storm import storm
from engine._support import BLOCK, check_sound, clear, forget, prompt, reset, wait_stored

from shmcache_tools.engine.client import Engine, shmcache_connector

support.need_vllm()

OBJECTS = 20  #: for which the arena has room: one prompt of 14 blocks, and not a second one
OBJECT_BYTES = 4 * 2 * 512 * 4 * BLOCK  #: layers, K and V, hidden, float32, tokens


@pytest.fixture(scope="module")
def lasting_arena() -> Iterator[str]:
    with support.new_arena() as name:
        yield name


@pytest.fixture(scope="module")
def engine(llama: Path, lasting_arena: str) -> Iterator[Engine]:
    connector = shmcache_connector(lasting_arena, capacity=OBJECTS * OBJECT_BYTES, sync_load_bytes=1)
    with support.engine(llama, connector) as engine:
        yield engine
        engine.kill("all")


@pytest.fixture
def arena(engine: Engine, lasting_arena: str) -> Iterator[str]:
    """Empty, as vLLM's own cache is, when the test begins; without a share when it ends."""
    reset(engine)
    clear(lasting_arena)
    yield lasting_arena
    check_sound(lasting_arena)


def test_one_prompt_after_the_other(engine: Engine, arena: str) -> None:
    asked = [prompt() for _ in range(4)]
    cold = [engine.generate(one).tokens for one in asked]
    before = support.stats(arena).counters.evictions
    for _ in range(2):
        for one, tokens in zip(asked, cold, strict=True):
            reset(engine)
            assert engine.generate(one).tokens == tokens
            check_sound(arena)
    found = support.stats(arena)
    assert found.counters.evictions > before
    assert found.objects <= OBJECTS


def test_what_was_asked_last_is_there(engine: Engine, arena: str) -> None:
    old, new = prompt(), prompt()
    engine.generate(old, 1)
    support.wait_idle(arena)
    cold = engine.generate(new)
    wait_stored(arena, 14)
    reset(engine)
    loaded = engine.generate(new)
    assert loaded.cached_tokens == 14 * BLOCK
    assert loaded.tokens == cold.tokens


def test_a_prompt_that_is_larger_than_the_arena(engine: Engine, arena: str) -> None:
    asked = prompt(25 * BLOCK)
    cold = engine.generate(asked)
    support.wait_idle(arena)
    assert 0 < support.stats(arena).objects <= OBJECTS
    forget(engine)
    assert engine.generate(asked).tokens == cold.tokens


def test_many_at_once(engine: Engine, arena: str) -> None:
    asked = [prompt(880) for _ in range(6)]
    alone = [engine.generate(one, 40).tokens for one in asked]
    for _ in range(3):
        reset(engine)
        requests = [engine.submit(one, 40) for one in asked]
        assert [request.result().tokens for request in requests] == alone
        check_sound(arena)


def test_an_object_that_is_lost_fails_its_request(engine: Engine, arena: str) -> None:
    """As vLLM has it where nothing else is stated."""
    asked = prompt()
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    reset(engine)
    with support.rank_that_loads_late(engine, arena, asked) as request:
        support.force_out(arena)
    assert request.result().finish_reason == "error"
    support.wait_idle(arena)
    assert engine.generate(asked).tokens == cold.tokens


def test_an_abort_while_it_is_loaded(engine: Engine, arena: str) -> None:
    asked = prompt()
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    reset(engine)
    with support.rank_that_loads_late(engine, arena, asked) as request:
        request.abort()
    assert request.result().finish_reason == "abort"
    support.wait_idle(arena)
    reset(engine)
    assert engine.generate(asked).tokens == cold.tokens


def test_a_storm_of_aborts(engine: Engine, arena: str, chance: random.Random) -> None:
    stored = [prompt() for _ in range(3)]
    cold, known = [], {}
    for asked in stored:
        cold.append(engine.generate(asked).tokens)
        support.wait_idle(arena)
        known |= support.contents(arena)
    assert storm(engine, chance, stored) > 0
    check_sound(arena)
    for asked, tokens in zip(stored, cold, strict=True):
        reset(engine)
        assert engine.generate(asked).tokens == tokens
        support.wait_idle(arena)
        support.check_same_kv(known, arena)
