"""Copies between blocks and parts: where the blocks lie in every layout of vLLM, and whether all bytes come along."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shmcache.integrations.vllm import copier as copiers
from shmcache.integrations.vllm.copier import Copier, DeviceCopier, HostCopier, copier_of, part_bytes_of, planes_of

LAYOUTS = {  # as in vLLM: the logical axes (layer, block, head, token, content) in the order of memory
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
SERVED = ["LBHNC", "LBNHC", "BLHNC", "BLNHC"]
HEADS, TOKENS, CONTENT = 2, 3, 4

Caches = dict[str, torch.Tensor]


def caches_of(
    layout: str, layers: int = 3, blocks: int = 5, dtype: torch.dtype = torch.int16, device: str = "cpu"
) -> Caches:
    """A tensor a layer, all of them views of one storage, each element with a value of its own."""
    shape = (layers, blocks, HEADS, TOKENS, CONTENT)
    order = LAYOUTS[layout]
    numel = layers * blocks * HEADS * TOKENS * CONTENT
    memory = torch.arange(numel, device=device).to(dtype).view([shape[axis] for axis in order])
    logical = memory.permute([order.index(axis) for axis in range(5)])
    return {f"layer.{i}": logical[i] for i in range(layers)}


def bytes_of(tensor: torch.Tensor) -> list[int]:
    """The elements' bytes in the order of memory; of a block, where it is one run."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).clone()
    return flat.view(torch.uint8).tolist()


def check_planes(caches: Caches, planes: list[torch.Tensor], blocks: int) -> None:
    """A block of the planes is the block of each layer, in the order of the layers."""
    rows = [plane[layer] for plane in planes for layer in range(plane.shape[0])]
    for row, cache in zip(rows, caches.values(), strict=True):
        of_a_block = cache.unflatten(0, (blocks, -1))
        for block in range(blocks):
            assert row[block].tolist() == bytes_of(of_a_block[block])
            assert row[block].data_ptr() == of_a_block[block].data_ptr()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("layout", SERVED)
def test_layers_of_one_storage_are_one_plane(layout: str, layers: int) -> None:
    caches = caches_of(layout, layers)
    planes = planes_of(caches, 5)
    assert [plane.shape for plane in planes] == [(layers, 5, HEADS * TOKENS * CONTENT * 2)]
    assert part_bytes_of(planes) == layers * HEADS * TOKENS * CONTENT * 2
    check_planes(caches, planes, 5)


@pytest.mark.parametrize("layout", ["LHBNC", "BHLNC"])
def test_layouts_with_heads_outside_are_refused(layout: str) -> None:
    with pytest.raises(
        ValueError, match="layer.0: expected the bytes of a block in one run, got shape .*LBNHC or LBHNC"
    ):
        planes_of(caches_of(layout), 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype) -> None:
    caches = caches_of("BLNHC", dtype=dtype)
    check_planes(caches, planes_of(caches, 5), 5)


def test_layers_of_several_storages_are_planes_in_their_order() -> None:
    first, second = caches_of("LBNHC", 2), caches_of("LBHNC", 3)
    caches = {f"{i}": cache.clone() if i == 2 else cache for i, cache in enumerate([*first.values(), *second.values()])}
    planes = planes_of(caches, 5)
    assert [plane.shape[0] for plane in planes] == [2, 1, 2]
    check_planes(caches, planes, 5)


def test_layers_that_are_no_neighbours_are_planes_of_their_own() -> None:
    one = caches_of("LBNHC", 6)
    for order, lengths in (([0, 2, 4, 5], [3, 1]), ([3, 1, 0], [1, 1, 1]), ([5, 0, 1], [1, 2]), ([0, 1, 3], [2, 1])):
        caches = {str(i): one[f"layer.{i}"] for i in order}
        planes = planes_of(caches, 5)
        assert [plane.shape[0] for plane in planes] == lengths
        check_planes(caches, planes, 5)


def test_layers_of_several_sizes() -> None:
    memory = torch.arange(1000, dtype=torch.int16)
    caches = {"a": memory[:60].view(5, 12), "b": memory[60:120].view(5, 12), "c": memory[120:160].view(5, 8)}
    planes = planes_of(caches, 5)
    assert [plane.shape for plane in planes] == [(2, 5, 24), (1, 5, 16)]
    check_planes(caches, planes, 5)


