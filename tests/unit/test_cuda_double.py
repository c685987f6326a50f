"""The double of CUDA's driver is what other tests lean on: here it is tested itself, between real processes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_double
import cuda_support
import cuda_torch
import pytest
import torch
from cuda_double import Double, allocations, violations
from cuda_memory import Allocation
from cuda_names import CUdeviceptr, CUresult
from processes._crew import Member, wait_until
from processes.conftest import start

__all__ = ["start"]

OK = CUresult.CUDA_SUCCESS
NBYTES = 3 << 20
Start = Callable[[], Member]

# What members know beside: `driver`, and functions that give a call's value or raise its error's name.
PREPARE = """
import ctypes, cuda_double
double = cuda_double.install({root!r}, torch=False, **{options!r})
from cuda.bindings import driver

def given(result):
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(error.name)
    return values[0] if values else None

given(driver.cuInit(0))
context = given(driver.cuDevicePrimaryCtxRetain({device}))
given(driver.cuCtxPushCurrent(context))

def export(pointer):
    handle = given(driver.cuIpcGetMemHandle(pointer))  # to be kept as long as its bytes are read
    return ctypes.string_at(handle.getPtr(), 64)

def opened(data):
    handle = driver.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), data, 64)
    return int(given(driver.cuIpcOpenMemHandle(handle, 1)))

def read(pointer, nbytes):
    there = bytearray(nbytes)
    given(driver.cuMemcpyDtoH(there, pointer, nbytes))
    return bytes(there)

def write(pointer, data):
    given(driver.cuMemcpyHtoD(pointer, data, len(data)))
"""


def prepared(member: Member, root: Path, device: int = 0, **options: Any) -> Member:
    member.do(PREPARE.format(root=str(root), device=device, options={"devices": 2, **options}))
    return member


@pytest.fixture
def exporter(start: Start, tmp_path: Path) -> Member:
    """Has memory of its own."""
    member = prepared(start(), tmp_path)
    member.do(f"pointer = given(driver.cuMemAlloc({NBYTES}))")
    member.do("write(pointer, b'of the exporter')")
    return member


@pytest.fixture
def importer(start: Start, tmp_path: Path, exporter: Member) -> Member:
    """Has opened it."""
    member = prepared(start(), tmp_path)
    member.do(f"pointer = opened({exporter.do('export(pointer)')!r})")
    return member


@pytest.fixture
def double(tmp_path: Path) -> Iterator[Double]:
    """The driver of this process, with the context of device 0."""
    with cuda_double.installed(tmp_path, devices=2) as made:
        driver = made.module()
        driver.cuInit(0)
        driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
        yield made


def memory(double: Double, nbytes: int = NBYTES) -> int:
    error, pointer = double.module().cuMemAlloc(nbytes)
    assert error == OK
    return int(pointer)


class Run:
    """What the product gives to torch."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }


# Memory of others.


def test_both_see_the_same_bytes(exporter: Member, importer: Member) -> None:
    assert importer.do("read(pointer, 15)") == b"of the exporter"
    importer.do("write(pointer + 100, b'of the importer')")
    assert exporter.do("read(int(pointer) + 100, 15)") == b"of the importer"
    assert importer.do("[int(value) for value in driver.cuMemGetAddressRange(pointer + 5)]") == [
        0,
        importer.do("pointer"),
        NBYTES,
    ]


def test_it_opens_once_and_counts(importer: Member, exporter: Member, tmp_path: Path) -> None:
    handle = exporter.do("export(int(pointer) + 5000)")  # is the whole allocation's
    assert handle == exporter.do("export(pointer)")
    assert importer.do(f"opened({handle!r}) == pointer")
    assert importer.do("double.opened") == {importer.do("pointer"): 2}
    importer.do("given(driver.cuIpcCloseMemHandle(pointer))")
    assert importer.do("read(pointer, 15)") == b"of the exporter"
    importer.do("given(driver.cuIpcCloseMemHandle(pointer))")
    for call in "read(pointer, 15)", "given(driver.cuIpcCloseMemHandle(pointer))":
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            importer.do(call)
    assert exporter.do("read(pointer, 15)") == b"of the exporter"
    exporter.do("given(driver.cuMemFree(pointer))")
    assert allocations(tmp_path) == []
    assert violations(tmp_path) == []


