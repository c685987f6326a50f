"""Write batches and read batches: what ends them, in which order, by whom, and what is left after an error."""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from types import FrameType
from typing import Any

import numpy as np
import pytest
from arena_support import Join, contents, pattern, run_python

import shmcache
from shmcache import Cache, ClosedError, Status, ViewInUseError

OK = Status.OK


class InterruptError(Exception):
    """What a test's signal handler raises."""


@pytest.fixture
def stored(cache: Cache) -> Cache:
    """A cache with the objects a, b and c."""
    for key in (b"a", b"b", b"c"):
        assert cache.put(key, pattern(key, 1000)) == OK
    return cache


def held(cache: Cache) -> int:
    return cache.stats().held


# Writing


def test_a_write_batch_publishes_what_was_written(cache: Cache) -> None:
    with cache.reserve_write([b"a", b"b"], [10, 5000]) as batch:
        assert batch.status == [OK, OK]
        assert cache.status(batch.keys) == [Status.IN_FLIGHT] * 2
        for key, view in zip(batch.keys, batch.views, strict=True):
            assert view is not None
            assert not view.readonly
            view[:] = pattern(key, len(view))
    with cache.read([b"a", b"b"]) as found:
        assert contents(found) == [pattern(b"a", 10), pattern(b"b", 5000)]


def test_publish_gives_a_status_a_key(cache: Cache) -> None:
    cache.put(b"there", b"x")
    batch = cache.reserve_write([b"there", b"new", b"new"], 8)
    assert batch.status == [Status.EXISTS, OK, Status.IN_FLIGHT]
    assert [view is None for view in batch.views] == [True, False, True]
    assert [array is None for array in batch.arrays()] == [True, False, True]
    assert batch.publish() == [Status.EXISTS, OK, Status.IN_FLIGHT]
    assert cache.status([b"new"]) == [OK]


@pytest.mark.parametrize("how", ["publish", "abort"])
@pytest.mark.parametrize("already", ["finish_write", "abort_write"])
def test_a_batch_whose_keys_were_finished_otherwise(cache: Cache, how: str, already: str) -> None:
    batch = cache.reserve_write([b"a", b"b"], 8)
    assert getattr(cache, already)([b"a"]) == [OK]
    first = Status.EXISTS if already == "finish_write" else Status.NOT_FOUND
    assert getattr(batch, how)() == [first, OK]
    assert cache.status([b"a"]) == [OK if already == "finish_write" else Status.NOT_FOUND]
    assert cache.status([b"b"]) == [OK if how == "publish" else Status.NOT_FOUND]


def test_publishing_a_batch_whose_slots_hold_other_objects_now(cache: Cache) -> None:
    batch = cache.reserve_write([b"a"], 8)
    cache.abort_write([b"a"])
    again = cache.reserve_write([b"a"], 8)
    assert batch.publish() == [Status.NOT_FOUND]
    assert cache.status([b"a"]) == [Status.IN_FLIGHT]
    assert again.publish() == [OK]


@pytest.mark.parametrize("how", ["publish", "publish_and_reserve_read", "abort"])
@pytest.mark.parametrize("then", ["publish", "publish_and_reserve_read", "abort", "views", "arrays", "tensors"])
def test_a_finished_write_batch_is_closed(cache: Cache, how: str, then: str) -> None:
    batch = cache.reserve_write([b"a"], 8)
    view = batch.views[0]
    assert view is not None
    getattr(batch, how)()
    with pytest.raises(ClosedError):
        getattr(batch, then)() if then != "views" else batch.views
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    assert batch.keys == [b"a"]
    assert batch.status == [OK]


def test_publish_and_reserve_read_grants_to_the_ranks(join: Join) -> None:
    controller = join("engine", None, 3)
    ranks = [join("engine", rank, 3) for rank in range(3)]
    batch = controller.reserve_write([b"a", b"b"], 8)
    assert batch.publish_and_reserve_read(1) == [OK, OK]
    assert controller.stats().reserved == 4
    assert [rank.finish_read([b"a"]) for rank in ranks] == [[OK], [OK], [Status.NO_SHARE]]
    assert [rank.finish_read([b"b"]) for rank in ranks] == [[OK], [OK], [Status.NO_SHARE]]


