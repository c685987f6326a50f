"""The GPUs of tests that run on the double of the driver, and on the real one where there is a GPU.

::

    @pytest.fixture(params=cuda_support.KINDS)
    def gpus(request, tmp_path):
        with cuda_support.gpus(request.param, tmp_path) as gpus:
            yield gpus
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import cuda_double
import cuda_torch
import pytest
import torch

#: for a fixture's ``params``
KINDS: Final = ["double", pytest.param("real", marks=pytest.mark.gpu)]
_PINNED_BYTES: Final = 16 << 20
_HELD_S: Final = 30  #: a real stream is let go after that, so that a test that fails does not hang


class Double:
    """Two devices that are not there. Tensors are on the CPU, so ask for their contents here only."""

    kind = "double"

    def __init__(self, driver: cuda_double.Double, options: dict[str, Any]) -> None:
        self.driver = driver
        self.devices = [f"cuda:{i}" for i in range(driver.cuDeviceGetCount())]
        #: what another process does before it uses CUDA
        self.order = f"import cuda_double; double = cuda_double.install({str(driver.root)!r}, **{options!r})"

    def stream(self, device: int = 0) -> Any:
        """A new stream."""
        return self.driver.make_stream(device)

    def current(self, stream: Any) -> AbstractContextManager[Any]:
        """It is torch's current one, of this thread, for the time of the block."""
        return cuda_torch.current_stream(stream)

    def hold(self, stream: Any) -> None:
        """What comes into the stream from now on is done when it is let go."""
        self.driver.hold(stream)

    def let_go(self, stream: Any) -> None:
        """All is done that came into the stream."""
        self.driver.let_go(stream)

    def fill(self, tensor: torch.Tensor, byte: int, stream: Any = None) -> None:
        """Work for a stream (None: the current one) that sets all bytes of a tensor."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        self._launch(stream, lambda: ctypes.memset(address, byte, nbytes))

    def copy(self, tensor: torch.Tensor, stream: Any = None) -> torch.Tensor:
        """Work for a stream that copies a tensor: to a host tensor of bytes, which has them when it is done."""
        there = torch.zeros(tensor.nbytes, dtype=torch.uint8)
        source, target, nbytes = tensor.data_ptr(), there.data_ptr(), tensor.nbytes
        self._launch(stream, lambda: (there, ctypes.memmove(target, source, nbytes)))
        return there

    def contents(self, tensor: torch.Tensor) -> bytes:
        """All bytes of a tensor as they are now."""
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)

    def _launch(self, stream: Any, job: Callable[[], object]) -> None:
        current: Any = torch.cuda.current_stream()
        self.driver.launch(stream or current, job)


class Real:
    """Those of this host."""

    kind = "real"
    order = "import torch"

    def __init__(self) -> None:
        self.devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self._flags: dict[int, torch.Tensor] = {}  # by stream: what holds it, until it is 1
        # To allocate page-locked memory may wait for all streams, held ones, too: so it is done now.
        self._pinned = torch.zeros(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
        self._used = 0
        for device in self.devices:  # kernels are loaded at their first use, which waits for all streams
            there = torch.empty(16, dtype=torch.uint8, device=device)
            self.fill(there, 1)
            self.contents(there)

    def stream(self, device: int = 0) -> Any:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def hold(self, stream: Any) -> None:
        from cuda.bindings import driver

        flag = self._host(4).view(torch.int32)
        self._flags[stream.cuda_stream] = flag
        at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        with torch.cuda.device(stream.device):
            (error,) = driver.cuStreamWaitValue32(stream.cuda_stream, flag.data_ptr(), 1, at_least)
        assert error == driver.CUresult.CUDA_SUCCESS, error
        timer = threading.Timer(_HELD_S, flag.fill_, (1,))
        timer.daemon = True
        timer.start()

    def let_go(self, stream: Any) -> None:
        self._flags[stream.cuda_stream].fill_(1)
        stream.synchronize()

    def fill(self, tensor: torch.Tensor, byte: int, stream: Any = None) -> None:
        with torch.cuda.stream(stream):
            tensor.view(torch.uint8).fill_(byte)

    def copy(self, tensor: torch.Tensor, stream: Any = None) -> torch.Tensor:
        there = self._host(tensor.nbytes)
        with torch.cuda.stream(stream):
            there.copy_(tensor.view(torch.uint8).flatten(), non_blocking=True)
        return there

    def contents(self, tensor: torch.Tensor) -> bytes:
        return tensor.view(torch.uint8).cpu().numpy().tobytes()

    def end(self) -> None:
        """Nothing is held any more."""
        for flag in self._flags.values():
            flag.fill_(1)
        torch.cuda.synchronize()

    def _host(self, nbytes: int) -> torch.Tensor:
        at, self._used = self._used, self._used + (nbytes + 63) // 64 * 64
        assert self._used <= _PINNED_BYTES, "a test holds and copies more than was thought of"
        return self._pinned[at : at + nbytes]


@contextmanager
def gpus(kind: str, root: Path, **options: Any) -> Iterator[Double | Real]:
    """The double, with ``options`` of it; or the real ones, where the test is skipped if there are none.

    Fails a test that does to the double what a driver answers with undefined behaviour.
    """
    if kind == "real":
        pytest.importorskip("cuda.bindings")
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        real = Real()
        try:
            yield real
        finally:
            real.end()
        return
    options = {"devices": 2, **options}
    with cuda_double.installed(root, **options) as driver:
        yield Double(driver, options)
    found = cuda_double.violations(root)
    assert not found, found