def test_a_process_cannot_open_its_own(exporter: Member) -> None:
    with pytest.raises(RuntimeError, match="INVALID_CONTEXT"):
        exporter.do("opened(export(pointer))")


def test_free_is_for_own_memory_and_close_for_others(exporter: Member, importer: Member, tmp_path: Path) -> None:
    for member, call in (exporter, "cuIpcCloseMemHandle"), (importer, "cuMemFree"), (importer, "cuIpcGetMemHandle"):
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            member.do(f"given(driver.{call}(pointer))")
    assert importer.do("read(pointer, 15)") == exporter.do("read(pointer, 15)") == b"of the exporter"
    assert violations(tmp_path) == []


@pytest.mark.parametrize("which", [0, 15, 16, 63])
def test_a_damaged_handle(exporter: Member, importer: Member, which: int) -> None:
    handle = bytearray(exporter.do("export(pointer)"))
    handle[which] ^= 1
    with pytest.raises(RuntimeError, match="INVALID_HANDLE"):
        importer.do(f"opened({bytes(handle)!r})")


def test_a_dead_exporter(exporter: Member, importer: Member, start: Start, tmp_path: Path) -> None:
    handle = exporter.do("export(pointer)")
    (seen,) = allocations(tmp_path)
    assert seen == Allocation(0, NBYTES, exporter.pid, frozenset({importer.pid}))
    exporter.kill()
    assert importer.do("read(pointer, 15)") == b"of the exporter"
    importer.do("write(pointer, b'still there')")
    assert importer.do("read(pointer, 11)") == b"still there"
    late = prepared(start(), tmp_path)
    with pytest.raises(RuntimeError, match="INVALID_HANDLE"):
        late.do(f"opened({handle!r})")
    (seen,) = allocations(tmp_path)
    assert seen == Allocation(0, NBYTES, None, frozenset({importer.pid}))
    importer.do("given(driver.cuIpcCloseMemHandle(pointer))")
    assert list(tmp_path.glob("*.memory")) == []
    assert violations(tmp_path) == []


def test_a_dead_importer(exporter: Member, importer: Member, start: Start, tmp_path: Path) -> None:
    other = prepared(start(), tmp_path)
    other.do(f"pointer = opened({exporter.do('export(pointer)')!r})")
    assert allocations(tmp_path)[0].importers == {importer.pid, other.pid}
    importer.kill()
    assert allocations(tmp_path)[0].importers == {other.pid}
    assert other.do("read(pointer, 15)") == exporter.do("read(pointer, 15)") == b"of the exporter"
    other.kill()
    exporter.do("given(driver.cuMemFree(pointer))")
    assert violations(tmp_path) == []


def test_all_are_dead(exporter: Member, importer: Member, tmp_path: Path) -> None:
    exporter.kill()
    importer.kill()
    assert allocations(tmp_path) == []
    assert list(tmp_path.glob("*.memory")) == []


def test_a_forked_child_keeps_nothing_alive(exporter: Member, importer: Member, tmp_path: Path) -> None:
    exporter.do("child = os.fork()\nif not child: time.sleep(60), os._exit(0)")
    child = exporter.do("child")
    try:
        exporter.kill()
        assert allocations(tmp_path)[0].owner is None
        importer.kill()
        assert allocations(tmp_path) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_freed_memory(exporter: Member, importer: Member, tmp_path: Path) -> None:
    handle = exporter.do("export(pointer)")
    importer.do("given(driver.cuIpcCloseMemHandle(pointer))")
    exporter.do("given(driver.cuMemFree(pointer))")
    assert violations(tmp_path) == []
    for call in "given(driver.cuMemFree(pointer))", "export(pointer)", "read(pointer, 1)":
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            exporter.do(call)
    with pytest.raises(RuntimeError, match="INVALID_HANDLE"):
        importer.do(f"opened({handle!r})")


