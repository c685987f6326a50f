"""The device as torch sees it: all that the device programs ask of torch.cuda. No other of them imports torch.

Only what is public in torch 2.6 and later.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # that ForkingPickler knows tensors
from torch.nn.utils import get_total_norm

PRODUCT = 8192  # rows and columns


class NoGpuError(Exception):
    """There is none here."""


class Gpu:
    """Device 0, with a context in the calling thread."""

    device = "cuda:0"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NoGpuError(f"torch {torch.__version__} sees no CUDA device here")
        torch.cuda.set_device(self.device)
        self.memory(1)

    def facts(self) -> dict[str, str]:
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "device": f"{torch.cuda.get_device_name(self.device)}, {free >> 30} of {total >> 30} GiB free",
            "driver": _driver_version(),
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        }

    # Memory

    def memory(self, nbytes: int) -> torch.Tensor:
        """Bytes on the device, of torch's own allocator."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Bytes on the host, page-locked by torch."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def pieces(self, tensor: torch.Tensor, nbytes: int) -> list[torch.Tensor]:
        """A tensor of bytes in parts of so many."""
        return list(tensor.split(nbytes))  # type: ignore[no-untyped-call]

    def export(self, tensor: torch.Tensor) -> bytes:
        """A tensor as torch hands it to another process, by CUDA IPC. It must live until that one has dropped it."""
        return bytes(ForkingPickler.dumps(tensor))

    def imported(self, exported: bytes) -> torch.Tensor:
        tensor: torch.Tensor = ForkingPickler.loads(exported)
        return tensor

    def forget(self) -> None:
        """Gives back to the driver what torch keeps for later."""
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()

    # Work

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of all elements of all of them: kernels that read each byte once, and write next to nothing."""
        return torch.linalg.vector_norm(tensors[0]) if len(tensors) == 1 else get_total_norm(tensors)

    def captured(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Work as a CUDA graph, so that small kernels are not as slow as Python: how to launch it, and its result."""
        side = self.stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a thread of the cache may ask the driver something meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result

    @cached_property
    def product(self) -> Callable[[], object]:
        """A large matrix product, which keeps the device's cores busy for a millisecond or so."""
        left, right, out = (torch.randn(PRODUCT, PRODUCT, device=self.device).bfloat16() for _ in range(3))
        return lambda: torch.mm(left, right, out=out)

    # Streams and time

    def stream(self) -> torch.cuda.Stream:
        """A new one, which waits for no other."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """What is launched in the block goes to that stream."""
        return torch.cuda.stream(stream)

    def wait(self) -> None:
        """For all that was launched."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> Callable[[], None]:
        """A point in the current stream: how to wait for it. Other threads run meanwhile."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def seconds(self, work: Callable[[], object]) -> float:
        """Of work on the current stream, by the device's clock."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1000


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return asked.stdout.strip()
