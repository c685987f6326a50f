"""In place of tools/bench/device_gpu.py, on the double of the driver: the same methods, on the CPU and its clock.

``install`` is called by each process as it starts. With SHMCACHE_TEST_DIES set, the second process of the bench dies
when it is asked for a kernel.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing import parent_process
from typing import Any

import cuda_double
import cuda_torch
import torch
from torch.nn.utils import get_total_norm


class NoGpuError(Exception):
    pass


class Gpu:
    device = "cuda:0"
    driver: cuda_double.Double

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []

    def facts(self) -> dict[str, str]:
        return {"device": "a double"}

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(at <= begin and end <= at + nbytes for at, (nbytes, _) in self.driver.registered.items())

    def pieces(self, tensor: torch.Tensor, nbytes: int) -> list[torch.Tensor]:
        return list(tensor.split(nbytes))  # type: ignore[no-untyped-call]

    def export(self, tensor: torch.Tensor) -> bytes:
        return pickle.dumps(tensor.numpy())

    def imported(self, exported: bytes) -> torch.Tensor:
        return torch.from_numpy(pickle.loads(exported))  # noqa: S301 # our own

    def forget(self) -> None:
        pass

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.linalg.vector_norm(tensors[0]) if len(tensors) == 1 else get_total_norm(tensors)

    def captured(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        if os.environ.get("SHMCACHE_TEST_DIES") and parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return work, work()

    @property
    def product(self) -> Callable[[], object]:
        return lambda: time.sleep(0.0005)

    def stream(self) -> Any:
        return self.driver.make_stream(0)

    def current_stream(self) -> Any:
        return torch.cuda.current_stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return cuda_torch.current_stream(stream)

    def wait(self) -> None:
        pass

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def install(root: str) -> None:
    """For this process, whose ``device_gpu`` this module is from now on."""
    Gpu.driver = cuda_double.install(root, devices=1)
    sys.modules["device_gpu"] = sys.modules[__name__]
