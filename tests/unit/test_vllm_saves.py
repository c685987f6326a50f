"""What is stored: each block once, when it is computed, from blocks that stay until then; never what is not right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import vllm_support
from storage_support import eventually
from vllm_support import TOKENS, Request, Sides, check_objects, prompt

import shmcache
from shmcache import Status
from shmcache.integrations.vllm.messages import Report, Step

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


# What, and when


def test_full_blocks_are_stored(sides: Sides) -> None:
    request = begin(sides, "a", prompt(3, more=2))
    step = sides.compute(request, BLOCKS)
    assert saved(step) == [(request.keys(), BLOCKS[:3])]
    assert sides.cache.lookup(request.keys()) == 0
    sides.tell()
    assert sorted(check_objects(sides.cache, sides.shape)) == sorted(request.keys())
    end(sides, request)


def test_chunks(sides: Sides) -> None:
    """A block is stored by the step that makes it full."""
    request = begin(sides, "a", prompt(5))
    found = []
    for tokens in (3, 1, 6, 2, 0, 8):
        step = sides.compute(request, BLOCKS, tokens)
        found.append([save.blocks for save in step.saves])
    assert found == [[], [[10]], [[11]], [[12]], [], [[13, 14]]]
    sides.tell()
    assert len(check_objects(sides.cache, sides.shape)) == 5
    end(sides, request)


def test_generated_tokens(sides: Sides) -> None:
    """Only blocks whose tokens are all known have a hash; a draft's, and that of what is on its way, are not."""
    request = begin(sides, "a", prompt(3), known=6)
    assert [save.blocks for save in sides.compute(request, BLOCKS, 6).saves] == [[10]]
    assert not sides.compute(request, BLOCKS, 3).saves, "8 tokens are computed, but 6 are known"
    request.num_tokens = 9
    assert [save.blocks for save in sides.compute(request, BLOCKS, 1).saves] == [[11]]
    sides.tell()
    end(sides, request)


def test_drafts_in_the_first_step(sides: Sides) -> None:
    """As before; and a request that ends then keeps no blocks for them."""
    request = begin(sides, "a", prompt(3), known=6)
    assert [save.blocks for save in sides.compute(request, BLOCKS, 11).saves] == [[10]]
    assert not sides.scheduler.finished("a", BLOCKS)
    sides.tell()
    assert check_objects(sides.cache, sides.shape) == request.keys(0, 1)


def test_what_is_loaded_is_not_stored_again(sides: Sides) -> None:
    sides.save(Request("first", prompt(3)), [0, 1, 2])
    request = Request("a", prompt(5))
    assert sides.match(request) == (12, False)
    sides.scheduler.allocated(request, BLOCKS, 12)
    request.num_computed_tokens = 12
    assert saved(sides.compute(request, BLOCKS)) == [(request.keys(3, 5), BLOCKS[3:5])]
    sides.tell()
    end(sides, request)


def test_what_is_there_already_is_not_saved_again_but_used(make: Make) -> None:
    """Others are evicted first, also where vLLM had it itself, so that nobody was granted it."""
    sides = make(**TINY)
    old = [Request(f"old{seed}", prompt(1, seed=seed)) for seed in range(4)]
    for request in old:
        sides.save(request, BLOCKS)
        time.sleep(0.01)  # recency is written every few milliseconds
    again = Request("a", prompt(1, more=1))
    assert sides.match(again, 1) == (0, False)
    sides.scheduler.allocated(again, BLOCKS, 0)
    again.num_computed_tokens = TOKENS
    assert not sides.compute(again, BLOCKS).saves
    end(sides, again)
    assert sides.cache.put(b"new", b"new") is OK
    assert [sides.cache.lookup(request.keys()) for request in old] == [1, 0, 1, 1]


def test_two_requests_with_one_prefix_in_one_step(sides: Sides) -> None:
    one = begin(sides, "a", prompt(3), BLOCKS[:3])
    other = begin(sides, "b", prompt(4), BLOCKS[5:9])
    computed = {one: (12, BLOCKS[:3]), other: (16, BLOCKS[5:9])}
    step = sides.step(computed)
    assert saved(step) == [(one.keys(), BLOCKS[:3]), (other.keys(3, 4), [BLOCKS[8]])]
    sides.run(step, computed)
    sides.tell()
    assert sides.scheduler.counters.take()["saved_blocks"] == 4
    assert len(check_objects(sides.cache, sides.shape)) == 4
    end(sides, one)
    end(sides, other)


