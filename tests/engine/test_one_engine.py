"""One engine and its arena: GQA, TP=2; prompts in chunks; loads within a step; what is lost is computed again."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import _support as support
from engine._storm import storm
from engine._support import BLOCK, clear, contents, forget, metric, prompt, reset, wait_stored

from shmcache_tools.engine.client import Engine, shmcache_connector

support.need_vllm()


@pytest.fixture(scope="module")
def lasting_arena() -> Iterator[str]:
    with support.new_arena() as name:
        yield name


@pytest.fixture(scope="module")
def engine(gqa: Path, lasting_arena: str) -> Iterator[Engine]:
    connector = {**shmcache_connector(lasting_arena, capacity="1GiB"), "kv_load_failure_policy": "recompute"}
    with support.engine(gqa, connector) as engine:
        yield engine
        engine.kill("all")


@pytest.fixture
def arena(engine: Engine, lasting_arena: str) -> Iterator[str]:
    """Empty, as vLLM's own cache is, when the test begins; without a share when it ends."""
    reset(engine)
    clear(lasting_arena)
    yield lasting_arena
    support.check_sound(lasting_arena)


def test_same_tokens(engine: Engine, arena: str) -> None:
    asked = prompt()
    cold = engine.generate(asked)
    again = engine.generate(asked)
    wait_stored(arena, 14)
    assert support.stats(arena).objects == 14
    forget(engine)
    before = support.stats(arena).counters.claims
    loaded = engine.generate(asked)
    assert [cold.cached_tokens, again.cached_tokens, loaded.cached_tokens] == [0, 14 * BLOCK, 14 * BLOCK]
    assert cold.tokens == again.tokens == loaded.tokens
    assert support.stats(arena).counters.claims - before == 14 * 2


def test_same_bytes(engine: Engine, arena: str) -> None:
    support.check_same_bytes(engine, arena, prompt(), 14)


def test_stored_again_from_what_was_loaded(engine: Engine, arena: str) -> None:
    support.check_stored_again(engine, arena, prompt(), 14)


def test_part_of_a_prompt(engine: Engine, arena: str) -> None:
    begin = prompt(1000)
    asked = prompt(shared=begin)
    cold = engine.generate(asked)
    reset(engine)
    clear(arena)
    engine.generate(begin)
    wait_stored(arena, 7)
    forget(engine)
    loaded = engine.generate(asked)
    assert loaded.cached_tokens == 7 * BLOCK
    assert loaded.tokens == cold.tokens


def test_part_from_vllm_and_part_from_the_arena(engine: Engine, arena: str) -> None:
    begin = prompt(1000)
    asked = prompt(shared=begin)
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    forget(engine)
    engine.generate(begin)
    before = support.stats(arena).counters.claims
    loaded = engine.generate(asked)
    assert loaded.cached_tokens == 14 * BLOCK
    assert loaded.tokens == cold.tokens
    assert support.stats(arena).counters.claims - before == (14 - 7) * 2


def test_all_of_a_prompt(engine: Engine, arena: str) -> None:
    """At least one token must be computed."""
    asked = prompt(8 * BLOCK)
    cold = engine.generate(asked)
    wait_stored(arena, 8)
    forget(engine)
    loaded = engine.generate(asked)
    assert 7 * BLOCK <= loaded.cached_tokens < 8 * BLOCK
    assert loaded.tokens == cold.tokens


def test_less_than_a_block(engine: Engine, arena: str) -> None:
    asked = prompt(BLOCK - 20)
    cold = engine.generate(asked)
    forget(engine)
    clear(arena)
    assert engine.generate(asked).tokens == cold.tokens
    support.wait_idle(arena)
    assert support.stats(arena).objects == 0


def test_what_was_generated(engine: Engine, arena: str) -> None:
    """The second turn of a conversation loads what was generated in the first."""
    asked = prompt()
    answer = engine.generate(asked, 300)
    wait_stored(arena, 16)
    second = prompt(20 * BLOCK, shared=asked + answer.tokens)
    forget(engine)
    loaded = engine.generate(second)
    reset(engine)
    clear(arena)
    cold = engine.generate(second)
    assert [loaded.cached_tokens, cold.cached_tokens] == [16 * BLOCK, 0]
    assert loaded.tokens == cold.tokens


def test_the_same_at_once(engine: Engine, arena: str) -> None:
    asked = prompt()
    fresh = [engine.submit(asked) for _ in range(4)]
    tokens = {tuple(request.result().tokens) for request in fresh}
    wait_stored(arena, 14)
    forget(engine)
    loaded = [request.result() for request in [engine.submit(asked) for _ in range(4)]]
    assert {tuple(answer.tokens) for answer in loaded} == tokens
    assert {answer.cached_tokens for answer in loaded} == {14 * BLOCK}
    assert len(tokens) == 1


