"""Regions of device memory in one process, on the double of the driver, and on a real one where there is one."""

# ruff: noqa: ARG001, ARG005 # most tests need a machine that is there, and one of two that is given

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cuda_double
import pytest
import torch
from arena_support import TIMEOUT_S, Join
from cuda_names import CUresult
from region_support import CAPACITY, end_process, eventually, held, put

import shmcache
from shmcache import ArenaConfig, Cache, ClosedError, DeviceError, Layout, Status, ViewInUseError, regions

OK, LOST, NOT_FOUND, NO_SPACE = Status.OK, Status.LOST, Status.NOT_FOUND, Status.NO_SPACE
BLOCK = 4096
BF16 = Layout((4, 8), "bfloat16")


# Writing and reading in place


def test_written_and_read_in_place(gpus: Any, cache: Cache, join: Join) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    assert number == 1
    put(cache, [b"a", b"b"], BF16, number)
    for reader in (cache, join()):
        with reader.read([b"a", b"no", b"b"]) as batch:
            assert batch.status == [OK, NOT_FOUND, OK]
            assert (batch.hits, batch.views, batch.arrays()) == (1, [None] * 3, [None] * 3)
            first, none, second = batch.tensors()
            assert none is None
            assert (first.dtype, first.shape) == (torch.bfloat16, (4, 8))
            assert {gpus.contents(t) for t in (first, second)} == {bytes([7]) * 64}
            assert second.data_ptr() - first.data_ptr() == cache_block(cache, number)
            if gpus.kind == "real":
                assert str(first.device) == "cuda:0"
            del first, second
    assert cache.verify() == []


def cache_block(cache: Cache, number: int) -> int:
    """Bytes of a block of a region."""
    return next(r.block_size for r in shmcache.inspect(cache.name).regions if r.number == number)


def test_a_tensor_is_the_memory_itself(gpus: Any, cache: Cache, join: Join) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    put(cache, [b"k"], 100, number)
    reader = join()
    with cache.read([b"k"]) as one, reader.read([b"k"]) as other:
        (mine,), (theirs,) = one.tensors(), other.tensors()
        assert mine.data_ptr() == theirs.data_ptr(), "one process has it at one place"
        assert (mine.dtype, mine.shape) == (torch.uint8, (100,))
        del mine, theirs