def test_another_engine_is_at_it(make: Make) -> None:
    one, other = make(), make(group="other")
    first, second = begin(one, "a", prompt(3)), begin(other, "b", prompt(5))
    computed = {first: (12, BLOCKS)}
    step = one.step(computed)
    assert saved(other.compute(second, BLOCKS)) == [(second.keys(3, 5), BLOCKS[3:5])]
    one.run(step, computed)
    for sides in (other, one):
        sides.tell()
    assert len(check_objects(one.cache, one.shape)) == 5
    end(one, first)
    end(other, second)


def test_an_engine_that_only_loads(make: Make) -> None:
    sides = make(saves=False)
    request = begin(sides, "a", prompt(3))
    assert not sides.compute(request, BLOCKS).saves
    assert not sides.scheduler.finished("a", BLOCKS)
    assert not sides.scheduler.has_work


def test_a_step_may_tell_of_requests_that_nobody_was_asked_for(sides: Sides) -> None:
    assert not sides.step({Request("a", prompt(3)): (12, BLOCKS)}).saves


def test_a_request_that_is_over_is_stored_all_the_same(sides: Sides) -> None:
    """Its blocks are free; whoever writes over them waits."""
    request = begin(sides, "a", prompt(3))
    sides.ranks[0].gate.shut("save")
    job = sides.compute(request, BLOCKS).saves[0].job
    assert not sides.scheduler.finished("a", BLOCKS)
    assert sides.scheduler.has_work
    step = sides.step(new_blocks=[BLOCKS[1], 50])
    assert step.flush == [job]
    sides.ranks[0].gate.open("save")
    for rank in sides.ranks:
        rank.worker.before(step)
        rank.put(BLOCKS[1], bytes(vllm_support.PART))
    sides.tell()
    assert not sides.scheduler.has_work
    assert len(check_objects(sides.cache, sides.shape)) == 3


def test_blocks_are_written_over_by_new_requests_and_by_loads(sides: Sides) -> None:
    sides.save(Request("first", prompt(3, seed=1)), [0, 1, 2])
    request = begin(sides, "a", prompt(3))
    job = sides.compute(request, BLOCKS).saves[0].job
    sides.scheduler.finished("a", BLOCKS)
    other = Request("b", prompt(3, seed=1, more=1))
    assert sides.match(other) == (12, False)
    sides.scheduler.allocated(other, [12, 40, 41, 42], 12)
    step = sides.step()
    assert step.flush == [job]
    assert sides.scheduler.counters.take()["flushes"] == 1
    assert sides.step().flush == []
    sides.run(step)
    sides.tell()
    check_objects(sides.cache, sides.shape)
    end(sides, other)


def test_blocks_that_vllm_has_itself_are_not_written_over(sides: Sides) -> None:
    """A request that begins with blocks that are just being stored only reads them."""
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    other = Request("b", prompt(4))
    sides.match(other, 3)
    sides.scheduler.allocated(other, [*BLOCKS[:3], 40], 0)
    assert sides.step().flush == []
    sides.scheduler.allocated(begin(sides, "c", prompt(4, seed=2), []), [BLOCKS[2]], 0)
    assert len(sides.step().flush) == 1
    sides.tell()
    for name in "abc":
        sides.scheduler.finished(name, BLOCKS)


def test_a_block_that_is_stored_is_no_more_flushed(sides: Sides) -> None:
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    sides.tell()
    assert sides.step(new_blocks=BLOCKS).flush == []
    end(sides, request)


# No room


def test_no_room_for_a_running_request(make: Make) -> None:
    """It is stored later, when there is some."""
    sides = make(**TINY)
    held = fill(sides)
    request = begin(sides, "a", prompt(3, more=3))
    assert not sides.compute(request, BLOCKS, 12).saves
    assert not sides.compute(request, BLOCKS, 1).saves
    assert sides.scheduler.counters.take()["save_waits"] == 2
    held.release()
    assert saved(sides.compute(request, BLOCKS, 1)) == [(request.keys(0, 3), BLOCKS[:3])]
    assert "save_waits" not in sides.scheduler.counters.take()
    end(sides, request)
    assert set(check_objects(sides.cache, sides.shape)) >= set(request.keys())


