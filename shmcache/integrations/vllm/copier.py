"""Copies between blocks of the engine's KV cache and parts of objects.

The engine has a tensor a layer, all of them with the blocks in one order, often all in one storage. ``planes_of`` makes
of them as few strided arrays of bytes as it can, each (layers, blocks, bytes of a page). A part is what a block has in
the first plane, layer after layer, then in the second, and so on; it is contiguous, so a block is copied by one call a
plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

import numpy as np
import torch

from shmcache import Layout

__all__ = ["Copier", "DeviceCopier", "HostCopier", "copier_of", "part_bytes_of", "planes_of"]

_STAGE_BYTES: Final = 64 << 20  #: device memory for what is on its way, at most; at least one block


class Copier(Protocol):
    """Copies of one rank. ``parts`` are contiguous bytes, one for each of ``blocks``, and are not kept."""

    def load(self, blocks: list[int], parts: Sequence[memoryview]) -> Any:
        """Into blocks. None: it is done; else the stream that does it, the calling thread's."""

    def mark(self) -> Any:
        """What the engine has computed until now, for ``save`` and ``aside``."""

    def save(self, blocks: list[int], parts: Sequence[memoryview], after: Any) -> None:
        """Out of blocks as they are at a mark. It is done on return."""

    def aside(self, after: Any) -> AbstractContextManager[Any]:
        """For a thread whose loads wait for a mark, and not for what the engine computes later; they are done at its
        end."""


def planes_of(caches: Mapping[str, torch.Tensor], num_blocks: int) -> list[torch.Tensor]:
    """Tensors of the engine, by layer, as uint8 of shape (layers, blocks, bytes of a page), in the order of the layers.

    ValueError where a page is not one run of bytes, as in layouts whose heads are further out than the blocks.
    """
    pages: list[torch.Tensor] = []
    for name, cache in caches.items():
        page = _pages(name, cache, num_blocks)
        if not any(_same_place(page, other) for other in pages):  # layers may share theirs
            pages.append(page)
    planes: list[torch.Tensor] = []
    while pages:
        run = _evenly_spaced(pages)
        planes.append(_stacked(pages[:run]))
        pages = pages[run:]
    return planes


def part_bytes_of(planes: Sequence[torch.Tensor]) -> int:
    """Bytes that one block has in all planes."""
    return sum(plane.shape[0] * plane.shape[2] for plane in planes)


def copier_of(planes: list[torch.Tensor]) -> Copier:
    """For the device that the planes are on."""
    kinds = {plane.device.type for plane in planes}
    if kinds == {"cpu"}:
        return HostCopier(planes)
    if kinds == {"cuda"}:
        return DeviceCopier(planes)
    raise ValueError(f"expected the KV cache in the memory of CPU or CUDA device, got {', '.join(sorted(kinds))}")


class HostCopier(Copier):
    """For engines that compute on the CPU."""

    def __init__(self, planes: list[torch.Tensor]) -> None:
        self._planes = [plane.numpy() for plane in planes]

    def load(self, blocks: list[int], parts: Sequence[memoryview]) -> None:
        """Done on return."""
        for block, part in zip(blocks, parts, strict=True):
            for plane, piece in self._pieces(part):
                np.copyto(plane[:, block], piece)

    def mark(self) -> None:
        """What the CPU was asked to compute is computed."""

    def save(self, blocks: list[int], parts: Sequence[memoryview], after: Any) -> None:  # noqa: ARG002 # see mark
        """Done on return."""
        for block, part in zip(blocks, parts, strict=True):
            for plane, piece in self._pieces(part):
                np.copyto(piece, plane[:, block])

    def aside(self, after: Any) -> AbstractContextManager[Any]:  # noqa: ARG002 # see mark
        """Nothing: a thread is aside."""
        return nullcontext()

    def _pieces(self, part: memoryview) -> Iterator[tuple[Any, Any]]:
        """Each plane, and what of the part belongs to it, shaped as its layers are."""
        rest = np.frombuffer(part, np.uint8)
        for plane in self._planes:
            layers, _, page = plane.shape
            yield plane, rest[: layers * page].reshape(layers, page)
            rest = rest[layers * page :]