DTYPES = ["bfloat16", "float16", "float32", "int64", "uint8", "bool", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_tensor(gpus: Any, cache: Cache, dtype: str) -> None:
    layout = Layout([((3, 5), dtype), ((), dtype), ((2,), "float32")])
    cache.add_region("cuda:0", CAPACITY)
    with cache.reserve_write([b"k"], layout, region="cuda:0") as batch:
        big, single, floats = batch.tensors()[0]
        assert (big.dtype, big.shape, single.shape) == (getattr(torch, dtype), (3, 5), ())
        gpus.fill(floats, 0x40)
        gpus.fill(big.view(torch.uint8), 1)
        del big, single, floats
    with cache.read([b"k"]) as batch:
        big, single, floats = batch.tensors()[0]
        assert floats.tolist() == [3.0039215087890625] * 2
        assert gpus.contents(big) == b"\x01" * big.nbytes
        del big, single, floats


def test_host_and_device_objects_in_one_batch(gpus: Any, cache: Cache) -> None:
    cache.put(b"h", b"host" * 4)
    put(cache, [b"d"], 16, cache.add_region("cuda:0", CAPACITY))
    with cache.read([b"d", b"h", b"no"]) as batch:
        assert batch.views[0] is None
        assert bytes(batch.views[1] or b"") == b"host" * 4
        device, host, none = batch.tensors()
        assert gpus.contents(device) == b"\x07" * 16
        assert bytes(host.tolist()) == b"host" * 4
        assert none is None
        assert batch.arrays()[0] is None
        del device, host
    assert held(cache.name) == 0


def test_which_region_is_meant(gpus: Any, cache: Cache, join: Join) -> None:
    other = join()
    first, own = other.add_region("cuda:0", CAPACITY), cache.add_region("cuda:0", CAPACITY)
    assert (first, own) == (1, 2)
    for region, number in [("cuda:0", own), (first, first), (0, 0), (None, 0)]:
        cache.reserve_write([b"k"], 8, region=region).publish()
        (found,) = shmcache.inspect(cache.name, objects=True).objects or ()
        assert found.region == number
        cache.delete([b"k"])
    third = join()
    third.reserve_write([b"k"], 8, region="cuda:0").publish()
    (found,) = shmcache.inspect(cache.name, objects=True).objects or ()
    assert found.region == first, "the lowest where none is its own"


def test_no_region_there(gpus: Any, cache: Cache) -> None:
    with pytest.raises(DeviceError, match=r"no region on cuda:0; add one: cache\.add_region\('cuda:0'"):
        cache.reserve_write([b"k"], 8, region="cuda:0")
    with pytest.raises(DeviceError, match=r"there is no cuda:99; this process sees \d+ devices"):
        cache.add_region("cuda:99", CAPACITY)
    with pytest.raises(ValueError, match="^region: expected 0 or the number of a region"):
        cache.open_region(1)
    with pytest.raises(ValueError, match="^region: expected one that this process has added"):
        cache.remove_region(1)


@pytest.mark.parametrize("config", [ArenaConfig("64KiB", block_size="4KiB", lanes=8)])
def test_a_large_region_has_large_blocks(gpus: Any, cache: Cache) -> None:
    number = cache.add_region("cuda:0", 64 * BLOCK)  # the arena has 16 blocks
    assert cache_block(cache, number) == 4 * BLOCK
    with pytest.raises(ValueError, match=rf"^capacity: expected a multiple of {4 * BLOCK} bytes"):
        cache.add_region("cuda:0", 65 * BLOCK)
    keys = [b"%d" % i for i in range(16)]
    put(cache, keys, BLOCK + 1, number)
    assert cache.reserve_write([b"more"], 1, region=number).publish() == [OK], "by eviction"
    assert cache.lookup(keys) == 15, "of one chain the last goes first"
    assert cache.verify() == []


# Room


def test_room_is_made_in_the_region_alone(gpus: Any, cache: Cache) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    cache.put(b"host", b"x" * BLOCK)
    put(cache, [b"%d" % i for i in range(64)], BLOCK, number)
    put(cache, [b"new %d" % i for i in range(64)], BLOCK, number)
    assert cache.lookup([b"host"]) == 1, "older than all, but elsewhere"
    with cache.read([b"new 0"]):
        assert cache.reserve_write([b"big"], CAPACITY, region=number).status == [NO_SPACE]
        assert cache.evict(1 << 30) == BLOCK
        assert cache.evict(1 << 30, region=number) == 63 * BLOCK
    assert cache.reserve_write([b"bigger"], CAPACITY + 1, region=number).status == [NO_SPACE]
    put(cache, [b"big"], CAPACITY, number)
    assert cache.lookup([b"new 0"]) == 0
    assert cache.verify() == []


def test_device_memory_that_is_not_there(double: cuda_double.Double, cache: Cache) -> None:
    double.room_device = CAPACITY
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        cache.add_region("cuda:0", CAPACITY)
    assert double.owned == {}
    assert shmcache.inspect(cache.name).regions == ()


@pytest.mark.parametrize("call", ["cuIpcGetMemHandle", "cuMemcpyHtoD", "cuDeviceGetUuid"])
def test_a_region_that_cannot_be_exported(double: cuda_double.Double, cache: Cache, call: str) -> None:
    double.fail[call] = CUresult.CUDA_ERROR_NOT_SUPPORTED
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_SUPPORTED"):
        cache.add_region("cuda:0", CAPACITY)
    assert double.owned == {}
    assert shmcache.inspect(cache.name).regions == ()


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=8, regions=2)])
def test_no_more_numbers(double: cuda_double.Double, cache: Cache, join: Join) -> None:
    assert [cache.add_region("cuda:1", CAPACITY) for _ in range(2)] == [1, 2]
    with pytest.raises(DeviceError, match=r"ArenaConfig\(regions=\.\.\.\)"):
        cache.add_region("cuda:0", CAPACITY)
    assert len(double.owned) == 2
    cache.remove_region(1)
    assert join().add_region("cuda:0", CAPACITY) == 1