def test_room_for_a_part(make: Make) -> None:
    sides = make(**TINY)
    held = fill(sides, 2)
    request = begin(sides, "a", prompt(4, more=3))
    assert [save.blocks for save in sides.compute(request, BLOCKS, 16).saves] == [BLOCKS[:2]]
    sides.tell()
    held.release()
    sides.cache.delete([b"0", b"1"])
    assert [save.blocks for save in sides.compute(request, BLOCKS, 1).saves] == [BLOCKS[2:4]]
    end(sides, request)
    assert len(check_objects(sides.cache, sides.shape)) == 4


def test_no_room_for_one_that_is_over(make: Make) -> None:
    """It keeps its blocks until there is."""
    sides = make(**TINY)
    held = fill(sides)
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    assert sides.scheduler.finished("a", BLOCKS[:3])
    assert sides.scheduler.has_work
    for _ in range(3):
        step = sides.step()
        assert (step.saves, step.closed) == ([], [])
    held.release()
    step = sides.step()
    assert (saved(step), step.closed) == ([(request.keys(), BLOCKS[:3])], ["a"])
    assert sides.scheduler.has_work, "it is on its way"
    sides.run(step)
    assert sides.step(new_blocks=[BLOCKS[0]]).flush == [save.job for save in step.saves]
    sides.tell()
    assert not sides.scheduler.has_work
    assert set(check_objects(sides.cache, sides.shape)) >= set(request.keys())
    assert "unsaved_blocks" not in sides.scheduler.counters.take()


def test_no_room_until_the_deadline(make: Make) -> None:
    sides = make(**TINY, save_timeout_s=0.1)
    held = fill(sides, 3)
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    assert sides.scheduler.finished("a", BLOCKS)
    assert sides.step().closed == []
    closed = []
    eventually(lambda: closed.extend(sides.step().closed) or bool(closed), "the deadline")
    assert closed == ["a"]
    assert sides.scheduler.counters.take()["unsaved_blocks"] == 2
    sides.tell()
    assert not sides.scheduler.has_work
    held.release()


def test_no_room_and_no_blocks(make: Make) -> None:
    """A preempted request has lost its blocks; one that vLLM has set back has lost some."""
    sides = make(**TINY)
    held = fill(sides)
    for name, blocks in (("a", []), ("b", BLOCKS[:1])):
        request = begin(sides, name, prompt(3))
        sides.compute(request, BLOCKS)
        assert sides.scheduler.finished(name, blocks) == bool(blocks)
    held.release()
    step = sides.step()
    assert saved(step) == [(request.keys(0, 1), BLOCKS[:1])]
    assert step.closed == ["b"]
    sides.run(step)
    sides.tell()
    check_objects(sides.cache, sides.shape)


def test_a_preempted_request_stores_what_it_computes_anew(make: Make) -> None:
    sides = make(**TINY)
    held = fill(sides)
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    request.num_computed_tokens = 0
    held.release()
    sides.match(request)
    sides.scheduler.allocated(request, [40, 41, 42], 0)
    assert saved(sides.compute(request, [40, 41, 42])) == [(request.keys(), [40, 41, 42])]
    end(sides, request, [40, 41, 42])
    assert set(check_objects(sides.cache, sides.shape)) >= set(request.keys())


def test_a_preempted_request_saves_what_was_evicted_meanwhile(sides: Sides) -> None:
    request = begin(sides, "a", prompt(3))
    sides.compute(request, BLOCKS)
    sides.tell()
    with shmcache.attach(sides.arena) as cache:
        assert cache.delete(request.keys(1, 2)) == [OK]
    request.num_computed_tokens = 0
    assert sides.match(request) == (4, False)
    sides.scheduler.allocated(request, [40, 41, 42], 4)
    request.num_computed_tokens = 4
    assert saved(sides.compute(request, [40, 41, 42])) == [(request.keys(1, 2), [41])]
    end(sides, request, [40, 41, 42])


# Reports