def test_preemption(engine: Engine, arena: str) -> None:
    """More requests at once than vLLM's own cache has room for, once they grow."""
    asked = [prompt(880) for _ in range(6)]
    alone = [engine.generate(one, 60).tokens for one in asked]
    wait_stored(arena, len(asked) * 7)
    known = contents(arena)
    forget(engine)
    clear(arena)
    before = metric(engine, "vllm:num_preemptions_total")
    for _ in ("computed", "loaded"):
        reset(engine)
        requests = [engine.submit(one, 60) for one in asked]
        assert [request.result().tokens for request in requests] == alone
    assert metric(engine, "vllm:num_preemptions_total") > before
    wait_stored(arena, len(asked) * 7)
    support.check_same_kv(known, arena)


def test_blocks_are_saved_before_they_are_written_over(engine: Engine, arena: str) -> None:
    """The third prompt gets blocks of the first one, which nobody has copied yet."""
    asked = [prompt() for _ in range(3)]
    for one in asked:
        engine.generate(one, 1)
    wait_stored(arena, 3 * 14)
    known = contents(arena)
    forget(engine)
    clear(arena)
    before = metric(engine, "vllm:shmcache_flushes_total")
    engine.rpc("hold_saves")
    for request in [engine.submit(one, 1) for one in asked]:
        request.result()
    wait_stored(arena, 3 * 14)
    assert metric(engine, "vllm:shmcache_flushes_total") > before
    support.check_same_kv(known, arena)


def test_a_reset_of_the_connector(engine: Engine, arena: str) -> None:
    """As after new weights: nothing that was stored before is found."""
    asked = prompt()
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    support.wait_until(lambda: engine.reset_prefix_cache(connector=True), lambda: "not reset")
    anew = engine.generate(asked)
    wait_stored(arena, 28)
    forget(engine)
    loaded = engine.generate(asked)
    assert [anew.cached_tokens, loaded.cached_tokens] == [0, 14 * BLOCK]
    assert cold.tokens == anew.tokens == loaded.tokens


def test_an_object_that_is_lost_is_computed_again(engine: Engine, arena: str) -> None:
    """Somebody forces objects out while a rank has not claimed its shares."""
    asked = prompt()
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    forget(engine)
    errors = metric(engine, "vllm:shmcache_load_errors_total")
    with support.rank_that_loads_late(engine, arena, asked) as request:
        support.force_out(arena)
    assert request.result().tokens == cold.tokens
    assert metric(engine, "vllm:shmcache_load_errors_total") > errors
    engine.generate(asked)  # such a request saves nothing; the next one does, from vLLM's own cache
    wait_stored(arena, 14)
    forget(engine)
    assert engine.generate(asked).tokens == cold.tokens


def test_an_abort_while_it_is_loaded(engine: Engine, arena: str) -> None:
    asked = prompt()
    cold = engine.generate(asked)
    wait_stored(arena, 14)
    forget(engine)
    with support.rank_that_loads_late(engine, arena, asked) as request:
        request.abort()
    assert request.result().finish_reason == "abort"
    support.wait_idle(arena)
    forget(engine)
    assert engine.generate(asked).tokens == cold.tokens


def test_a_storm_of_aborts(engine: Engine, arena: str, chance: random.Random) -> None:
    stored = [prompt() for _ in range(3)]
    cold = [engine.generate(asked).tokens for asked in stored]
    assert storm(engine, chance, stored) > 0
    support.check_sound(arena)
    forget(engine)
    loaded = [engine.generate(asked) for asked in stored]
    assert [answer.tokens for answer in loaded] == cold
    assert [answer.cached_tokens for answer in loaded] == [14 * BLOCK] * 3


def test_metrics(engine: Engine, arena: str) -> None:
    names = [f"vllm:shmcache_{name}_total" for name in ("saved_blocks", "hit_blocks", "saved_bytes", "loaded_bytes")]
    asked = prompt()
    before = [metric(engine, name) for name in names]
    engine.generate(asked)
    wait_stored(arena, 14)
    reset(engine)
    engine.generate(asked)
    nbytes = sum(len(content) for content in contents(arena).values())

    def grown() -> list[float]:
        return [metric(engine, name) - old for name, old in zip(names, before, strict=True)]

    support.wait_until(lambda: grown() == [14, 14, nbytes, nbytes], grown)
    assert re.search(r"KV Transfer metrics: .*saved_blocks=", engine.log())
