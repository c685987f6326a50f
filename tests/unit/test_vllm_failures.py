"""What is never saved: what comes from blocks that were not loaded, or from another model; and arenas that fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import vllm_support
from vllm_engine import Engine, Job, Pool
from vllm_support import IDENTITY, PART, TOKENS, Request, Sides, check_objects, prompt, shares

import shmcache
from shmcache import Status
from shmcache.integrations.vllm import scheduler as scheduler_module
from shmcache.integrations.vllm.messages import Step

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT
Make = Callable[..., Sides]
BLOCKS = list(range(10, 30))
TINY = {"capacity": "16KiB"}  #: room for four objects


@pytest.fixture
def make(arena_name: str) -> Iterator[Make]:
    with vllm_support.engines(arena_name) as found:
        yield found


@pytest.fixture
def sides(make: Make) -> Sides:
    return make()


def begin(sides: Sides, name: str, tokens: list[int], blocks: list[int] = BLOCKS, **how: Any) -> Request:
    """A request that is to be computed from its begin."""
    request = Request(name, tokens, **how)
    sides.match(request)
    sides.scheduler.allocated(request, blocks, 0)
    return request


def end(sides: Sides, request: Request, blocks: list[int] = BLOCKS) -> None:
    sides.scheduler.finished(request.request_id, blocks)
    sides.settle()
    sides.drain()


def saved(step: Step) -> list[tuple[list[bytes], list[int]]]:
    return [(save.keys, save.blocks) for save in step.saves]


def fill(sides: Sides, n: int = 4) -> shmcache.ReadBatch:
    """Objects of somebody else, who reads them."""
    keys = [b"%d" % i for i in range(n)]
    for key in keys:
        assert sides.cache.put(key, bytes(4096)) is OK
    return sides.cache.read(keys)


# Loads that failed


def lose(sides: Sides, request: Request, ranks: list[int], tokens: int) -> set[int]:
    """Loads five blocks that these ranks lose, and computes so many tokens more. The bad blocks."""
    sides.save(Request("first", prompt(5)), [0, 1, 2, 3, 4])
    assert sides.match(request) == (20, False)
    sides.scheduler.allocated(request, BLOCKS, 20)
    request.num_computed_tokens = 20
    computed = {request: (tokens, BLOCKS)}
    step = sides.step(computed)
    for rank in sides.ranks:
        if rank.rank not in ranks:
            rank.worker.load(step)
    with shmcache.attach(sides.arena) as cache:
        cache.delete(request.keys(0, 5), force=True)
    for rank in ranks:
        sides.ranks[rank].worker.load(step)
    vllm_support.compute(sides.ranks, request, tokens, BLOCKS)
    for rank in sides.ranks:
        rank.worker.save(step)
    request.num_computed_tokens += tokens
    return set(BLOCKS[:5])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_nothing_that_was_computed_from_bad_blocks_is_saved(make: Make, ranks: list[int], replicas: int) -> None:
    sides = make(replicas=replicas)
    request = Request("a", prompt(9, more=3))
    bad = lose(sides, request, ranks, 12)
    assert sides.tell() == bad
    assert check_objects(sides.cache, sides.shape) == []
    assert not sides.compute(request, BLOCKS, 4).saves
    assert not sides.scheduler.finished("a", BLOCKS)
    sides.save(Request("b", prompt(9)), BLOCKS)
    assert len(check_objects(sides.cache, sides.shape)) == 9


def test_what_waits_when_a_load_fails_is_saved_later(make: Make) -> None:
    sides = make()
    waiting = begin(sides, "b", prompt(4, seed=1), [30, 31, 32, 33])
    request = Request("a", prompt(9))
    lose(sides, request, [0], 12)
    sides.tell()
    sides.compute(waiting, [30, 31, 32, 33])
    sides.tell()
    assert set(check_objects(sides.cache, sides.shape)) == set(waiting.keys())
    end(sides, waiting)
    end(sides, request)


def test_a_load_between_steps_that_fails_spoils_nothing(make: Make) -> None:
    """Nobody has computed from its blocks."""
    sides = make(sync_load_bytes=0)
    sides.save(Request("first", prompt(5)), [0, 1, 2, 3, 4])
    request, other = Request("a", prompt(5)), begin(sides, "b", prompt(4, seed=1), [30, 31, 32, 33])
    assert sides.match(request) == (19, True)
    sides.scheduler.allocated(request, BLOCKS, 19)
    computed = {other: (16, [30, 31, 32, 33])}
    step = sides.step(computed)
    with shmcache.attach(sides.arena) as cache:
        cache.delete(request.keys(), force=True)
    sides.run(step, computed)
    assert sides.tell() == set(BLOCKS[:5])
    assert set(check_objects(sides.cache, sides.shape)) == set(other.keys())
    sides.match(request)
    sides.scheduler.allocated(request, BLOCKS, 0)
    assert len(sides.compute(request, BLOCKS).saves) == 1
    end(sides, request)
    end(sides, other)


@pytest.mark.parametrize("replicas", [1, 2])
def test_steps_that_were_on_their_way(make: Make, replicas: int) -> None:
    """vLLM hears of the bad blocks only after the next step was computed."""
    sides = make(replicas=replicas)
    request = Request("a", prompt(9, more=3))
    bad = lose(sides, request, [1], 8)
    sides.settle()
    first = sides.report()
    sides.compute(request, BLOCKS, 8)
    sides.scheduler.done(first[0])
    assert first[2] == bad
    sides.tell()
    assert check_objects(sides.cache, sides.shape) == []
    end(sides, request, [])


def test_what_is_over_when_bad_blocks_are_found(make: Make) -> None:
    """A request that shares the bad blocks has ended, and waits for room."""
    sides = make(capacity="32KiB")
    request = Request("a", prompt(9))
    lose(sides, request, [0], 0)
    held = fill(sides, 8)
    sides.settle()
    report = sides.report()
    other = Request("b", prompt(7))
    sides.match(other, 5)
    sides.scheduler.allocated(other, [*BLOCKS[:5], 30, 31], 0)
    other.num_computed_tokens = 20
    sides.compute(other, [*BLOCKS[:5], 30, 31])
    assert sides.scheduler.finished("b", [*BLOCKS[:5], 30, 31])
    sides.scheduler.done(report[0])
    held.release()
    step = sides.step()
    assert (step.saves, step.closed) == ([], ["b"])
    assert sides.scheduler.counters.take()["unsaved_blocks"] == 7
    sides.scheduler.finished("a", [])
    sides.tell()


# What an engine keeps of loads that failed


def ask(engine: Engine, blocks: int, more: int = 2) -> Job:
    """For a prompt that begins as all others do, but for one token, which is computed last."""
    tokens = prompt(blocks, more=more)
    engine.waiting.append(Job(f"{blocks} blocks, {len(engine.jobs)}", tokens, len(tokens) - 1))
    return engine.waiting[-1]


def run(engine: Engine, *blocks: int) -> None:
    for count in blocks:
        job = ask(engine, count)
        while not job.over or engine.sides.scheduler.has_work:
            engine.step()


def end_of(engine: Engine) -> None:
    engine.lag = 0
    while engine.has_work:
        engine.step()
    check_objects(engine.sides.cache, engine.sides.shape)
    assert len(engine.pool.free) == engine.pool.blocks


def lose_granted(engine: Engine, blocks: int) -> None:
    """A step of which the leading blocks are forced out before the ranks load them."""
    keys = Request("", prompt(blocks)).keys()
    with shmcache.attach(engine.sides.arena) as cache:
        engine.step(lambda: assert_forced_out(cache, keys))


def assert_forced_out(cache: shmcache.Cache, keys: list[bytes]) -> None:
    assert cache.delete(keys, force=True) == [OK] * len(keys)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("preempted", [False, True])
def test_what_was_computed_from_bad_blocks_by_requests_that_are_gone(
    make: Make, preempted: bool, recompute: bool
) -> None:
    """vLLM looks for them among those that run. The blocks that they made must not be hit once others have computed
    those before them."""
    engine = Engine(make(), Pool(30), lag=1, recompute=recompute)
    run(engine, 2)
    engine.forget()
    job = ask(engine, 4, more=1)
    lose_granted(engine, 2)
    assert job.num_computed_tokens == 16
    if preempted:
        engine._preempt(job)
    else:
        engine.abort(job)
    engine.deliver()
    run(engine, 2, 6)
    end_of(engine)


def test_who_relies_on_a_request_that_is_gone(make: Make) -> None:
    """vLLM lets one request compute bad blocks again, and others that share them go on. Then that one is aborted."""
    engine = Engine(make(), Pool(50))
    run(engine, 2)
    engine.forget()
    again, relies = ask(engine, 2), ask(engine, 9)
    lose_granted(engine, 2)
    assert (again.num_computed_tokens, relies.num_computed_tokens) == (0, 8)
    engine.abort(again)
    while not relies.over:
        engine.step()
    run(engine, 4, 11)
    end_of(engine)


def test_who_loads_more_and_relies_on_a_request_that_is_gone(make: Make) -> None:
    """Two requests have bad blocks in common, and load others between steps; nothing of them is computed yet."""
    engine = Engine(make(sync_load_bytes=2 * PART), Pool(50))
    run(engine, 6)
    engine.forget()
    again, loads, relies = ask(engine, 2), ask(engine, 8), ask(engine, 8)
    lose_granted(engine, 2)
    assert (loads.num_computed_tokens, relies.num_computed_tokens) == (0, 24)
    engine.abort(again)
    engine.abort(loads)
    end_of(engine)


# Reset


def test_what_was_stored_before_a_reset_is_not_found_again(sides: Sides) -> None:
    sides.save(Request("first", prompt(3)), BLOCKS)
    sides.scheduler.reset()
    assert sides.match(Request("a", prompt(3))) == (0, False)
    sides.scheduler.finished("a", [])
    sides.save(Request("b", prompt(3)), BLOCKS)
    assert sides.match(Request("c", prompt(3))) == (11, False)
    sides.scheduler.finished("c", [])
    keys = check_objects(sides.cache, sides.shape)
    assert len(keys) == 6
    assert len({key[32:] for key in keys}) == 2
    sides.scheduler.reset()
    assert sides.match(Request("d", prompt(3))) == (0, False)
    sides.scheduler.finished("d", [])


def test_other_engines_keep_what_was_stored(make: Make) -> None:
    one, other = make(), make(group="other")
    one.save(Request("first", prompt(3)), BLOCKS)
    one.scheduler.reset()
    one.save(Request("second", prompt(4)), BLOCKS)
    assert other.match(Request("a", prompt(4))) == (12, False)
    other.scheduler.finished("a", [])


def test_a_request_that_runs_at_a_reset_stores_nothing_more(sides: Sides) -> None:
    request = begin(sides, "a", prompt(4))
    sides.compute(request, BLOCKS, 8)
    sides.scheduler.reset()
    assert not sides.compute(request, BLOCKS).saves
    assert not sides.scheduler.finished("a", BLOCKS)
    sides.tell()
    assert {key[32:] for key in check_objects(sides.cache, sides.shape)} <= {IDENTITY}


def test_a_request_that_waits_at_a_reset(sides: Sides) -> None:
    """Its shares of what was stored before are given back; it is stored as what comes after."""
    sides.save(Request("first", prompt(3)), [0, 1, 2])
    request = Request("a", prompt(3))
    assert sides.match(request) == (11, False)
    sides.scheduler.reset()
    assert sides.match(request) == (0, False)
    assert shares(sides.arena) == {}
    sides.scheduler.allocated(request, BLOCKS, 0)
    assert len(sides.compute(request, BLOCKS).saves) == 1
    end(sides, request)
    assert len(check_objects(sides.cache, sides.shape)) == 6


# When the arena fails


def broken(error: Exception) -> Callable[..., Any]:
    def method(*_: Any, **__: Any) -> Any:
        raise error

    return method


def test_an_arena_that_fails_costs_stores_only(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shmcache.Cache, "reserve_write", broken(shmcache.ArenaDamagedError("damaged")))
    request = begin(sides, "a", prompt(3))
    assert not sides.compute(request, BLOCKS).saves
    monkeypatch.undo()
    assert len(sides.compute(request, BLOCKS, 0).saves) == 1
    end(sides, request)


def test_a_lock_holder_that_is_stopped_makes_one_wait_once(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def busy(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise shmcache.ArenaBusyError("stopped")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "vllm.shmcache"):
        patch.setattr(shmcache.Cache, "reserve_write", busy)
        request = begin(sides, "a", prompt(9))
        for _ in range(9):
            sides.compute(request, BLOCKS, TOKENS)
    assert len(tries) == 1
    assert caplog.text.count("could not save blocks") == 1
    assert not sides.compute(request, BLOCKS, 0).saves
    monkeypatch.setattr(scheduler_module, "_PAUSE_S", 0)
    sides.scheduler._no_saves_before = 0
    assert len(sides.compute(request, BLOCKS, 0).saves) == 1
    end(sides, request)


@pytest.mark.parametrize("method", ["abort", "publish"])
def test_ending_a_store_may_fail(sides: Sides, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The engine goes on, and so do the other stores that the report tells of."""
    one, other = begin(sides, "a", prompt(2), BLOCKS[:2]), begin(sides, "b", prompt(2, seed=1), BLOCKS[5:7])
    if method == "abort":
        sides.ranks[0].gate.errors["save"] = RuntimeError("no copy")
    computed = {one: (8, BLOCKS[:2]), other: (8, BLOCKS[5:7])}
    step = sides.step(computed)
    sides.run(step, computed)
    sides.settle()
    right = getattr(shmcache.WriteBatch, method)
    calls: list[int] = []

    def once(batch: shmcache.WriteBatch) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise shmcache.ArenaBusyError("stopped")
        return right(batch)

    monkeypatch.setattr(shmcache.WriteBatch, method, once)
    sides.tell()
    sides.step()
    assert calls
    assert sides.cache.lookup(other.keys()) == 2
    monkeypatch.undo()
    sides.scheduler._no_saves_before = 0
    for request in (one, other):
        sides.scheduler.finished(request.request_id, [])
    sides.run(sides.step())
    assert sides.cache.stats().writing == 0, "tried again"
    check_objects(sides.cache, sides.shape)


def test_what_failed_is_free_soon_also_when_the_engine_has_nothing_else_to_do(sides: Sides) -> None:
    """Others would wait for it."""
    request = begin(sides, "a", prompt(2))
    sides.ranks[0].gate.errors["save"] = RuntimeError("no copy")
    sides.compute(request, BLOCKS)
    sides.scheduler.finished("a", BLOCKS)
    sides.tell()
    sides.drain()
    assert sides.cache.status(request.keys()) == [NOT_FOUND] * 2


def test_close_leaves_nothing_that_is_written(sides: Sides) -> None:
    request = begin(sides, "a", prompt(3))
    computed = {request: (12, BLOCKS)}
    sides.step(computed)
    assert sides.cache.stats().writing == 3
    sides.scheduler.close()
    assert sides.cache.stats().writing == 0
