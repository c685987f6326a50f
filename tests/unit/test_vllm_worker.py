"""A rank's side: what it copies where, what it reports, and what it does when something is lost or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest
import vllm_support
from arena_support import TIMEOUT_S
from storage_support import eventually
from vllm_support import PART, Request, Sides, check_idle, check_objects, object_of, part_of, prompt, shares

import shmcache
from shmcache import Status
from shmcache.integrations.vllm.messages import Load, Shape, Step

Make = Callable[..., Sides]
BLOCKS = list(range(10, 30))


@pytest.fixture
def make(arena_name: str) -> Iterator[Make]:
    with vllm_support.engines(arena_name) as found:
        yield found


def planned(make: Make, blocks: int = 5, **how: Any) -> tuple[Sides, Request, Step]:
    """An engine that is about to load so many blocks."""
    sides = make(**how)
    sides.save(Request("first", prompt(blocks)), list(range(blocks)))
    request = Request("a", prompt(blocks, more=1))
    assert sides.match(request)[0] == 4 * blocks
    sides.scheduler.allocated(request, BLOCKS[: blocks + 1], 4 * blocks)
    return sides, request, sides.step()


def right(sides: Sides, request: Request, start: int = 0, stop: int = 5) -> list[bool]:
    """Of each rank whether these blocks are loaded."""
    return [all(rank.has(BLOCKS[i], request.all_hashes[i]) for i in range(start, stop)) for rank in sides.ranks]


def outsider(sides: Sides) -> shmcache.Cache:
    return shmcache.attach(sides.arena)


# Loads


def test_within_a_step(make: Make) -> None:
    sides, request, step = planned(make)
    sides.ranks[0].worker.load(step)
    assert right(sides, request) == [True, False]
    assert sides.ranks[0].get(BLOCKS[5]) == bytes(PART)
    assert shares(sides.arena).keys() == {("vllm", 1)}, "each rank gives back its own"
    sides.ranks[1].worker.load(step)
    assert right(sides, request) == [True, True]
    assert shares(sides.arena) == {}
    assert [rank.worker.received() for rank in sides.ranks] == [set(), set()]
    assert [rank.worker.load_errors() for rank in sides.ranks] == [set(), set()]
    assert not any(rank.worker.report() for rank in sides.ranks)


def test_between_steps(make: Make) -> None:
    sides, request, step = planned(make, sync_load_bytes=0)
    for rank in sides.ranks:
        rank.gate.shut("load")
        rank.worker.load(step)
    assert [rank.worker.received() for rank in sides.ranks] == [set(), set()]
    sides.ranks[1].gate.open("load")
    wait([sides.ranks[1].worker._loads["a"]], TIMEOUT_S)
    assert [rank.worker.received() for rank in sides.ranks] == [set(), {"a"}]
    assert [rank.worker.received() for rank in sides.ranks] == [set(), set()], "told once"
    assert right(sides, request) == [False, True]
    assert shares(sides.arena).keys() == {("vllm", 0)}
    sides.ranks[0].gate.open("load")
    sides.settle()
    assert sides.ranks[0].worker.received() == {"a"}
    assert right(sides, request) == [True, True]
    assert shares(sides.arena) == {}


def test_several_loads_between_steps(make: Make) -> None:
    sides = make(sync_load_bytes=0)
    sides.save(Request("first", prompt(5)), [0, 1, 2, 3, 4])
    requests = [Request(name, prompt(5, more=1)) for name in "abc"]
    for number, request in enumerate(requests):
        sides.match(request)
        sides.scheduler.allocated(request, [10 * number + i for i in range(10, 16)], 20)
    sides.run(sides.step())
    sides.settle()
    assert [rank.worker.received() for rank in sides.ranks] == [{"a", "b", "c"}] * 2
    for number, request in enumerate(requests):
        for i, rank in [(i, rank) for i in range(5) for rank in sides.ranks]:
            assert rank.has(10 * number + 10 + i, request.all_hashes[i])


@pytest.mark.parametrize("between_steps", [False, True])
@pytest.mark.parametrize("lost", [[0], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_what_is_lost_is_told_block_by_block(make: Make, lost: list[int], between_steps: bool) -> None:
    sides, request, step = planned(make, sync_load_bytes=0 if between_steps else 1 << 30)
    with outsider(sides) as cache:
        for i in lost:
            assert cache.delete(request.keys(i, i + 1), force=True) == [Status.OK]
    sides.run(step)
    sides.settle()
    for rank in sides.ranks:
        assert rank.worker.received() == ({"a"} if between_steps else set())
        assert rank.worker.load_errors() == {BLOCKS[i] for i in lost}
        assert rank.worker.load_errors() == set(), "told once"
        report = rank.worker.report()
        epoch = -1 if between_steps else step.epoch  # nobody has computed from blocks that are loaded between steps
        assert (report.bad_epoch, report.done) == (epoch, {})
        assert not rank.worker.report()
        assert rank.worker.counters.take()["load_errors"] == len(lost)
        for i in set(range(5)) - set(lost):
            assert rank.has(BLOCKS[i], request.all_hashes[i])
        for i in lost:
            assert rank.get(BLOCKS[i]) == bytes(PART), "nothing is written where nothing came"
    assert shares(sides.arena) == {}


def test_one_rank_loses_what_the_other_loads(make: Make) -> None:
    sides, request, step = planned(make)
    sides.ranks[0].worker.load(step)
    with outsider(sides) as cache:
        assert cache.delete(request.keys(0, 5), force=True) == [Status.OK] * 5
    sides.ranks[1].worker.load(step)
    assert [rank.worker.load_errors() for rank in sides.ranks] == [set(), set(BLOCKS[:5])]
    assert right(sides, request) == [True, False]


def test_an_object_of_another_size_is_lost(make: Make) -> None:
    sides, request, step = planned(make)
    key = request.keys(2, 3)
    with outsider(sides) as cache:
        assert cache.delete(key, force=True) == [Status.OK]
        assert cache.put(key[0], object_of(key[0], sides.shape) + b"more") is Status.OK
    sides.run(step)
    assert sides.ranks[0].worker.load_errors() == sides.ranks[1].worker.load_errors() == {BLOCKS[2]}
    assert shares(sides.arena) == {}


@pytest.mark.parametrize("between_steps", [False, True])
def test_a_copier_that_fails_loses_all(make: Make, between_steps: bool, caplog: pytest.LogCaptureFixture) -> None:
    sides, request, step = planned(make, sync_load_bytes=0 if between_steps else 1 << 30)
    sides.ranks[0].gate.errors["load"] = RuntimeError("CUDA error")
    sides.run(step)
    sides.settle()
    assert "request a: could not load" in caplog.text
    assert "RuntimeError: CUDA error" in caplog.text
    assert sides.ranks[0].worker.received() == ({"a"} if between_steps else set())
    assert [rank.worker.load_errors() for rank in sides.ranks] == [set(BLOCKS[:5]), set()]
    assert sides.ranks[0].worker.report().bad_epoch == (-1 if between_steps else step.epoch)
    eventually(lambda: shares(sides.arena) == {}, "the shares are back")
    assert right(sides, request) == [False, True]


def test_an_arena_that_fails_loses_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sides, _, step = planned(make)

    def read(*_: Any, **__: Any) -> Any:
        raise shmcache.ArenaDamagedError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(shmcache.Cache, "read", read)
        sides.ranks[0].worker.load(step)
    assert sides.ranks[0].worker.load_errors() == set(BLOCKS[:5])
    sides.ranks[0].worker.load(step)
    sides.ranks[1].worker.load(step)


def test_what_a_load_counts(make: Make) -> None:
    sides, _, step = planned(make)
    sides.ranks[0].worker.counters.take()
    sides.ranks[0].worker.load(step)
    counted = sides.ranks[0].worker.counters.take()
    assert counted["loaded_bytes"] == 5 * PART
    assert counted["load_seconds"] > 0
    assert "load_errors" not in counted
    sides.ranks[1].worker.load(step)


# Parts


@pytest.mark.parametrize(
    ("ranks", "replicas", "parts", "writers"),
    [(1, 1, [0], [0]), (4, 1, [0, 1, 2, 3], [0, 1, 2, 3]), (4, 4, [0, 0, 0, 0], [0]), (4, 2, [0, 0, 1, 1], [0, 2])],
)
def test_shapes(ranks: int, replicas: int, parts: list[int], writers: list[int]) -> None:
    shape = Shape(ranks, replicas, 10)
    assert [shape.part(rank) for rank in range(ranks)] == [slice(10 * part, 10 * part + 10) for part in parts]
    assert [rank for rank in range(ranks) if shape.writes(rank)] == writers
    assert (shape.parts, shape.object_bytes, shape.writers) == (len(writers), 10 * len(writers), len(writers) + 1)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 4), (4, 2)])
def test_replicas_have_one_part_between_them(make: Make, ranks: int, replicas: int) -> None:
    """MLA, and fewer KV heads than ranks."""
    sides, request, step = planned(make, ranks=ranks, replicas=replicas)
    assert sorted(check_objects(sides.cache, sides.shape)) == sorted(request.keys(0, 5))
    sides.run(step)
    assert right(sides, request) == [True] * ranks
    for rank in sides.ranks:
        assert rank.get(BLOCKS[0]) == part_of(request.all_hashes[0], rank.rank // replicas)
    check_idle(sides.cache)


# Stores


def stored(sides: Sides, blocks: int = 3) -> tuple[Request, Step]:
    """A step that stores so many blocks, on no rank yet."""
    request = Request("a", prompt(blocks))
    sides.match(request)
    sides.scheduler.allocated(request, BLOCKS[:blocks], 0)
    step = sides.step({request: (4 * blocks, BLOCKS[:blocks])})
    vllm_support.compute(sides.ranks, request, 4 * blocks, BLOCKS)
    assert len(step.saves) == 1
    return request, step


def test_a_store_is_told_when_it_is_done(make: Make) -> None:
    sides = make()
    request, step = stored(sides)
    worker = sides.ranks[0].worker
    sides.ranks[0].gate.shut("save")
    worker.save(step)
    assert not worker.report()
    sides.ranks[0].gate.open("save")
    worker.before(Step(0, flush=[step.saves[0].job]))
    report = worker.report()
    assert (report.done, report.failed, report.bad_epoch) == ({step.saves[0].job: 1}, set(), -1)
    assert not worker.report()
    worker.before(Step(0, flush=[step.saves[0].job, 77]))
    sides.ranks[1].worker.save(step)
    sides.scheduler.done(report)
    sides.tell()
    assert len(check_objects(sides.cache, sides.shape)) == 3
    sides.scheduler.finished(request.request_id, [])


def test_whoever_writes_over_blocks_waits(make: Make) -> None:
    sides = make()
    request, step = stored(sides)
    rank = sides.ranks[0]
    rank.gate.shut("save")
    rank.worker.save(step)
    opener = threading.Timer(0.05, rank.gate.open, ["save"])
    opener.start()
    rank.worker.before(Step(0, flush=[step.saves[0].job]))
    assert rank.worker._saves[step.saves[0].job].done()
    opener.join()
    rank.put(BLOCKS[0], bytes(PART))
    sides.ranks[1].worker.save(step)
    sides.tell()
    assert len(check_objects(sides.cache, sides.shape)) == 3
    sides.scheduler.finished(request.request_id, [])


def test_nobody_waits_for_stores_that_are_not_named(make: Make) -> None:
    sides = make()
    request, step = stored(sides)
    sides.ranks[0].gate.shut("save")
    sides.ranks[0].worker.save(step)
    sides.ranks[0].worker.before(Step(0))
    assert not sides.ranks[0].worker.report()
    sides.ranks[0].gate.open("save")
    sides.ranks[1].worker.save(step)
    sides.tell()
    sides.scheduler.finished(request.request_id, [])


def test_replicas_store_nothing(make: Make) -> None:
    sides = make(replicas=2)
    request, step = stored(sides)
    sides.ranks[1].worker.save(step)
    assert not sides.ranks[1].worker._saves
    sides.ranks[0].worker.save(step)
    sides.tell()
    assert len(check_objects(sides.cache, sides.shape)) == 3
    sides.scheduler.finished(request.request_id, [])


def test_a_copier_that_fails_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    sides = make()
    request, step = stored(sides)
    sides.ranks[1].gate.errors["save"] = RuntimeError("CUDA error")
    for rank in sides.ranks:
        rank.worker.save(step)
    sides.settle()
    assert "3 blocks are not saved" in caplog.text
    assert "CUDA error" in caplog.text
    counted = [rank.worker.counters.take() for rank in sides.ranks]
    assert [(one.get("saved_bytes", 0), one.get("save_errors", 0)) for one in counted] == [(3 * PART, 0), (0, 3)]
    report = sides.ranks[1].worker.report()
    assert (report.done, report.failed) == ({step.saves[0].job: 1}, {step.saves[0].job})
    report.add(sides.ranks[0].worker.report())
    sides.scheduler.done(report)
    assert sides.cache.lookup(request.keys()) == 0
    sides.scheduler.finished("a", [])
    sides.drain()


def test_a_reservation_that_is_gone(make: Make) -> None:
    """The scheduler's side has died, or another holds its keys now."""
    sides = make()
    request, step = stored(sides)
    sides.scheduler._jobs.close()
    with outsider(sides) as cache:
        assert cache.put(request.keys()[1], b"another") is Status.OK
        for rank in sides.ranks:
            rank.worker.save(step)
        sides.settle()
        assert [rank.worker.report().failed for rank in sides.ranks] == [{step.saves[0].job}] * 2
        with cache.read(request.keys(1, 2)) as batch:
            assert [bytes(view or b"") for view in batch.views] == [b"another"]
        assert cache.delete(request.keys(1, 2)) == [Status.OK]


# The end


def test_close_waits_for_what_is_being_copied(make: Make) -> None:
    sides, request, step = planned(make, sync_load_bytes=0)
    rank = sides.ranks[0]
    rank.gate.shut("load")
    rank.worker.load(step)
    rank.worker.load(Step(0, loads=[Load("b", [b"nothing"], [40], between_steps=True)]))
    eventually(lambda: shares(sides.arena)[("vllm", 0)].total() == 5, "begun")
    rank.worker._saver.submit(rank.gate.open, "load")
    rank.worker.close()
    assert rank.has(BLOCKS[0], request.all_hashes[0])
    assert rank.worker._loads["a"].done()
    assert rank.worker._loads["b"].cancelled()
