"""What may come between: finalizers in any thread, other threads and caches, forks, drivers and arenas that break."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cuda_double
import cuda_torch
import pytest
from arena_support import TIMEOUT_S, Join
from cuda_names import CUresult
from region_support import CAPACITY, end_process, eventually, held, put

import shmcache
from shmcache import Cache, ClosedError, DeviceError, Status, later, regions
from shmcache.segment import path_of

OK = Status.OK
Double = cuda_double.Double


@pytest.fixture
def nobody_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread looks once, and then not within a test."""
    monkeypatch.setattr(later, "_POLL_S", 60)


def release_late(double: Double, cache: Cache, key: bytes) -> Any:
    """A share of an object that goes back when the stream that this gives is let go."""
    stream = double.make_stream()
    double.hold(stream)
    cache.read([key]).release_after(stream)
    time.sleep(0.05)  # the thread has looked
    return stream


# Forked children


def in_child(double: Double, use: Callable[[], object]) -> int:
    """0: all that ``use`` did was done, and without a call of the driver."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            before = len(double.calls)
            use()
            gc.collect()
            status = 0 if len(double.calls) == before else 2
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("name", ["finish_write", "finish_write_and_reserve_read", "abort_write", "status"])
def test_a_forked_child_asks_no_driver(double: Double, cache: Cache, nobody_polls: None, name: str) -> None:
    del nobody_polls
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    stream = release_late(double, cache, b"k")

    def use() -> None:
        with pytest.raises(ClosedError):
            getattr(cache, name)([b"k"])

    assert in_child(double, use) == 0
    double.let_go(stream)


def test_tensors_dropped_in_a_forked_child(double: Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    tensors = cache.read([b"k"]).tensors()
    assert in_child(double, tensors.clear) == 0
    assert held(cache.name) == 1


# A stream that has passed keeps nothing


@pytest.mark.parametrize("call", ["remove_region", "clear", "put"])
def test_every_call_looks_after_streams(double: Double, cache: Cache, nobody_polls: None, call: str) -> None:
    del nobody_polls
    number = cache.add_region("cuda:0", CAPACITY)
    put(cache, [b"k"], 64, number)
    stream = double.make_stream()
    double.hold(stream)
    batch = cache.read([b"k"])
    batch.tensors()
    batch.release_after(stream)
    time.sleep(0.05)
    double.let_go(stream)
    calls: dict[str, Callable[[], object]] = {
        "remove_region": lambda: cache.remove_region(number),
        "clear": cache.clear,
        "put": lambda: cache.put(b"other", b"x"),
    }
    calls[call]()
    assert held(cache.name) == 0


def test_a_broken_stream_keeps_no_loan(double: Double, cache: Cache, join: Join) -> None:
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    batch.tensors()
    double.fail["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        batch.release()
    assert held(cache.name) == 0
    cache.close()
    assert batch is not None


def test_the_error_in_flight_is_what_is_seen(double: Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    batch.tensors()
    double.fail["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(ZeroDivisionError), batch:
        raise ZeroDivisionError
    assert held(cache.name) == 0


# Memory stays while a kernel reads it


@pytest.mark.parametrize("keys", [[b"k"], [b"k", b"host"]])
def test_a_dropped_batch_of_which_a_kernel_reads(
    double: Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch, keys: list[bytes]
) -> None:
    monkeypatch.setattr(regions, "_LEAVE_S", 0.3)
    owner, stream = join(), double.make_stream()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    cache.put(b"host", b"x")
    double.hold(stream)
    tensors = cache.read(keys).tensors()

    def drop() -> None:
        with cuda_torch.current_stream(stream):
            double.launch(stream, lambda: None)
            tensors[0] = None  # the host tensor, where there is one, stays

    thread = threading.Thread(target=drop)
    thread.start()
    time.sleep(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the memory stays is what is looked for
        owner.remove_region(1)
    left = len(double.owned)
    double.let_go(stream)
    thread.join(TIMEOUT_S)
    assert left == 1, "freed while a kernel reads it"
    tensors.clear()
    end_process(double)


# Finalizers run in any thread, wherever Python allocates


def collect_in_the_thread(double: Double, ready: threading.Event, go: threading.Event) -> threading.Event:
    """Has the garbage collected by the thread that looks at streams, as it looks."""
    collected = threading.Event()

    def collect() -> None:
        if threading.current_thread().name == "shmcache-later":
            del double.before["cuEventQuery"]
            ready.set()
            go.wait(TIMEOUT_S)
            gc.collect()
            collected.set()

    double.before["cuEventQuery"] = collect
    return collected


@pytest.fixture
def no_garbage_collector() -> Any:
    """Garbage is collected when a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it is dropped without close: that is what this is about
def test_a_cache_that_the_thread_finalizes(double: Double, arena: str, join: Join, no_garbage_collector: None) -> None:
    del no_garbage_collector
    other, cache = join(), shmcache.attach(arena)
    cache.put(b"k", b"x")
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    ring: list[Any] = [cache]
    ring.append(ring)
    go = threading.Event()
    go.set()
    del cache, ring
    collected = collect_in_the_thread(double, threading.Event(), go)
    assert collected.wait(TIMEOUT_S), "the thread waits for itself"
    double.let_go(stream)
    eventually(lambda: held(other.name) == 0)


