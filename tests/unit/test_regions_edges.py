"""Regions in one process at their edges: streams that pass late, batches that are dropped, regions that are gone."""

# ruff: noqa: ARG001 # most tests need a machine that is there

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import cuda_double
import pytest
from arena_support import TIMEOUT_S, Join
from cuda_names import CUresult
from region_support import CAPACITY, end_process, eventually, held, put

import shmcache
from shmcache import (
    ArenaBusyError,
    Cache,
    ClosedError,
    DeviceError,
    Layout,
    Status,
    ViewInUseError,
    attachment,
    later,
    regions,
)

OK, NOT_FOUND = Status.OK, Status.NOT_FOUND
BF16 = Layout((4, 8), "bfloat16")


# What is given back late


POLLS: dict[str, Callable[[Cache], object]] = {
    "lookup": lambda cache: cache.lookup([b"k"]),
    "status": lambda cache: cache.status([b"k"]),
    "read": lambda cache: cache.read([b"k"]).release(),
    "reserve_write": lambda cache: cache.reserve_write([b"w"], 8).abort(),
    "evict": lambda cache: cache.evict(1),
    "reap": lambda cache: cache.reap(),
}


def test_a_thread_alone_looks_at_streams(double: cuda_double.Double, cache: Cache) -> None:
    inside, go, asked = threading.Event(), threading.Event(), []

    def ask() -> None:
        asked.append(threading.current_thread().name)
        inside.set()
        assert go.wait(TIMEOUT_S)

    cache.put(b"k", b"x")
    double.before["cuEventQuery"] = ask
    cache.read([b"k"]).release_after(double.make_stream())
    assert inside.wait(TIMEOUT_S)
    assert cache.status([b"k"]) == [OK], "it does not wait"
    assert asked == ["shmcache-later"]
    go.set()
    eventually(lambda: held(cache.name) == 0)
    assert not double.streams.events


def test_given_back_once(double: cuda_double.Double, cache: Cache) -> None:
    cache.put(b"k", b"x")
    one, two = cache.read([b"k"]), cache.read([b"k"])
    stream = double.make_stream()
    double.hold(stream)
    one.release_after(stream)
    one.release_after(stream)
    one.release()
    double.let_go(stream)
    eventually(lambda: not double.streams.events)
    assert held(cache.name) == 1
    two.release()


def test_release_after_of_a_closed_cache(double: cuda_double.Double, join: Join) -> None:
    cache = join()
    cache.put(b"k", b"x")
    batch = cache.read([b"k"])
    cache.close()
    with pytest.raises(ClosedError):
        batch.release_after(double.make_stream())
    assert not double.streams.events


def test_a_refused_release_leaves_no_event(double: cuda_double.Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    tensors = batch.tensors()
    with pytest.raises(ViewInUseError):
        batch.release_after(double.make_stream())
    assert not double.streams.events
    del tensors
    batch.release()


def test_a_driver_that_is_shut_down_runs_nothing_any_more(double: cuda_double.Double, cache: Cache) -> None:
    cache.put(b"k", b"x")
    stream = double.make_stream()
    for _ in range(2):  # the thread lives on
        double.hold(stream)
        cache.read([b"k"]).release_after(stream)
        double.fail["cuCtxPushCurrent"] = CUresult.CUDA_ERROR_DEINITIALIZED
        eventually(lambda: held(cache.name) == 0)
        del double.fail["cuCtxPushCurrent"]
        double.let_go(stream)


def test_the_thread_is_told_of_new_streams(
    double: cuda_double.Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "_LOOK_S", 10 * TIMEOUT_S)
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    with cache.read([b"k"]) as batch:
        batch.tensors()
    time.sleep(0.05)  # the thread looks at regions alone
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)
    owner.evict(1, region=1)
    cache.close()  # or its owner would wait for the thread, which looks no more