def test_memory_that_is_freed_under_an_importer(exporter: Member, importer: Member, tmp_path: Path) -> None:
    exporter.do("given(driver.cuMemFree(pointer))")
    (what,) = violations(tmp_path)
    assert f"process {exporter.pid}: freed memory that [{importer.pid}] have open" == what
    assert importer.do("read(pointer, 15)") == b"\xdd" * 15


def test_the_room_of_a_device_is_all_processes(exporter: Member, start: Start, tmp_path: Path) -> None:
    other = prepared(start(), tmp_path, room_device=2 * NBYTES)
    second = other.do(f"int(given(driver.cuMemAlloc({NBYTES})))")
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        other.do("given(driver.cuMemAlloc(1))")
    other.do("given(driver.cuCtxPushCurrent(given(driver.cuDevicePrimaryCtxRetain(1))))")
    other.do(f"given(driver.cuMemAlloc({2 * NBYTES}))")
    other.do("driver.cuCtxPopCurrent()")
    exporter.kill()
    other.do(f"given(driver.cuMemAlloc({NBYTES}))")
    assert sorted((a.device, a.nbytes) for a in allocations(tmp_path)) == [(0, NBYTES)] * 2 + [(1, 2 * NBYTES)]
    assert second in other.do("double.owned")


def test_no_ipc(exporter: Member, start: Start, tmp_path: Path) -> None:
    handle = exporter.do("export(pointer)")
    other = prepared(start(), tmp_path, ipc=False)
    other.do("pointer = given(driver.cuMemAlloc(1))")
    for call in f"opened({handle!r})", "export(pointer)":
        with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
            other.do(call)


# Several devices.


def test_uuids_are_the_machines(start: Start, tmp_path: Path) -> None:
    uuids = "[given(driver.cuDeviceGetUuid(i)).bytes for i in range(given(driver.cuDeviceGetCount()))]"
    first, second = prepared(start(), tmp_path).do(uuids)
    assert len(first) == len(second) == 16
    assert first != second
    assert prepared(start(), tmp_path, visible=[1]).do(uuids) == [second]
    assert prepared(start(), tmp_path, visible=[1, 0]).do(uuids) == [second, first]
    (tmp_path / "other").mkdir()
    assert prepared(start(), tmp_path / "other").do(uuids)[0] not in (first, second)


def test_a_device_that_is_not_visible(exporter: Member, start: Start, tmp_path: Path) -> None:
    handle = exporter.do("export(pointer)")
    with pytest.raises(RuntimeError, match="INVALID_DEVICE"):
        prepared(start(), tmp_path, visible=[1]).do(f"opened({handle!r})")
    assert prepared(start(), tmp_path, 1, visible=[1, 0]).do(f"read(opened({handle!r}), 15)") == b"of the exporter"


def test_peers(exporter: Member, start: Start, tmp_path: Path) -> None:
    handle = exporter.do("export(pointer)")
    near = prepared(start(), tmp_path, 1, peers={(1, 0)})
    assert near.do("[given(driver.cuDeviceCanAccessPeer(a, b)) for a in (0, 1) for b in (0, 1)]") == [0, 0, 1, 0]
    assert near.do(f"read(opened({handle!r}), 15)") == b"of the exporter"
    far = prepared(start(), tmp_path, 1, peers={(0, 1)})
    with pytest.raises(RuntimeError, match="PEER_ACCESS_UNSUPPORTED"):
        far.do(f"opened({handle!r})")


@pytest.mark.parametrize(("device", "options"), [(1, {"broken_peer": True}), (0, {"broken": True})])
def test_a_path_that_leads_elsewhere(
    exporter: Member, start: Start, tmp_path: Path, device: int, options: dict[str, Any]
) -> None:
    other = prepared(start(), tmp_path, device, **options)
    other.do(f"pointer = opened({exporter.do('export(pointer)')!r})")
    assert other.do("read(pointer, 15)") == b"\xbb" * 15
    other.do("write(pointer, b'lost')")
    assert exporter.do("read(pointer, 15)") == b"of the exporter"
    other.do("given(driver.cuIpcCloseMemHandle(pointer))")
    assert allocations(tmp_path)[0].importers == set()


