"""Waiting that signals end: at once, and without anything being raised."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from types import FrameType


class Wakeups:
    """Waits for time to pass, a descriptor to be readable, or a signal."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def wait(self, seconds: float, fd: int | None = None) -> tuple[set[int], bool]:
        """The signals that came, and whether ``fd`` can be read."""
        fds = [self._pipe] if fd is None else [self._pipe, fd]
        readable = select.select(fds, [], [], max(0.0, seconds))[0]
        return set(os.read(self._pipe, 1024)) if self._pipe in readable else set(), fd in readable


@contextlib.contextmanager
def wakeups(*signums: int) -> Iterator[Wakeups]:
    """These signals, and all others that have a handler in Python, end a wait."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = [signal.signal(signum, _ignore) for signum in signums]
    try:
        yield Wakeups(reading)
    finally:
        for signum, handler in zip(signums, before, strict=True):
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(reading)
        os.close(writing)


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """What came is read from the pipe."""