def test_no_bindings(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda", None)
    with pytest.raises(DeviceError, match=r"pip install 'shmcache\[cuda\]'"):
        cache.add_region("cuda:0", CAPACITY)
    assert cache.put(b"k", b"x") == OK


# Tensors outlive nothing


def test_release_while_a_tensor_is_alive(gpus: Any, cache: Cache) -> None:
    put(cache, [b"a", b"b"], BF16, cache.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"a", b"b"])
    tensors = batch.tensors()
    part = tensors[1][1:2].view(torch.uint8)
    for release in (batch.release, lambda: batch.release_after(gpus.stream())):
        with pytest.raises(ViewInUseError):
            release()
        assert held(cache.name) == 2
    with pytest.raises(ViewInUseError, match="batches or tensors in region 1 are alive"):
        cache.remove_region(1)
    with pytest.raises(ViewInUseError):
        cache.close()
    del tensors
    with pytest.raises(ViewInUseError):
        batch.release()
    del part
    batch.release()
    batch.release()
    with pytest.raises(ClosedError):
        batch.tensors()
    assert held(cache.name) == 0


def test_a_dropped_batch_waits_for_its_tensors(gpus: Any, cache: Cache) -> None:
    put(cache, [b"k"], BF16, cache.add_region("cuda:0", CAPACITY))
    cache.put(b"h", b"x")
    (device, host) = cache.read([b"k", b"h"]).tensors()
    assert held(cache.name) == 2
    del device
    gc.collect()
    assert held(cache.name) == 2
    del host
    gc.collect()
    assert held(cache.name) == 0


def test_a_write_that_is_dropped(gpus: Any, cache: Cache) -> None:
    number = cache.add_region("cuda:0", CAPACITY)
    batch = cache.reserve_write([b"k"], BF16, region=number)
    batch.tensors()[0].fill_(1)
    with pytest.warns(ResourceWarning, match="dropped unfinished"):
        del batch
    assert cache.status([b"k"]) == [NOT_FOUND]
    assert shmcache.inspect(cache.name).regions[0].used_bytes == 0


# Streams


FINISH: dict[str, Callable[[Cache, Any], object]] = {
    "publish": lambda cache, batch: batch.publish(),
    "publish and reserve": lambda cache, batch: batch.publish_and_reserve_read(),
    "abort": lambda cache, batch: batch.abort(),
    "finish_write": lambda cache, batch: cache.finish_write(batch.keys),
    "finish_write_and_reserve_read": lambda cache, batch: cache.finish_write_and_reserve_read(batch.keys),
    "abort_write": lambda cache, batch: cache.abort_write(batch.keys),
}


@pytest.mark.parametrize("how", FINISH)
def test_a_writers_stream_is_done_before_others_may_read(gpus: Any, cache: Cache, how: str) -> None:
    batch = cache.reserve_write([b"k"], 64, region=cache.add_region("cuda:0", CAPACITY))
    stream, began = gpus.stream(), threading.Event()

    def finish() -> None:
        with gpus.current(stream):
            began.set()
            FINISH[how](cache, batch)

    gpus.hold(stream)
    (tensor,) = batch.tensors()
    gpus.fill(tensor, 5, stream)
    del tensor
    thread = threading.Thread(target=finish)
    thread.start()
    assert began.wait(TIMEOUT_S)
    time.sleep(0.05)
    assert cache.status([b"k"]) == [Status.IN_FLIGHT]
    gpus.let_go(stream)
    thread.join(TIMEOUT_S)
    if "abort" in how:
        assert cache.status([b"k"]) == [NOT_FOUND]
        return
    with cache.read([b"k"]) as read:
        assert gpus.contents(read.tensors()[0]) == b"\x05" * 64


