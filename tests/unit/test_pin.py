"""Page-locking an arena for a GPU: all or nothing, undone before memory is unmapped, and told to others."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import cuda_double
import pytest
import torch
from arena_support import Join
from cuda_double import Double, protection, use

import shmcache
from shmcache import Cache, DeviceError, device

CAPACITY = 1 << 20


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Double:
    """A driver with one device that can do all. Before the caches, which are closed with it."""
    return use(monkeypatch, Double())


def pinned_bytes(name: str) -> list[int]:
    """What each lane says it has page-locked."""
    return [lane.gauges.pinned_bytes for lane in shmcache.inspect(name).lanes]


def test_both_mappings_are_registered(driver: Double, cache: Cache) -> None:
    cache.put(b"k", b"there")
    cache.pin()
    flags = sorted(flags for _, flags in driver.registered.values())
    assert flags == [cuda_double.PORTABLE, cuda_double.PORTABLE | cuda_double.READ_ONLY]
    assert {nbytes for nbytes, _ in driver.registered.values()} == {CAPACITY}
    assert pinned_bytes(cache.name) == [CAPACITY]
    stats = cache.stats()
    assert stats.gauges.pinned_bytes == CAPACITY
    assert stats.resident_bytes >= CAPACITY, "all of it has memory"
    with cache.read([b"k"]) as batch:
        assert bytes(batch.views[0] or b"") == b"there"
    assert driver.stack == [], "the thread has the context that it had"


def test_what_is_in_the_arena_stays(driver: Double, cache: Cache) -> None:
    for i in range(40):
        assert cache.put(b"%d" % i, b"%d" % i * 5000) == 0
    cache.pin()
    assert cache.verify() == []
    for i in range(40):
        with cache.read([b"%d" % i]) as batch:
            assert bytes(batch.views[0] or b"") == b"%d" % i * 5000
    assert len(driver.registered) == 2


def test_again_is_nothing_and_unpin_undoes_it(driver: Double, cache: Cache) -> None:
    cache.unpin()
    assert driver.calls == []
    cache.pin()
    cache.pin()
    assert driver.calls.count("cuMemHostRegister") == 2
    cache.unpin()
    cache.unpin()
    assert driver.registered == {}
    assert driver.calls.count("cuMemHostUnregister") == 2
    assert pinned_bytes(cache.name) == [0]
    cache.pin()
    assert len(driver.registered) == 2
    assert pinned_bytes(cache.name) == [CAPACITY]


def test_close_unpins_before_it_unmaps(driver: Double, join: Join) -> None:
    cache = join()
    cache.pin()
    (address, *_) = driver.registered
    cache.close()
    assert driver.registered == {}
    assert protection(address, CAPACITY) is None
    with pytest.raises(shmcache.ClosedError):
        cache.pin()
    with pytest.raises(shmcache.ClosedError):
        cache.unpin()


def test_close_that_is_refused_leaves_it_pinned(driver: Double, cache: Cache) -> None:
    cache.put(b"k", b"x")
    cache.pin()
    batch = cache.read([b"k"])
    view = batch.views[0]
    with pytest.raises(shmcache.ViewInUseError):
        cache.close()
    assert len(driver.registered) == 2
    del view
    batch.release()


def test_in_pieces(driver: Double, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PIECE_BYTES", 100 * 4096)
    cache.pin()
    sizes = sorted(nbytes // 4096 for nbytes, _ in driver.registered.values())
    assert sizes == [56, 56, 100, 100, 100, 100]
    cache.unpin()
    assert driver.registered == {}


@pytest.mark.parametrize("room", [0, CAPACITY // 2, CAPACITY, 2 * CAPACITY - 1])
def test_all_or_nothing(driver: Double, cache: Cache, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(device, "PIECE_BYTES", 64 * 4096)
    driver.room = room
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        cache.pin()
    assert driver.registered == {}
    assert driver.stack == []
    assert pinned_bytes(cache.name) == [0]
    driver.room = 2 * CAPACITY
    cache.pin()
    assert pinned_bytes(cache.name) == [CAPACITY]


def test_a_device_that_cannot_register_read_only_memory(driver: Double, cache: Cache) -> None:
    driver.read_only = False
    with pytest.raises(DeviceError, match="read-only"):
        cache.pin()
    assert driver.registered == {}


def test_no_device(driver: Double, cache: Cache) -> None:
    driver.devices = 0
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_DEVICE"):
        cache.pin()
    assert pinned_bytes(cache.name) == [0]


def test_no_driver(driver: Double, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_flags: int) -> tuple[object, ...]:
        raise RuntimeError("libcuda.so.1 is not there")

    monkeypatch.setattr(sys.modules["cuda.bindings"].__dict__["driver"], "cuInit", missing)
    with pytest.raises(DeviceError, match="no CUDA driver here .*libcuda"):
        cache.pin()
    assert driver.registered == {}


def test_no_bindings(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install 'shmcache\[cuda\]'"):
        cache.pin()


def test_the_threads_own_context_is_used(driver: Double, cache: Cache) -> None:
    driver.devices = 4
    driver.stack.append(1003)
    cache.pin()
    assert "cuDevicePrimaryCtxRetain" not in driver.calls
    assert driver.stack == [1003]
    thread = threading.Thread(target=cache.unpin)  # which has none
    thread.start()
    thread.join()
    assert driver.registered == {}


def test_a_driver_that_is_shut_down_does_not_stop_close(driver: Double, join: Join) -> None:
    cache = join()
    cache.pin()
    driver.shut_down = True
    with pytest.warns(RuntimeWarning, match=r"CUDA_ERROR_DEINITIALIZED.*until this process ends"):
        cache.close()
    assert cache.closed


@pytest.mark.gpu
@pytest.mark.parametrize("config", [shmcache.ArenaConfig("64MiB", block_size="1MiB")])
def test_on_a_device(cache: Cache) -> None:
    bindings = pytest.importorskip("cuda.bindings")
    del bindings
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    layout = shmcache.Layout((1 << 20,), "bfloat16")
    with cache.reserve_write([b"k"], layout) as written:
        written.tensors()[0].fill_(3)
    cache.pin()
    with cache.read([b"k"]) as batch:
        (tensor,) = batch.tensors()
        assert tensor.is_pinned()
        there = tensor.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert float(there.float().mean()) == 3
        del tensor
    assert pinned_bytes(cache.name) == [64 << 20]
    cache.unpin()
    with cache.read([b"k"]) as batch:
        assert not batch.tensors()[0].is_pinned()


def in_a_child(check: Callable[[], bool]) -> bool:
    """Whether it holds in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_a_forked_child_leaves_the_driver_alone(driver: Double, cache: Cache) -> None:
    cache.pin()
    before = len(driver.calls)

    def close() -> bool:
        cache.close()
        return len(driver.calls) == before

    assert in_a_child(close)
    assert len(driver.registered) == 2


@pytest.mark.usefixtures("driver")
def test_who_is_gone_has_nothing_pinned(arena: str, join: Join) -> None:
    cache = join("g", 0, 1)
    cache.pin()
    assert in_a_child(lambda: pinned_bytes(arena) == [CAPACITY])  # as another process sees it
    cache.close()
    assert pinned_bytes(arena) == [0]
    assert join("g", 0, 1).stats().gauges.pinned_bytes == 0