def test_a_finalizer_that_releases_in_the_thread(double: Double, cache: Cache, no_garbage_collector: None) -> None:
    del no_garbage_collector

    class Holder:
        def __init__(self, batch: shmcache.ReadBatch) -> None:
            self.batch = batch
            self.ring = self

        def __del__(self) -> None:
            self.batch.release()

    for key in (b"k", b"l", b"m"):
        cache.put(key, b"x")
    Holder(cache.read([b"l"]))
    stream, ready, go = double.make_stream(), threading.Event(), threading.Event()
    double.hold(stream)
    collected = collect_in_the_thread(double, ready, go)
    cache.read([b"k"]).release_after(stream)
    assert ready.wait(TIMEOUT_S)
    batch = cache.read([b"m"])
    thread = threading.Thread(target=batch.release_after, args=(stream,), daemon=True)
    thread.start()
    time.sleep(0.1)
    go.set()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "each has what the other wants"
    assert collected.wait(TIMEOUT_S)
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)


# The thread


def test_a_thread_that_cannot_be_started(double: Double, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cache.put(b"k", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        cache.read([b"k"]).release_after(double.make_stream())
        assert cache.delete([b"k"]) == [OK], "who calls looks after it"
    cache.put(b"k", b"x")
    stream = release_late(double, cache, b"k")
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)


def test_the_thread_bears_a_damaged_table(
    double: Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, looks = join(), []
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    with cache.read([b"k"]) as batch:
        batch.tensors()

    def damaged(_regions: regions.Regions, _mapped: regions.Mapped) -> bool:
        looks.append(1)
        raise shmcache.ArenaDamagedError("a damaged entry")

    with monkeypatch.context() as patch:
        patch.setattr(regions.Regions, "_is_still", damaged)
        eventually(lambda: bool(looks))
    cache.put(b"host", b"x")
    stream = release_late(double, cache, b"host")
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)


# Others in the same process


def test_a_region_is_opened_as_soon_as_it_is_in_the_table(
    double: Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, record = join(), regions.Regions._record
    assert double.owned == {}

    def and_open(self: regions.Regions, *about: Any) -> int:
        number = record(self, *about)
        other.open_region(number)
        return number

    monkeypatch.setattr(regions.Regions, "_record", and_open)
    cache.add_region("cuda:0", CAPACITY)
    other.close()


def test_tensors_are_made_while_others_publish(double: Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    batch = cache.reserve_write([b"l"], 64, region=cache.add_region("cuda:1", CAPACITY))

    def meanwhile() -> None:
        double.before.clear()
        batch.tensors()

    double.before["cuStreamSynchronize"] = meanwhile
    assert cache.finish_write([b"l"]) == [OK]
    batch.abort()


# What is refused, and what breaks


def test_close_in_a_damaged_arena(double: Double, arena: str) -> None:
    cache = shmcache.attach(arena)
    cache.add_region("cuda:0", CAPACITY)
    os.truncate(path_of(arena), 4096)
    with pytest.raises(shmcache.ArenaDamagedError):
        cache.verify()
    with pytest.warns(RuntimeWarning, match="lies in an arena that cannot tell who has it open, so its memory stays"):
        cache.close()
    assert cache.closed
    end_process(double)


def test_what_is_no_region(double: Double, cache: Cache) -> None:
    cache.add_region("cuda:0", CAPACITY)
    for region in (0, None):
        with pytest.raises(ValueError, match="^region: expected one of device memory"):
            cache.open_region(region)  # type: ignore[arg-type] # None is what is tried
    with pytest.raises(ValueError, match="^region: expected one that this process has added"):
        cache.remove_region(True)  # it is no number
    with pytest.raises(ValueError, match=r"^capacity: expected at most 2\*\*48 bytes"):
        cache.add_region("cuda:0", 2**70)
    assert len(double.owned) == 1


# What the driver may be asked when


def test_no_driver_call_under_the_arena_lock(double: Double, cache: Cache, join: Join) -> None:
    under: list[str] = []

    def look(name: str) -> Callable[[], None]:
        def note() -> None:
            lock = shmcache.inspect(cache.name).lock
            if lock is not None:
                under.append(name)

        return note

    double.before.update({name: look(name) for name in dir(double) if name.startswith("cu")})
    other = join()
    number = cache.add_region("cuda:0", CAPACITY)
    put(other, [b"a", b"b"], 64, number)
    with other.read([b"a"]) as batch:
        batch.tensors()
    other.read([b"b"]).release_after(double.make_stream())
    other.evict(1, region="cuda:0")
    other.close()
    cache.remove_region(number)
    cache.close()
    assert {"cuMemAlloc", "cuMemFree", "cuEventQuery", "cuStreamSynchronize"} <= {*double.calls}
    assert under == []


def test_reaping_asks_no_driver(double: Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    before = len(double.calls)
    cache.reap()
    cache.verify()
    cache.delete([b"k"])
    cache.clear()
    assert len(double.calls) == before
