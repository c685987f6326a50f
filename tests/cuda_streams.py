"""Streams of the double, whose work is late where a test holds them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from cuda_names import CUresult, Refused

WAIT_S = 60  #: after which something waits for work that nobody lets go
CONTEXTS = 1000  #: the primary context of the first device that is visible
_LEGACY, _PER_THREAD = (0, 1), 2  #: streams that every context has


@dataclass(frozen=True)
class Stream:
    """As much of torch.cuda.Stream as tells which it is."""

    device_index: int
    cuda_stream: int

    @property
    def context(self) -> int:
        """That of its device."""
        return CONTEXTS + self.device_index


class Work:
    """All that came into a stream up to some point: done, unless it is held."""

    def __init__(self, *, done: bool) -> None:
        self.jobs: list[Callable[[], object]] = []
        self._done = threading.Event()
        if done:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to do."""
        return self._done.is_set()

    def finish(self) -> None:
        """Does what is left."""
        while self.jobs:
            self.jobs.pop(0)()
        self._done.set()

    def check(self) -> None:
        """What a query answers."""
        if not self.done:
            raise Refused(CUresult.CUDA_ERROR_NOT_READY)

    def wait(self) -> None:
        """Returns when all is done."""
        assert self._done.wait(WAIT_S), "waits for a stream that is held, and that nobody lets go"


@dataclass
class Event:
    """Of a context; done until it is recorded."""

    context: int
    work: Work = field(default_factory=lambda: Work(done=True))


class Streams:
    """Those of one process, and its events."""

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self._works: dict[tuple[int, ...], Work] = {}  # the last work of each
        self._contexts: dict[int, int] = {}  # of the streams that were made
        self._handles = itertools.count(0x5000, 0x10)
        self._lock = threading.RLock()

    def make(self, device: int) -> Stream:
        """A new one, which waits for no other."""
        stream = Stream(device, next(self._handles))
        self._contexts[stream.cuda_stream] = stream.context
        return stream

    def work(self, handle: int, current: int) -> tuple[int, Work]:
        """A stream's context and its work, where ``current`` is the caller's context."""
        with self._lock:
            key = self._key(handle, current)
            return key[0], self._works.setdefault(key, Work(done=True))

    def hold(self, stream: Stream) -> None:
        """What comes into it from now on is not done."""
        with self._lock:
            if self.work(stream.cuda_stream, stream.context)[1].done:
                self._works[self._key(stream.cuda_stream, stream.context)] = Work(done=False)

    def let_go(self, stream: Stream) -> None:
        """All that came into it is done, in its order."""
        with self._lock:
            self.work(stream.cuda_stream, stream.context)[1].finish()

    def launch(self, stream: Stream, job: Callable[[], object]) -> None:
        """Work for it."""
        with self._lock:
            work = self.work(stream.cuda_stream, stream.context)[1]
            if work.done:
                job()
            else:
                work.jobs.append(job)

    def make_event(self, context: int) -> int:
        """A new one."""
        handle = next(self._handles)
        self.events[handle] = Event(context)
        return handle

    def event(self, handle: int) -> Event:
        """One that was made."""
        if handle not in self.events:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return self.events[handle]

    def _key(self, handle: int, current: int) -> tuple[int, ...]:
        if handle in _LEGACY:
            return (current, 0)
        if handle == _PER_THREAD:
            return (current, handle, threading.get_ident())
        if handle not in self._contexts:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return (self._contexts[handle], handle)