def test_close_does_not_wait_for_ever(double: cuda_double.Double, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "_STREAMS_S", 0.01)
    cache = join()
    cache.put(b"k", b"x")
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    with pytest.raises(ArenaBusyError, match="synchronize the stream, then close"):
        cache.close()
    assert held(cache.name) == 1
    double.let_go(stream)
    cache.close()


@pytest.mark.parametrize("call", POLLS)
def test_calls_that_look_after_streams(
    double: cuda_double.Double, cache: Cache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(later, "_POLL_S", 10 * TIMEOUT_S)
    cache.put(b"k", b"x")
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    time.sleep(0.02)  # the thread has looked, and does not again
    double.let_go(stream)
    POLLS[call](cache)
    assert not double.streams.events


# Dropped batches


def test_a_dropped_batch_of_which_only_device_tensors_are_left(gpus: Any, cache: Cache) -> None:
    put(cache, [b"k"], BF16, cache.add_region("cuda:0", CAPACITY))
    cache.put(b"h", b"x")
    tensors = cache.read([b"k", b"h"]).tensors()
    del tensors[1]
    gc.collect()
    assert held(cache.name) == 2
    del tensors[0]
    gc.collect()
    assert held(cache.name) == 0


@pytest.mark.parametrize("how", ["release", "drop"])
def test_a_reader_whose_stream_broke(
    double: cuda_double.Double, cache: Cache, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    noted: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", noted.append)
    batch = cache.read([b"k"])
    batch.tensors()
    double.fail["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    if how == "release":
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            batch.release()
    del batch
    assert held(cache.name) == 0
    assert noted == []


def test_a_region_whose_objects_a_stream_still_reads(
    double: cuda_double.Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAVE_S", 0.5)
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    stream = double.make_stream()
    double.hold(stream)
    batch = cache.read([b"k"])
    batch.tensors()
    batch.release_after(stream)
    with pytest.warns(RuntimeWarning, match="its memory stays allocated"):
        owner.remove_region(1)
    assert len(double.owned) == 1
    double.let_go(stream)
    eventually(lambda: shmcache.inspect(cache.name).regions == ())
    end_process(double)


def test_close_while_tensors_of_anothers_region_are_alive(double: cuda_double.Double, join: Join) -> None:
    owner, reader = join(), join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    (tensor,) = reader.read([b"k"]).tensors()
    with pytest.raises(ViewInUseError, match="tensors in region 1 are alive"):
        reader.close()
    assert shmcache.inspect(owner.name).regions[0].opened == (reader.lane,)
    del tensor
    reader.close()
    assert shmcache.inspect(owner.name).regions[0].opened == ()


def test_a_region_that_is_lost_while_another_is_opened(
    double: cuda_double.Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAVE_S", 0.5)
    owners = {number: join() for number in (1, 2)}
    for number, owner in owners.items():
        put(owner, [b"%d" % number], 64, owner.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"1", b"2"])
    mapped = regions.Regions.mapped

    def then_lose(self: regions.Regions, number: int, *, write: bool = False) -> Any:
        found = mapped(self, number, write=write)
        if owners:
            threads.append(threading.Thread(target=owners.pop(number).remove_region, args=(number,)))
            owners.clear()
            threads[0].start()
            eventually(lambda: "lost" in {r.state for r in shmcache.inspect(cache.name).regions})
        return found

    threads: list[threading.Thread] = []
    monkeypatch.setattr(regions.Regions, "mapped", then_lose)
    tensors = batch.tensors()
    opened = {r.number for r in shmcache.inspect(cache.name).regions if cache.lane in r.opened}
    assert opened == {1, 2}, "what tensors are in stays open"
    assert [bytes(t.tolist()) for t in tensors] == [b"\x07" * 64] * 2
    del tensors
    batch.release()
    threads[0].join(TIMEOUT_S)
    assert len(double.owned) == 1


def test_without_a_thread(double: cuda_double.Double, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    cache = join()
    for _ in range(2):
        cache.put(b"k", b"x")
        cache.read([b"k"]).release_after(double.make_stream())
        assert cache.delete([b"k"]) == [OK]
    cache.put(b"k", b"x")
    cache.read([b"k"]).release_after(double.make_stream())
    cache.close()
    assert not double.streams.events


# What is told of regions


def test_only_regions_there_count(double: cuda_double.Double, cache: Cache) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    put(cache, [b"k"], 64, number)
    with pytest.raises(DeviceError, match="no region on cuda:1"):
        cache.reserve_write([b"w"], 8, region="cuda:1")
    batch = cache.read([b"k"])
    cache.remove_region(number)
    with pytest.raises(DeviceError, match="no region on cuda:0"):
        cache.reserve_write([b"w"], 8, region="cuda:0")
    batch.release()


def test_a_lost_region_cannot_be_opened_again(
    double: cuda_double.Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAVE_S", 0.01)
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    tensors = batch.tensors()
    with pytest.warns(RuntimeWarning, match="its memory stays allocated"):
        owner.close()
    with pytest.raises(DeviceError, match="owner of region 1 is gone|^region"):
        cache.open_region(1)
    del tensors
    batch.release()
    end_process(double)


@pytest.mark.parametrize(("capacity", "pages"), [(CAPACITY, 1), (2 << 20, 2)])
def test_an_allocation_is_of_whole_pages(double: cuda_double.Double, cache: Cache, capacity: int, pages: int) -> None:
    before = dict(regions._exported)
    number = cache.add_region("cuda:0", capacity)
    assert list(double.owned.values()) == [pages * (2 << 20)]
    assert len(regions._exported) == len(before) + 1
    cache.remove_region(number)
    assert regions._exported == before


def test_views_of_device_objects(gpus: Any, cache: Cache) -> None:
    put(cache, [b"d"], 64, cache.add_region("cuda:0", CAPACITY))
    cache.put(b"h", b"host")
    with cache.read([b"d"]) as batch:
        assert (batch.views, batch.arrays()) == ([None], [None])
    batch = cache.read([b"d", b"h"])
    part = (batch.views[1] or memoryview(b""))[1:]
    with pytest.raises(ViewInUseError):
        batch.release()
    del part
    batch.release()


def test_a_batch_that_is_published_keeps_no_region(gpus: Any, cache: Cache) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    batch = cache.reserve_write([b"k"], 64, region=number)
    batch.tensors()
    batch.publish()
    cache.remove_region(number)
    assert cache.status([b"k"]) == [NOT_FOUND]


def test_abort_write_where_a_stream_broke(double: cuda_double.Double, cache: Cache) -> None:
    batch = cache.reserve_write([b"k"], 64, region=cache.add_region("cuda:0", CAPACITY))
    batch.tensors()
    double.fail["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    assert cache.abort_write([b"k"]) == [OK]
    assert cache.status([b"k"]) == [NOT_FOUND]


def test_the_default_stream_of_another_device(double: cuda_double.Double, cache: Cache) -> None:
    cache.put(b"k", b"x")
    stream = double.default_stream(1)
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    time.sleep(0.02)
    assert cache.delete([b"k"]) == [Status.LOCKED]
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)


def test_a_look_within_a_look(double: cuda_double.Double, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a finalizer may begin it."""
    monkeypatch.setattr(later, "_POLL_S", 10 * TIMEOUT_S)
    cache.put(b"k", b"x")
    kept, batch, stream = cache.read([b"k"]), cache.read([b"k"]), double.make_stream()
    double.hold(stream)
    batch.release_after(stream)
    time.sleep(0.02)
    double.let_go(stream)

    def again() -> None:
        double.before.clear()
        cache.status([b"k"])

    double.before["cuEventQuery"] = again
    cache.status([b"k"])
    assert held(cache.name) == 1, "one share of two, and once"
    assert not double.streams.events
    kept.release()