@pytest.mark.parametrize("how", ["release", "drop"])
def test_a_readers_stream_is_done_before_its_share_is_back(gpus: Any, cache: Cache, how: str) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    batches, stream = [cache.read([b"k"])], gpus.stream()
    gpus.hold(stream)
    got = gpus.copy(batches[0].tensors()[0], stream)

    def end() -> None:
        with gpus.current(stream):
            if how == "release":
                batches[0].release()
            else:
                batches.clear()

    thread = threading.Thread(target=end)
    thread.start()
    time.sleep(0.05)
    assert held(cache.name) == 1
    gpus.let_go(stream)
    thread.join(TIMEOUT_S)
    assert held(cache.name) == 0
    assert bytes(got.tolist()) == b"\x07" * 64


@pytest.mark.parametrize("where", ["device", "host"])
def test_release_after(gpus: Any, cache: Cache, where: str) -> None:
    if where == "device":
        put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    else:
        cache.put(b"k", b"\x07" * 64)
    stream = gpus.stream()
    gpus.hold(stream)
    batch = cache.read([b"k"])
    got = gpus.copy(batch.tensors()[0], stream) if where == "device" else None
    batch.release_after(stream)
    batch.release_after(stream)
    with pytest.raises(ClosedError):
        batch.tensors()
    for _ in range(20):
        time.sleep(0.002)
        assert cache.delete([b"k"]) == [Status.LOCKED]
    gpus.let_go(stream)
    assert got is None or bytes(got.tolist()) == b"\x07" * 64
    eventually(lambda: cache.delete([b"k"]) == [OK])  # at once, unless the thread is at it at this moment
    assert cache.verify() == []