def test_all_ranks_must_be_through(sides: Sides) -> None:
    request = begin(sides, "a", prompt(3))
    sides.ranks[1].gate.shut("save")
    sides.compute(request, BLOCKS)
    sides.scheduler.finished("a", BLOCKS)
    eventually(lambda: bool(sides.ranks[0].worker._report), "rank 0 is through")
    report, _, _ = sides.report()
    assert report.done == {0: 1}
    sides.scheduler.done(report)
    assert sides.scheduler.has_work
    assert sides.cache.status(request.keys()) == [IN_FLIGHT] * 3
    assert sides.step(new_blocks=BLOCKS).flush == [0]
    sides.ranks[1].gate.open("save")
    sides.tell()
    assert not sides.scheduler.has_work
    assert sides.scheduler.counters.take()["saved_blocks"] == 3
    check_objects(sides.cache, sides.shape)


def test_reports_add_up() -> None:
    one, other = Report(), Report()
    assert not one
    one.done.update([1, 2])
    other.done.update([2, 3])
    other.failed.add(3)
    other.bad_epoch = 4
    one.add(other)
    assert (one.done, one.failed, one.bad_epoch) == ({1: 1, 2: 2, 3: 1}, {3}, 4)
    assert other
    assert Report(bad_epoch=0)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_what_a_rank_could_not_copy_is_stored_later(sides: Sides, ranks: list[int]) -> None:
    request = begin(sides, "a", prompt(3, more=3))
    for rank in ranks:
        sides.ranks[rank].gate.errors["save"] = RuntimeError("no copy")
    assert sides.compute(request, BLOCKS, 12).saves[0].blocks == BLOCKS[:3]
    sides.tell()
    assert sides.cache.lookup(request.keys()) == 0
    assert "saved_blocks" not in sides.scheduler.counters.take()
    assert sides.compute(request, BLOCKS, 1).saves[0].blocks == BLOCKS[:3]
    sides.tell()
    assert not sides.compute(request, BLOCKS, 1).saves
    assert len(check_objects(sides.cache, sides.shape)) == 3
    end(sides, request)


def test_a_failure_is_told_by_the_first_report_or_by_the_last(sides: Sides) -> None:
    for failing in (0, 1):
        request = begin(sides, f"r{failing}", prompt(2, seed=failing))
        sides.ranks[failing].gate.errors["save"] = RuntimeError("no copy")
        sides.compute(request, BLOCKS)
        sides.settle()
        for rank in sides.ranks:
            sides.scheduler.done(rank.worker.report())
        assert sides.cache.lookup(request.keys()) == 0
        assert len(sides.compute(request, BLOCKS, 0).saves) == 1
        end(sides, request)


def test_a_rank_that_is_late_joins_no_other_write(sides: Sides) -> None:
    """Rank 0 gives up before rank 1 begins. What rank 1 copies then is part of no object."""
    request = begin(sides, "a", prompt(3, more=1))
    sides.ranks[0].gate.errors["save"] = RuntimeError("no copy")
    sides.ranks[1].gate.shut("save")
    sides.ranks[1].worker._saver.submit(sides.ranks[1].copier.save, [], [], None)
    sides.compute(request, BLOCKS, 12)
    eventually(lambda: bool(sides.ranks[0].worker._report), "rank 0 has given up")
    sides.scheduler.done(sides.ranks[0].worker.report())
    assert not sides.compute(request, BLOCKS, 0).saves, "until all ranks have said so"
    sides.ranks[1].gate.open("save")
    sides.tell()
    assert sides.cache.lookup(request.keys()) == 0
    assert len(sides.compute(request, BLOCKS, 1).saves) == 1
    sides.tell()
    assert len(check_objects(sides.cache, sides.shape)) == 3
    end(sides, request)


def test_a_write_lease_that_is_over(make: Make) -> None:
    """The reservation is gone before a rank comes: nothing is published, all is stored again."""
    sides = make(write_lease_s=0.05)
    request = begin(sides, "a", prompt(2, more=3))
    computed = {request: (8, BLOCKS)}
    step = sides.step(computed)
    time.sleep(0.1)
    with shmcache.attach(sides.arena) as other:
        assert other.put(request.keys()[0], b"another") is OK
        assert other.delete(request.keys(0, 1)) == [OK]
        sides.run(step, computed)
        request.num_computed_tokens = 8
        sides.tell()
        assert other.lookup(request.keys(0, 1)) == 0
    for _ in range(3):  # the ranks have begun a write of their own; that is given up, and then it is saved
        sides.compute(request, BLOCKS, 1)
        sides.tell()
    end(sides, request)
    assert set(check_objects(sides.cache, sides.shape)) == set(request.keys())