class DeviceCopier(Copier):
    """For engines on a CUDA device: parts go over the bus in one piece each, and are spread over the layers, or
    collected from them, on the device, many blocks at a time. The arena should be pinned."""

    def __init__(self, planes: list[torch.Tensor]) -> None:
        self._planes = _in_words(planes)
        self._device = planes[0].device
        self._part_bytes = part_bytes_of(planes)
        self._layout = Layout((self._part_bytes,), "uint8")
        self._chunk = max(1, _STAGE_BYTES // self._part_bytes)  # blocks at a time
        self._load_stream = torch.cuda.Stream(self._device)
        self._save_stream = torch.cuda.Stream(self._device)

    def load(self, blocks: list[int], parts: Sequence[memoryview]) -> Any:
        """Enqueued on return."""
        with torch.cuda.device(self._device):
            for ids, some in self._chunks(blocks, parts):
                stage = self._stage(len(some))
                for row, part in zip(stage, some, strict=True):
                    row.copy_(self._tensor(part), non_blocking=True)
                for plane, piece in self._pieces(stage):
                    plane.index_copy_(1, ids, piece)
            return torch.cuda.current_stream()

    def mark(self) -> Any:
        """An event of the engine's stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def save(self, blocks: list[int], parts: Sequence[memoryview], after: Any) -> None:
        """Waits for the mark and for the copies, not for what the engine computes meanwhile."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._save_stream):
            self._save_stream.wait_event(after)
            try:
                for ids, some in self._chunks(blocks, parts):
                    stage = self._stage(len(some))
                    for plane, piece in self._pieces(stage):
                        piece.copy_(plane.index_select(1, ids))
                    for row, part in zip(stage, some, strict=True):
                        self._tensor(part).copy_(row, non_blocking=True)
            finally:
                self._save_stream.synchronize()  # also of an error: nothing may be written later

    @contextmanager
    def aside(self, after: Any) -> Iterator[None]:
        """Enqueues on a stream of this copier's, and waits for it at the end, also of an error."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._load_stream):
            self._load_stream.wait_event(after)
            try:
                yield
            finally:
                self._load_stream.synchronize()

    def _stage(self, rows: int) -> torch.Tensor:
        """Device memory of the current stream: the allocator gives it to nobody else before that has passed."""
        return torch.empty((rows, self._part_bytes), dtype=torch.uint8, device=self._device)

    def _chunks(
        self, blocks: list[int], parts: Sequence[memoryview]
    ) -> Iterator[tuple[torch.Tensor, Sequence[memoryview]]]:
        for start in range(0, len(blocks), self._chunk):
            ids = torch.tensor(blocks[start : start + self._chunk], pin_memory=True)
            yield ids.to(self._device, non_blocking=True), parts[start : start + self._chunk]

    def _pieces(self, stage: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each plane, and what of staged parts belongs to it, as (layers, parts, page)."""
        start = 0
        for plane in self._planes:
            layers, _, page = plane.shape
            stop = start + layers * page * plane.element_size()
            yield plane, stage[:, start:stop].view(plane.dtype).view(-1, layers, page).transpose(0, 1)
            start = stop

    def _tensor(self, part: memoryview) -> Any:
        """Over the bytes of a part, which may be read-only."""
        return self._layout.tensors(np.frombuffer(part, np.uint8))


def _in_words(planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory by 8 bytes, which the device moves faster, where all of it comes in eights."""
    places = [place for plane in planes for place in (plane.storage_offset(), plane.shape[2], *plane.stride()[:2])]
    return [plane.view(torch.int64) for plane in planes] if not any(place % 8 for place in places) else planes


def _pages(name: str, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A layer as (blocks, bytes of a page). Kernels may have it in smaller blocks, several of which make one."""
    if num_blocks < 1 or cache.shape[0] % num_blocks:
        raise ValueError(f"{name}: expected {num_blocks} blocks in the first dimension, got shape {tuple(cache.shape)}")
    of_a_block = cache.unflatten(0, (num_blocks, -1))
    inner = sorted(zip(of_a_block.stride()[1:], of_a_block.shape[1:], strict=True))
    run = 1
    for stride, length in inner:
        if length > 1 and stride != run:
            raise ValueError(
                f"{name}: expected the bytes of a block in one run, got shape {tuple(cache.shape)} with strides "
                f"{cache.stride()}; set VLLM_KV_CACHE_LAYOUT to LBNHC or LBHNC"
            )
        run *= length
    size = cache.element_size()
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(
        cache.untyped_storage(),
        cache.storage_offset() * size,
        (num_blocks, run * size),
        (of_a_block.stride(0) * size, 1),
    )


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _evenly_spaced(pages: list[torch.Tensor]) -> int:
    """How many leading layers lie in one storage, one as far from the next as that from the one after."""
    first = pages[0]
    gap = pages[1].data_ptr() - first.data_ptr() if len(pages) > 1 else 0
    run = 1
    while run < len(pages):
        page = pages[run]
        alike = page.shape == first.shape and page.stride() == first.stride()
        together = page.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (alike and together and gap > 0 and page.data_ptr() == first.data_ptr() + run * gap):
            break
        run += 1
    return run


def _stacked(pages: list[torch.Tensor]) -> torch.Tensor:
    first = pages[0]
    gap = pages[1].data_ptr() - first.data_ptr() if len(pages) > 1 else 0
    return first.as_strided((len(pages), *first.shape), (gap, *first.stride()))