def test_an_exception_aborts(cache: Cache) -> None:
    with pytest.raises(InterruptError), cache.reserve_write([b"a"], 8):
        raise InterruptError
    assert cache.status([b"a"]) == [Status.NOT_FOUND]
    assert cache.stats().used_bytes == 0


@pytest.mark.parametrize("how", ["publish", "abort"])
def test_leaving_a_finished_batch_does_nothing(cache: Cache, how: str) -> None:
    with cache.reserve_write([b"a"], 8) as batch:
        getattr(batch, how)()
    assert cache.status([b"a"]) == [OK if how == "publish" else Status.NOT_FOUND]


def test_a_dropped_write_batch_is_aborted(cache: Cache) -> None:
    batch = cache.reserve_write([b"a", b"b"], 8)
    with pytest.warns(ResourceWarning, match="2 objects of arena .* dropped unfinished"):
        del batch
    assert cache.status([b"a", b"b"]) == [Status.NOT_FOUND] * 2
    assert cache.stats().used_bytes == 0


def test_a_dropped_write_batch_is_aborted_where_warnings_are_errors(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda caught: unraisable.append(caught.exc_type))
    batch = cache.reserve_write([b"a"], 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del batch
    assert unraisable == [ResourceWarning]
    assert cache.status([b"a"]) == [Status.NOT_FOUND]


def test_a_dropped_batch_without_reservations_says_nothing(cache: Cache) -> None:
    cache.put(b"a", b"x")
    batch = cache.reserve_write([b"a"], 8)
    del batch
    nothing = cache.reserve_write([], 8)
    del nothing
    assert cache.status([b"a"]) == [OK]


# Reading


def test_a_read_batch_holds_one_share_a_key(stored: Cache) -> None:
    batch = stored.read([b"a", b"zz", b"b", b"a"])
    assert batch.keys == [b"a", b"zz", b"b", b"a"]
    assert batch.status == [OK, Status.NOT_FOUND, OK, OK]
    assert (batch.hits, len(batch), held(stored)) == (1, 4, 3)
    assert batch.views == [pattern(b"a", 1000), None, pattern(b"b", 1000), pattern(b"a", 1000)]
    assert stored.delete([b"a", b"b", b"c"]) == [Status.LOCKED, Status.LOCKED, OK]
    batch.release()
    batch.release()
    assert held(stored) == 0
    assert stored.delete([b"a", b"b"]) == [OK, OK]


def test_a_prefix_stops_at_the_first_miss(stored: Cache) -> None:
    with stored.read([b"a", b"b", b"zz", b"c"], prefix=True) as batch:
        assert batch.status == [OK, OK, Status.NOT_FOUND, Status.NOT_FOUND]
        assert (batch.hits, held(stored)) == (2, 2)
        assert [view is None for view in batch.views] == [False, False, True, True]


def test_a_prefix_stops_at_a_key_in_flight(stored: Cache) -> None:
    with stored.reserve_write([b"w"], 8), stored.read([b"a", b"w", b"b"], prefix=True) as batch:
        assert batch.status == [OK, Status.IN_FLIGHT, Status.NOT_FOUND]
        assert held(stored) == 1


def test_batches_of_no_keys(cache: Cache) -> None:
    with cache.read([]) as found, cache.reserve_write([], 8) as written:
        assert (found.keys, found.status, found.views, found.hits, found.arrays()) == ([], [], [], 0, [])
        assert (written.keys, written.status, written.views, written.tensors()) == ([], [], [], [])
        assert written.publish() == []


def test_an_exception_releases(stored: Cache) -> None:
    batch = stored.read([b"a", b"b"])
    assert contents(batch)[0] == pattern(b"a", 1000)
    with pytest.raises(InterruptError), batch:
        raise InterruptError
    assert held(stored) == 0


def read_and_fail(cache: Cache) -> None:
    with cache.read([b"a"]) as batch:
        part = batch.views[0][:10]  # type: ignore[index] # OK, as all of `stored`
        raise InterruptError(bytes(part))


def test_an_exception_with_live_views_is_what_the_caller_sees(stored: Cache) -> None:
    with pytest.raises(InterruptError) as caught:
        read_and_fail(stored)
    assert held(stored) == 1, "the traceback keeps the slice, and the slice the share"
    del caught
    gc.collect()
    assert held(stored) == 0


def test_a_dropped_read_batch_gives_its_shares_back(stored: Cache) -> None:
    batch = stored.read([b"a", b"b"])
    assert batch.views[0] is not None
    del batch
    assert held(stored) == 0


@pytest.mark.parametrize("made", ["views", "arrays", "tensors"])
def test_a_dropped_read_batch_keeps_its_shares_while_something_lives(stored: Cache, made: str) -> None:
    batch = stored.read([b"a"])
    kept = batch.views[0][:] if made == "views" else getattr(batch, made)()[0]  # type: ignore[index] # OK
    del batch
    assert held(stored) == 1
    assert stored.delete([b"a"], force=True) == [Status.LOCKED]
    assert bytes(np.asarray(kept)) == pattern(b"a", 1000)
    del kept
    assert stored.delete([b"a"]) == [OK], "the share ends with the last thing that was made from the batch"


# Ends with a batch that only the end of the process takes apart.
FORGETFUL = """
import sys, shmcache
class Engine: pass
engine = Engine()
engine.itself = engine
engine.cache = shmcache.attach(sys.argv[1])
engine.cache.put(b"a", b"x")
engine.batch = engine.cache.read([b"a"])
engine.seen = getattr(engine.batch, sys.argv[2])
print("read")
"""


@pytest.mark.parametrize("made", ["keys", "views", "arrays"])
def test_a_process_that_ends_with_a_batch_says_nothing(arena: str, made: str) -> None:
    done = run_python(FORGETFUL, arena, made)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


@pytest.mark.parametrize("wait_s", ["1", None, True, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [[b"a"], [b"a", b"zz"]])
def test_a_wrong_wait_is_refused_before_anything_is_read(stored: Cache, wait_s: Any, keys: list[bytes]) -> None:
    with pytest.raises((TypeError, ValueError), match="wait_s"):
        stored.read(keys, wait_s=wait_s)
    assert held(stored) == 0


@pytest.mark.parametrize("prefix", [None, 2, "yes"])
def test_a_wrong_prefix_is_refused(stored: Cache, prefix: Any) -> None:
    with pytest.raises(TypeError, match="prefix"):
        stored.read([b"a"], prefix=prefix)
    assert held(stored) == 0


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise InterruptError


def test_an_interrupted_wait_keeps_no_shares(stored: Cache) -> None:
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with stored.reserve_write([b"w"], 8):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(InterruptError):
                stored.read([b"a", b"w"], wait_s=30)
    finally:
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    assert held(stored) == 0


def test_releasing_after_the_cache_was_closed(join: Join) -> None:
    cache = join()
    cache.put(b"a", b"x")
    batch = cache.read([b"a"])
    cache.close()
    assert shmcache.inspect(cache.name).stats.held == 0  # type: ignore[union-attr] # the arena is sound
    batch.release()
    with pytest.raises(ClosedError):
        _ = batch.views
    assert batch.keys == [b"a"]


def test_a_released_batch_is_closed(stored: Cache) -> None:
    batch = stored.read([b"a"])
    batch.release()
    with pytest.raises(ClosedError):
        _ = batch.views
    with pytest.raises(ClosedError):
        batch.arrays()
    with pytest.raises(ClosedError):
        batch.tensors()


def test_two_batches_of_one_object_are_independent(stored: Cache) -> None:
    first, second = stored.read([b"a"]), stored.read([b"a"])
    kept = first.arrays()[0]
    second.release()
    with pytest.raises(ViewInUseError):
        first.release()
    assert held(stored) == 1
    assert bytes(kept) == pattern(b"a", 1000)
    del kept
    first.release()
    assert held(stored) == 0


def test_a_batch_does_not_publish_what_its_slot_holds_now(cache: Cache) -> None:
    before = cache.reserve_write([b"before"], 8)
    assert cache.abort_write([b"before"]) == [Status.OK]
    others = [b"other %d" % i for i in range(cache.stats().slots)]
    now = cache.reserve_write(others, 8)
    assert set(now.status) == {Status.OK}  # every slot, so also the one that `before` had
    assert before.publish() == [Status.NOT_FOUND]
    assert cache.lookup(others) == 0
    now.abort()
    assert cache.verify() == []