def test_a_thread_looks_after_what_nobody_asks_for(gpus: Any, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    for _ in range(3):  # the thread ends when nothing is left, and begins anew
        stream = gpus.stream()
        gpus.hold(stream)
        cache.read([b"k"]).release_after(stream)
        assert held(cache.name) == 1
        gpus.let_go(stream)
        eventually(lambda: held(cache.name) == 0)
        eventually(lambda: not any(t.name == "shmcache-later" for t in threading.enumerate()))


def test_streams_that_pass_in_another_order(gpus: Any, cache: Cache) -> None:
    put(cache, [b"a", b"b", b"c"], 64, cache.add_region("cuda:0", CAPACITY))
    streams = {key: gpus.stream() for key in (b"a", b"b", b"c")}
    for key, stream in streams.items():
        gpus.hold(stream)
        cache.read([key]).release_after(stream)
    for key in (b"b", b"c", b"a"):
        gpus.let_go(streams.pop(key))
        eventually(lambda key=key: cache.delete([key]) == [OK])  # type: ignore[misc] # bound now
        assert cache.delete(list(streams)) == [Status.LOCKED] * len(streams)


@pytest.mark.parametrize("bad", [None, "stream", 1.0, -1, True, object()])
def test_no_stream(gpus: Any, cache: Cache, bad: Any) -> None:
    cache.put(b"k", b"x")
    batch = cache.read([b"k"])
    with pytest.raises(TypeError, match="^stream: expected a torch.cuda.Stream"):
        batch.release_after(bad)
    assert held(cache.name) == 1
    batch.release()


def test_a_stream_by_its_protocol(double: cuda_double.Double, cache: Cache) -> None:
    class Stream:
        def __init__(self, number: int) -> None:
            self.number = number

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, self.number

    stream = double.make_stream(1)
    cache.put(b"k", b"x")
    double.hold(stream)
    cache.read([b"k"]).release_after(Stream(stream.cuda_stream))
    cache.read([b"k"]).release_after(stream.cuda_stream)
    assert held(cache.name) == 2
    double.let_go(stream)
    eventually(lambda: held(cache.name) == 0)
    eventually(lambda: not double.streams.events)


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord"])
def test_an_event_that_cannot_be_recorded(double: cuda_double.Double, cache: Cache, call: str) -> None:
    cache.put(b"k", b"x")
    batch = cache.read([b"k"])
    double.fail[call] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        batch.release_after(double.make_stream())
    assert held(cache.name) == 1
    assert not double.streams.events
    batch.release()


def test_a_context_that_broke_runs_nothing_any_more(double: cuda_double.Double, cache: Cache) -> None:
    cache.put(b"k", b"x")
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    double.fail["cuEventQuery"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    eventually(lambda: held(cache.name) == 0)
    double.let_go(stream)


def test_close_waits_for_streams(gpus: Any, join: Join) -> None:
    cache = join()
    cache.put(b"k", b"x")
    stream = gpus.stream()
    gpus.hold(stream)
    cache.read([b"k"]).release_after(stream)
    thread = threading.Thread(target=cache.close)
    thread.start()
    time.sleep(0.05)
    assert not cache.closed
    assert held(cache.name) == 1
    gpus.let_go(stream)
    thread.join(TIMEOUT_S)
    assert cache.closed
    assert held(cache.name) == 0


# The end of a region


def test_a_region_that_is_removed(gpus: Any, cache: Cache, join: Join) -> None:
    reader = join("engine", 0, 1)
    number = cache.add_region("cuda:0", CAPACITY)
    put(cache, [b"held", b"granted", b"idle"], 64, number)
    batch = reader.read([b"held"])
    reader.reserve_read([b"granted"])
    cache.remove_region(number)
    assert cache.status([b"held", b"granted", b"idle"]) == [LOST, LOST, NOT_FOUND]
    assert cache.lookup([b"held"]) == 0
    assert (batch.status, batch.tensors(), batch.hits) == ([LOST], [None], 0)
    assert reader.reserve_read([b"held"]) == [LOST]
    assert reader.touch([b"held"]) == [LOST]
    assert cache.read([b"held"]).status == [LOST]
    (region,) = shmcache.inspect(cache.name).regions
    assert region.state == "lost"
    assert cache.reserve_write([b"held"], 64).status == [LOST], "its key is not free while somebody has a share"
    assert reader.read([b"granted"]).status == [LOST]
    assert cache.status([b"granted"]) == [NOT_FOUND], "the share went with the question"
    batch.release()
    assert cache.status([b"held"]) == [NOT_FOUND]
    assert cache.put(b"held", b"anew") == OK
    cache.reap()
    assert shmcache.inspect(cache.name).regions == ()
    assert cache.verify() == []
    assert cache.add_region("cuda:0", CAPACITY) == number


def test_giving_back_shares_of_what_is_lost(gpus: Any, cache: Cache, join: Join) -> None:
    worker = join("engine", 0, 1)
    number = cache.add_region("cuda:0", CAPACITY)
    put(cache, [b"a", b"b"], 64, number)
    assert worker.reserve_read([b"a", b"b"]) == [OK] * 2
    cache.remove_region(number)
    assert worker.finish_read([b"a"]) == [OK]
    assert worker.cancel_read([b"b"]) == [OK]
    assert cache.status([b"a", b"b"]) == [NOT_FOUND] * 2
    cache.reap()
    assert shmcache.inspect(cache.name).regions == ()


def test_a_write_into_a_region_that_is_lost(gpus: Any, cache: Cache, join: Join) -> None:
    writer = join()
    number = cache.add_region("cuda:0", CAPACITY)
    writes = [writer.reserve_write([key], 64, region=number) for key in (b"a", b"b")]
    cache.remove_region(number)
    assert writes[0].status == [LOST]
    assert writes[0].tensors() == [None]
    assert writes[0].publish() == [LOST]
    assert writer.finish_write([b"b"]) == [LOST]
    writes[1].abort()
    assert cache.status([b"a", b"b"]) == [NOT_FOUND] * 2
    assert writer.reserve_write([b"c"], 64, region=number).status == [LOST]
    cache.reap()
    with pytest.raises(ValueError, match="^region: expected"):
        writer.reserve_write([b"c"], 64, region=number)
    assert cache.verify() == []


def test_close_gives_the_memory_back(double: cuda_double.Double, cache: Cache, join: Join) -> None:
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    owner.add_region("cuda:1", CAPACITY)
    batch = cache.read([b"k"])
    owner.close()
    assert double.owned == {}
    assert batch.status == [LOST]
    batch.release()
    assert cache.status([b"k"]) == [NOT_FOUND]


def test_an_owner_waits_for_another_cache_of_its_process(double: cuda_double.Double, cache: Cache, join: Join) -> None:
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    (tensor,) = batch.tensors()
    assert shmcache.inspect(cache.name).regions[0].opened == (cache.lane,)
    thread = threading.Thread(target=owner.close)
    thread.start()
    eventually(lambda: batch.status == [LOST])
    assert len(double.owned) == 1
    del tensor
    batch.release()
    thread.join(TIMEOUT_S)
    assert double.owned == {}


def test_memory_that_somebody_looks_at_stays(
    double: cuda_double.Double, cache: Cache, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAVE_S", 0.01)
    owner = join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    (tensor,) = batch.tensors()
    with pytest.warns(RuntimeWarning, match=rf"region 1 is open in lanes \[{cache.lane}\], so its memory stays"):
        owner.close()
    assert len(double.owned) == 1
    assert bytes(tensor.tolist()) == b"\x07" * 64
    del tensor
    batch.release()
    end_process(double)


# In others, and where it breaks


def test_a_forked_child_has_no_part_in_it(double: cuda_double.Double, cache: Cache) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    batch = cache.read([b"k"])
    (tensor,) = batch.tensors()
    stream = double.make_stream()
    double.hold(stream)
    cache.read([b"k"]).release_after(stream)
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            before = len(double.calls)
            del tensor
            batch.release()
            for call in (lambda: cache.add_region("cuda:0", CAPACITY), batch.tensors):
                with pytest.raises(ClosedError):
                    call()
            cache.close()
            with shmcache.attach(cache.name) as own:
                assert own.status([b"k"]) == [OK]
                assert own.read([b"k"]).status == [OK]
            status = 0 if len(double.calls) == before else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert held(cache.name) == 2
    double.let_go(stream)
    del tensor
    batch.release()
    assert cache.status([b"k"]) == [OK]


@pytest.mark.parametrize("call", ["cuMemFree", "cuCtxPushCurrent"])
def test_a_driver_that_is_shut_down_does_not_stop_close(double: cuda_double.Double, join: Join, call: str) -> None:
    owner, reader = join(), join()
    put(owner, [b"k"], 64, owner.add_region("cuda:0", CAPACITY))
    with reader.read([b"k"]) as batch:
        batch.tensors()
    reader.close()
    double.fail[call] = CUresult.CUDA_ERROR_DEINITIALIZED
    with pytest.warns(RuntimeWarning, match="CUDA_ERROR_DEINITIALIZED, asked to free region 1"):
        owner.close()
    assert owner.closed
    del double.fail[call]
    end_process(double)


@pytest.mark.parametrize("what", ["publish", "abort"])
def test_a_stream_that_broke(double: cuda_double.Double, cache: Cache, what: str) -> None:
    batch = cache.reserve_write([b"k"], 64, region=cache.add_region("cuda:0", CAPACITY))
    batch.tensors()
    double.fail["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    if what == "publish":
        for publish in (batch.publish, lambda: cache.finish_write([b"k"])):
            with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                publish()
            assert cache.status([b"k"]) == [Status.IN_FLIGHT]
    assert batch.abort() == [OK]
    assert cache.status([b"k"]) == [NOT_FOUND]


def test_torch_that_would_copy(double: cuda_double.Double, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, [b"k"], 64, cache.add_region("cuda:0", CAPACITY))
    as_tensor = torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda *args, **kwargs: as_tensor(*args, **kwargs).clone())
    with cache.read([b"k"]) as batch, pytest.raises(DeviceError, match="would copy it to cuda:0"):
        batch.tensors()