def test_layers_that_share_their_memory_are_stored_once() -> None:
    one = caches_of("LBNHC")
    planes = planes_of({**one, "layer.3": one["layer.0"], "layer.4": one["layer.2"]}, 5)
    assert [plane.shape[0] for plane in planes] == [3]
    check_planes(one, planes, 5)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_kernels_may_have_smaller_blocks(layout: str, blocks: int) -> None:
    caches = caches_of(layout, 2, 6)
    planes = planes_of(caches, blocks)
    assert [plane.shape for plane in planes] == [(2, blocks, 6 // blocks * HEADS * TOKENS * CONTENT * 2)]
    check_planes(caches, planes, blocks)


@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC"])
def test_smaller_blocks_with_other_layers_between_are_refused(layout: str) -> None:
    with pytest.raises(ValueError, match="expected the bytes of a block in one run"):
        planes_of(caches_of(layout, 2, 6), 3)


def test_padding_behind_a_page_is_no_part_of_it() -> None:
    memory = torch.arange(3 * 5 * 40, dtype=torch.int16).view(3, 5, 40)
    caches = {str(i): memory[i, :, :24].unflatten(1, (HEADS, TOKENS, CONTENT)) for i in range(3)}
    planes = planes_of(caches, 5)
    assert [plane.shape for plane in planes] == [(3, 5, 48)]
    check_planes(caches, planes, 5)


def test_a_dimension_of_one_may_have_any_stride() -> None:
    memory = torch.arange(5 * 12, dtype=torch.int16)
    caches = {"a": memory.as_strided((5, 1, 12), (12, 7, 1)), "b": memory.as_strided((5, 12, 1), (12, 1, 999))}
    for name, cache in caches.items():
        check_planes({name: cache}, planes_of({name: cache}, 5), 5)


@pytest.mark.parametrize("blocks", [0, 4, 7, 10])
def test_blocks_that_are_not_there(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"layer.0: expected {blocks} blocks in the first dimension, got shape"):
        planes_of(caches_of("LBNHC"), blocks)


# Copies


@st.composite
def kv_caches(draw: st.DrawFn) -> tuple[Caches, int]:
    """In any served layout, in one storage or several, with how many blocks."""
    blocks = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.float32]))
    several = [
        caches_of(draw(st.sampled_from(SERVED)), draw(st.integers(1, 4)), blocks, dtype)
        for _ in range(draw(st.integers(1, 3)))
    ]
    flat = list(itertools.chain.from_iterable(one.values() for one in several))
    return {str(i): cache for i, cache in enumerate(flat)}, blocks


def check_copies(copier: Copier, caches: Caches, blocks: int, chosen: list[int]) -> None:
    """Stores blocks, forgets them, loads them into others."""
    nbytes = part_bytes_of(planes_of(caches, blocks))
    parts = [bytearray(nbytes) for _ in chosen]
    before = {name: cache.clone() for name, cache in caches.items()}
    copier.save(chosen, [memoryview(part) for part in parts], copier.mark())
    for part, block in zip(parts, chosen, strict=True):
        assert list(part) == [byte for cache in caches.values() for byte in bytes_of(cache[block])]
    for cache in caches.values():
        cache.view(torch.uint8).fill_(0xEE)
    targets = list(reversed(chosen))
    with copier.aside(copier.mark()):
        copier.load(targets, [memoryview(part).toreadonly() for part in parts])
    for name, cache in caches.items():
        for block in range(blocks):
            if block in targets:
                assert torch.equal(
                    cache[block].view(torch.uint8), before[name][chosen[targets.index(block)]].view(torch.uint8)
                )
            else:
                assert (cache[block].view(torch.uint8) == 0xEE).all(), "a block that was not to be loaded"


@given(kv=kv_caches(), data=st.data())
@settings(deadline=None, max_examples=60, print_blob=True)
def test_host_copies(kv: tuple[Caches, int], data: st.DataObject) -> None:
    caches, blocks = kv
    chosen = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    copier = copier_of(planes_of(caches, blocks))
    assert isinstance(copier, HostCopier)
    check_copies(copier, caches, blocks, chosen)


