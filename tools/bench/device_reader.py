"""The second process: attached to the same arena, it does on its side of the device what the first one orders.

An order is a function of a module, and its arguments; it is called with this process's ``Side`` in front.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from device_common import Side

import shmcache

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE_S = 120.0  # with an order, after which the second process is taken for stuck
LEAVE_S = 10.0


class Reader:
    """The second process, as the first one sees it. RuntimeError where it cannot, or is gone."""

    def __init__(self, arena: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could not use CUDA
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arena), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        self.answer()  # ready
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orders.close()
        self._process.join(LEAVE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, what: Callable[..., Any], *args: Any) -> Any:
        self.order(what, *args)
        return self.answer()

    def order(self, what: Callable[..., Any], *args: Any) -> None:
        """``answer`` gives what comes of it."""
        try:
            self._orders.send((what, args))
        except OSError:
            raise self._gone() from None

    def answer(self) -> Any:
        if not self._orders.poll(PATIENCE_S):
            raise RuntimeError(f"the second process has not answered for {PATIENCE_S:.0f} s")
        try:
            done, found = self._orders.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if not done:
            raise RuntimeError(f"the second process: {found}")
        return found

    def _gone(self) -> RuntimeError:
        self._process.join(LEAVE_S)
        return RuntimeError(f"the second process ended, exit code {self._process.exitcode}; see its message above")


def _serve(orders: Connection, arena: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the first process
    from device_gpu import Gpu, NoGpuError  # noqa: PLC0415 # torch takes seconds

    try:
        with shmcache.attach(arena) as cache:
            side = Side(Gpu(), cache)
            orders.send((True, None))
            while True:
                what, args = orders.recv()
                orders.send((True, what(side, *args)))
    except (EOFError, BrokenPipeError):
        return  # the first process wants no more, or is gone
    except (shmcache.ShmcacheError, NoGpuError, RuntimeError, OSError) as error:
        orders.send((False, f"{type(error).__name__}: {error}"))