def test_the_same_device_has_no_peer_to_break(exporter: Member, start: Start, tmp_path: Path) -> None:
    other = prepared(start(), tmp_path, broken_peer=True)
    assert other.do(f"read(opened({exporter.do('export(pointer)')!r}), 15)") == b"of the exporter"


# One process.


def test_what_a_call_needs(tmp_path: Path) -> None:
    with cuda_double.installed(tmp_path) as double:
        driver = double.module()
        assert driver.cuDeviceGetCount() == (CUresult.CUDA_ERROR_NOT_INITIALIZED, None)
        driver.cuInit(0)
        assert driver.cuMemAlloc(1) == (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        assert driver.cuMemGetAddressRange(1) == (CUresult.CUDA_ERROR_INVALID_CONTEXT, None, None)
        assert driver.cuStreamSynchronize(0) == (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        assert driver.cuCtxPopCurrent() == (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        assert driver.cuDeviceGet(1) == (CUresult.CUDA_ERROR_INVALID_DEVICE, None)
        error, pid = driver.cuCtxGetCurrent()
        assert (error, int(pid)) == (OK, 0)
        with pytest.raises(AttributeError):
            driver.cuDeviceGetAttribute(113, 0)


def test_a_forked_child_has_no_driver(double: Double) -> None:
    driver = double.module()
    child = os.fork()
    if child == 0:
        os._exit(driver.cuInit(0)[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CUresult.CUDA_ERROR_NOT_INITIALIZED


def test_calls_are_noted_and_fail_on_purpose(double: Double) -> None:
    driver = double.module()
    double.fail["cuMemAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert driver.cuMemAlloc(1) == (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    del double.fail["cuMemAlloc"]
    begun: list[str] = []
    double.before["cuMemAlloc"] = lambda: begun.append(double.calls[-1])
    thread = threading.Thread(target=driver.cuMemAlloc, args=(1,), name="another")
    thread.start()
    thread.join()
    assert begun == ["cuMemAlloc"]
    assert double.log[-1] == ("cuMemAlloc", "another")
    assert driver.cuMemAlloc(0)[0] == CUresult.CUDA_ERROR_INVALID_VALUE


def test_handles_of_old_and_new_bindings(tmp_path: Path) -> None:
    assert not hasattr(Double(root=tmp_path).module().CUipcMemHandle(), "reserved")
    handle = Double(root=tmp_path, reserved=True).module().CUipcMemHandle()
    handle.reserved = bytes(range(64))
    assert ctypes.string_at(handle.getPtr(), 64) == handle.reserved == bytes(range(64))
    with pytest.raises(ValueError, match="length must be 64, is 63"):
        handle.reserved = bytes(63)


def test_pointers_are_no_numbers(double: Double) -> None:
    pointer = double.module().cuMemAlloc(100)[1]
    assert pointer != int(pointer)
    assert pointer != CUdeviceptr(pointer)
    assert not hasattr(pointer, "__index__")
    assert double.module().cuMemFree(pointer) == (OK,)
    with pytest.raises(TypeError):
        double.module().cuMemFree("1")


def test_the_end_of_a_process(tmp_path: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 # its own descriptor counts both times
    with cuda_double.installed(tmp_path) as double:
        driver = double.module()
        driver.cuInit(0)
        driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
        memory(double)
        (seen,) = allocations(tmp_path)
        assert seen == Allocation(0, NBYTES, os.getpid(), frozenset())
    assert allocations(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


# Streams and events.


def test_events_are_late_where_a_stream_is_held(double: Double) -> None:
    driver, stream, other = double.module(), double.make_stream(), double.make_stream()
    early, late, elsewhere = (driver.cuEventCreate(2)[1] for _ in range(3))
    assert driver.cuEventQuery(late) == (OK,), "it was not recorded yet"
    driver.cuEventRecord(early, stream.cuda_stream)
    double.hold(stream)
    driver.cuEventRecord(late, stream.cuda_stream)
    driver.cuEventRecord(elsewhere, other.cuda_stream)
    assert driver.cuEventQuery(late) == driver.cuStreamQuery(stream.cuda_stream) == (CUresult.CUDA_ERROR_NOT_READY,)
    assert driver.cuEventQuery(early) == driver.cuEventQuery(elsewhere) == (OK,)
    double.let_go(stream)
    assert driver.cuEventQuery(late) == driver.cuStreamQuery(stream.cuda_stream) == (OK,)
    for event in early, late, elsewhere:
        assert driver.cuEventDestroy(event) == (OK,)
    assert double.streams.events == {}
    assert driver.cuEventQuery(late) == driver.cuEventDestroy(late) == (CUresult.CUDA_ERROR_INVALID_HANDLE,)


@pytest.mark.parametrize("what", ["stream", "event", "copy"])
def test_who_waits_for_a_held_stream(double: Double, what: str) -> None:
    driver = double.module()
    pointer = memory(double)
    stream = double.default_stream() if what == "copy" else double.make_stream()
    there = bytearray(1)
    event = driver.cuEventCreate(0)[1]
    double.hold(stream)
    double.launch(stream, lambda: ctypes.memset(pointer, 7, 1))
    driver.cuEventRecord(event, stream.cuda_stream)

    def wait() -> None:
        driver.cuCtxPushCurrent(1000)
        if what == "stream":
            driver.cuStreamSynchronize(stream.cuda_stream)
        elif what == "event":
            driver.cuEventSynchronize(event)
        driver.cuMemcpyDtoH(there, pointer, 1)

    waiter = threading.Thread(target=wait)
    waiter.start()
    last = {"stream": "cuStreamSynchronize", "event": "cuEventSynchronize", "copy": "cuMemcpyDtoH"}[what]
    wait_until(lambda: double.calls[-1] == last)
    waiter.join(0.05)
    assert waiter.is_alive()
    double.let_go(stream)
    waiter.join()
    assert there == b"\x07"


def test_a_stream_that_nobody_lets_go(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_streams.WAIT_S", 0.01)
    stream = double.make_stream()
    double.hold(stream)
    with pytest.raises(AssertionError, match="nobody lets go"):
        double.module().cuStreamSynchronize(stream.cuda_stream)


def test_streams_are_of_a_context(double: Double) -> None:
    driver = double.module()
    stream = double.make_stream(1)
    event = driver.cuEventCreate(2)[1]
    assert driver.cuEventRecord(event, stream.cuda_stream) == (CUresult.CUDA_ERROR_INVALID_HANDLE,)
    assert [int(value) for value in driver.cuStreamGetCtx(stream.cuda_stream)] == [0, 1001]
    assert [int(value) for value in driver.cuStreamGetCtx(0)] == [0, 1000]
    assert driver.cuStreamSynchronize(12345) == (CUresult.CUDA_ERROR_INVALID_HANDLE,)
    double.hold(double.default_stream(1))
    assert driver.cuStreamQuery(0) == driver.cuStreamQuery(1) == driver.cuStreamQuery(2) == (OK,)
    driver.cuCtxPushCurrent(1001)
    assert driver.cuStreamQuery(0) == driver.cuStreamQuery(1) == (CUresult.CUDA_ERROR_NOT_READY,)
    assert driver.cuEventRecord(event, 0) == (CUresult.CUDA_ERROR_INVALID_HANDLE,)


# Torch.


def test_a_tensor_lies_in_the_memory_and_keeps_its_run(double: Double) -> None:
    pointer = memory(double)
    run = Run(pointer + 4096, 64)
    gone = weakref.ref(run)
    tensor = torch.as_tensor(run, device="cuda:0").view(torch.float32)
    del run
    assert tensor.data_ptr() == pointer + 4096
    tensor.fill_(2.5)
    there = torch.zeros(64, dtype=torch.uint8)
    double.module().cuMemcpyDtoH(there.data_ptr(), pointer + 4096, 64)
    assert there.view(torch.float32).tolist() == [2.5] * 16
    part = tensor.view(4, 4)[1]
    del tensor
    assert gone() is not None
    assert part.tolist() == [2.5] * 4
    del part
    gc.collect()
    assert gone() is None
    assert double.module().cuMemFree(pointer) == (OK,)
    assert violations(double.root or "") == []


def test_memory_that_is_unmapped_under_a_tensor(double: Double, tmp_path: Path) -> None:
    pointer = memory(double)
    tensor = torch.as_tensor(Run(pointer, 8), device="cuda:0")[:2]
    double.module().cuMemFree(pointer)
    (what,) = violations(tmp_path)
    assert "unmapped device memory in which 1 tensors live" in what
    assert tensor.tolist() == [0, 0], "the test goes on"


def test_what_torch_refuses(double: Double) -> None:
    pointer = memory(double, 100)
    for run, device in (
        (Run(pointer + 90, 11), "cuda:0"),
        (Run(pointer + (1 << 30), 1), "cuda:0"),
        (Run(pointer, 1), "cuda:2"),
    ):
        with pytest.raises(RuntimeError):
            torch.as_tensor(run, device=device)
    assert torch.as_tensor(Run(0, 0), device="cuda:0").numel() == 0
    assert torch.as_tensor([1, 2]).tolist() == [1, 2]


def test_the_current_stream(double: Double) -> None:
    first, second = double.make_stream(), double.make_stream(1)
    with cuda_torch.current_stream(first), cuda_torch.current_stream(second):
        assert torch.cuda.current_stream(0).cuda_stream == torch.cuda.current_stream("cuda").cuda_stream
        assert torch.cuda.current_stream(0).cuda_stream == first.cuda_stream
        assert torch.cuda.current_stream(torch.device("cuda:1")).cuda_stream == second.cuda_stream
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream(0).cuda_stream))
        thread.start()
        thread.join()
        assert seen == [0], "another thread has its own"
    assert torch.cuda.current_stream(0).cuda_stream == 0


def test_torch_is_itself_afterwards(tmp_path: Path) -> None:
    before = torch.as_tensor, torch.cuda.current_stream
    with cuda_double.installed(tmp_path):
        assert torch.as_tensor is not before[0]
    assert (torch.as_tensor, torch.cuda.current_stream) == before


# What tests of both kinds use.


@pytest.fixture(params=cuda_support.KINDS)
def gpus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[cuda_support.Double | cuda_support.Real]:
    with cuda_support.gpus(request.param, tmp_path) as made:
        yield made


def tensor_of(gpus: cuda_support.Double | cuda_support.Real, nbytes: int) -> torch.Tensor:
    if not isinstance(gpus, cuda_support.Double):
        return torch.zeros(nbytes, dtype=torch.uint8, device=gpus.devices[0])
    driver = gpus.driver.module()
    driver.cuInit(0)
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    return torch.as_tensor(Run(memory(gpus.driver, nbytes), nbytes), device=gpus.devices[0])


def test_late_work_on_either_kind(gpus: cuda_support.Double | cuda_support.Real) -> None:
    tensor = tensor_of(gpus, 1000).view(torch.int16)
    stream = gpus.stream()
    gpus.fill(tensor, 1)
    assert gpus.contents(tensor) == b"\1" * 1000
    gpus.hold(stream)
    with gpus.current(stream):
        gpus.fill(tensor, 2)
        assert torch.cuda.current_stream(0).cuda_stream == stream.cuda_stream
    copied = gpus.copy(tensor, stream)
    assert gpus.contents(tensor) == b"\1" * 1000
    assert not copied.any()
    gpus.let_go(stream)
    assert gpus.contents(tensor) == b"\2" * 1000
    assert copied.tolist() == [2] * 1000


def test_a_violation_fails_a_test(tmp_path: Path) -> None:
    def misuse() -> None:
        with cuda_support.gpus("double", tmp_path) as gpus:
            tensor = tensor_of(gpus, 8)
            assert isinstance(gpus, cuda_support.Double)
            gpus.driver.module().cuMemFree(tensor.data_ptr())

    with pytest.raises(AssertionError, match="tensors live"):
        misuse()


def test_another_process_on_the_same_machine(start: Start, tmp_path: Path) -> None:
    with cuda_support.gpus("double", tmp_path) as gpus:
        member = start()
        member.do(gpus.order)
        tensor_of(gpus, 100)
        assert member.do("[a.owner for a in cuda_double.allocations(double.root)]") == [os.getpid()]
        assert member.do("double.devices") == len(gpus.devices)