def test_as_many_parts_as_blocks() -> None:
    caches = caches_of("LBNHC")
    copier = HostCopier(planes_of(caches, 5))
    part = memoryview(bytearray(part_bytes_of(planes_of(caches, 5))))
    with pytest.raises(ValueError, match="zip"):
        copier.load([0, 1], [part])
    with pytest.raises(ValueError, match="zip"):
        copier.save([0], [part, part], None)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the KV cache in the memory of CPU or CUDA device, got meta"):
        copier_of([torch.empty((1, 2, 3), dtype=torch.uint8, device="meta")])
    with pytest.raises(ValueError, match="got cpu, meta"):
        copier_of([torch.empty((1, 2, 3), dtype=torch.uint8, device=device) for device in ("cpu", "meta")])


# On a device


class Stream:
    """In the place of CUDA's: what it is given is done at once."""

    def __init__(self, *_: Any) -> None:
        self.did: list[str] = []

    def wait_event(self, event: Any) -> None:
        self.did.append(f"wait for {event}")

    def synchronize(self) -> None:
        self.did.append("synchronize")

    def record_event(self) -> str:
        return "a mark"


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The CPU passes for a CUDA device. The streams that are current, the last one at the end."""
    current = [Stream()]

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    tensor = torch.tensor
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch, "tensor", lambda data, pin_memory: tensor(data) if pin_memory else None)
    return current


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    return pretend(monkeypatch)


@pytest.mark.parametrize("stage", [1, 200, 64 << 20])
@given(kv=kv_caches(), data=st.data())
@settings(deadline=None, max_examples=40, print_blob=True)
def test_what_a_device_copies(stage: int, kv: tuple[Caches, int], data: st.DataObject) -> None:
    """Also where what is on its way is more than the device has memory for."""
    caches, blocks = kv
    chosen = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copiers, "_STAGE_BYTES", stage)
        pretend(patch)
        check_copies(DeviceCopier(planes_of(caches, blocks)), caches, blocks, chosen)


def test_what_comes_in_eights_is_moved_in_eights(no_cuda: list[Stream]) -> None:
    del no_cuda
    for dtype, moved in ((torch.float32, torch.int64), (torch.uint8, torch.int64)):
        assert {p.dtype for p in DeviceCopier(planes_of(caches_of("BLNHC", dtype=dtype), 5))._planes} == {moved}
    odd = {"a": torch.zeros(5, 12, dtype=torch.uint8)}
    assert DeviceCopier(planes_of(odd, 5))._planes[0].dtype == torch.uint8
    shifted = {"a": torch.zeros(84, dtype=torch.uint8)[4:].view(5, 16)}
    assert DeviceCopier(planes_of(shifted, 5))._planes[0].dtype == torch.uint8


def test_streams(no_cuda: list[Stream]) -> None:
    """What is copied aside waits for what the engine had computed, and until all is copied; loads within a step are the
    calling thread's."""
    caches = caches_of("LBNHC")
    copier = DeviceCopier(planes_of(caches, 5))
    part = bytearray(part_bytes_of(planes_of(caches, 5)))
    assert copier.mark() == "a mark"
    copier.save([1], [memoryview(part)], "the mark")
    assert copier._save_stream.did == ["wait for the mark", "synchronize"]
    assert copier.load([1], [memoryview(part)]) is no_cuda[0]
    with copier.aside("another mark"):
        stream = copier.load([1], [memoryview(part)])
        assert copier._load_stream.did == ["wait for another mark"]
    assert copier._load_stream.did == ["wait for another mark", "synchronize"]
    assert stream is copier._load_stream
    assert stream is not copier._save_stream
    assert len(no_cuda) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [5000, 64 << 20])
@pytest.mark.parametrize("layout", SERVED)
def test_a_real_device(layout: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(copiers, "_STAGE_BYTES", stage)
    host, there = caches_of(layout, 4, 40), caches_of(layout, 4, 40, device="cuda")
    planes = planes_of(there, 40)
    copier = copier_of(planes)
    assert isinstance(copier, DeviceCopier)
    chosen = [3, 39, 0, 17, 20]
    parts = [bytearray(part_bytes_of(planes)) for _ in chosen]
    copier.save(chosen, [memoryview(part) for part in parts], copier.mark())
    for part, block in zip(parts, chosen, strict=True):
        assert list(part) == [byte for cache in host.values() for byte in bytes_of(cache[block])]
    targets = [1, 2, 4, 5, 6]
    stream = copier.load(targets, [memoryview(part).toreadonly() for part in parts])
    stream.synchronize()
    for name, cache in host.items():
        for block, target in zip(chosen, targets, strict=True):
            assert torch.equal(there[name][target].cpu(), cache[block])
