"""What tests of storage share: an L2 in this process's memory that can be made to fail, and what must hold after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from arena_support import TIMEOUT_S, pattern

import shmcache
from shmcache import Cache, Status
from shmcache.stats import Gauges

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = 4096  #: of the arena that the fixture ``config`` describes
SIZE = 5000  #: of an object, unless a test says otherwise: two blocks, the second not full


def chain(n: int, tag: str = "k") -> list[bytes]:
    """The keys of a chain."""
    return [f"{tag}{i}".encode() for i in range(n)]


def data_of(key: bytes, nbytes: int = SIZE) -> bytes:
    """The right bytes of an object."""
    return pattern(key, nbytes)


def fill(cache: Cache, keys: Iterable[bytes], nbytes: int = SIZE) -> None:
    """Puts objects into the arena."""
    for key in keys:
        assert cache.put(key, data_of(key, nbytes)) is Status.OK


@dataclass
class Request:
    """A call of an adapter on its way to :class:`MemoryStore`, for a fault to look at."""

    method: str
    keys: list[bytes]
    views: list[memoryview]
    go_on: Callable[[], Any]  #: does what was asked, and gives the right answer


Fault = Callable[[Request], Any]  #: answers in the store's stead


class MemoryStore:
    """An L2 that keeps bytes in this process. ``faults[method]`` answers a call in its stead."""

    def __init__(self, keys: Iterable[bytes] = (), *, nbytes: int = SIZE, name: str = "memory") -> None:
        self.name = name
        self.objects = {key: data_of(key, nbytes) for key in keys}
        self.faults: dict[str, Fault] = {}
        self.calls: list[tuple[str, list[bytes]]] = []
        self.closed = False
        self.most = 0  # calls at once
        self._running = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryStore {self.name}>"

    def asked(self, method: str) -> list[list[bytes]]:
        """The keys of each call of a method."""
        with self._lock:
            return [keys for called, keys in self.calls if called == method]

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        answer: list[bool] = self._serve("lookup", keys, [], lambda: [key in self.objects for key in keys])
        return answer

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        answer: list[Status] = self._serve("load", keys, views, lambda: list(map(self._load, keys, views)))
        return answer

    def store(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        answer: list[Status] = self._serve("store", keys, views, lambda: list(map(self._store, keys, views)))
        return answer

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def close(self) -> None:
        self.closed = True

    def _load(self, key: bytes, view: memoryview) -> Status:
        data = self.objects.get(key)
        if data is None or len(data) != view.nbytes:
            return Status.NOT_FOUND
        view[:] = data
        return Status.OK

    def _store(self, key: bytes, view: memoryview) -> Status:
        self.objects[key] = bytes(view)
        return Status.OK

    def _serve(self, method: str, keys: Sequence[bytes], views: Sequence[memoryview], go_on: Callable[[], Any]) -> Any:
        with self._lock:
            self.calls.append((method, list(keys)))
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            fault = self.faults.get(method)
            return fault(Request(method, list(keys), list(views), go_on)) if fault else go_on()
        finally:
            with self._lock:
                self._running -= 1


def alternate(keys: Sequence[bytes], nbytes: int = SIZE) -> list[MemoryStore]:
    """Two stores, neither of which has two neighbours, so that each key is loaded by a call of its own."""
    return [MemoryStore(keys[start::2], nbytes=nbytes, name=name) for start, name in enumerate(("even", "odd"))]


@dataclass
class Gate:
    """A fault: calls (those that name ``key``, or all) wait here until it is opened, at the latest by the end of a
    ``with``, and go on then."""

    key: bytes | None = None
    then: Fault = field(default=lambda request: request.go_on())
    _open: threading.Event = field(default_factory=threading.Event)
    _reached: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __call__(self, request: Request) -> Any:
        if self.key is not None and self.key not in request.keys:
            return request.go_on()
        self._reached.release()
        assert self._open.wait(TIMEOUT_S)
        return self.then(request)

    def reached(self, calls: int = 1) -> None:
        """Returns when so many more calls wait here, or have waited."""
        for _ in range(calls):
            assert self._reached.acquire(timeout=TIMEOUT_S)

    def open(self) -> None:
        self._open.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()


def raises(error: BaseException) -> Fault:
    """A fault."""

    def fault(_: Request) -> Any:
        raise error

    return fault


def answers(change: Callable[[list[Any]], Any]) -> Fault:
    """A fault: does what was asked, and answers ``change(right answer)``."""
    return lambda request: change(request.go_on())


def eventually(there: Callable[[], bool], what: str) -> None:
    """For what no event tells: asks until it is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def shares(name: str) -> dict[int, tuple[int, int]]:
    """Reserved and held shares of each rank of an arena's only group."""
    ranks = [lane for lane in shmcache.inspect(name).lanes if lane.role == "rank"]
    return {lane.rank: (lane.reserved, lane.held) for lane in ranks if lane.rank is not None}


def check_no_thread_stays() -> None:
    """What managers start ends with them, soon."""

    def staying() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("shmcache")]

    eventually(lambda: not staying(), f"these stay: {staying()}")


def check_idle(cache: Cache) -> None:
    """Nobody has a share, writes, or is at anything."""
    stats = cache.stats()
    assert (stats.reserved, stats.held, stats.writing) == (0, 0, 0)
    assert stats.gauges == Gauges()
    assert cache.verify() == []


def check_nothing_leaked(cache: Cache) -> None:
    """Besides, the whole arena can be filled by one object. Ends what was in it.

    A call that hung, and for which nobody waited, may be about to end: what it held comes back then.
    """

    def busy() -> bool:
        stats = cache.stats()
        return (stats.held, stats.writing, stats.gauges) != (0, 0, Gauges())

    eventually(lambda: not busy(), "all is given back")
    check_idle(cache)
    cache.clear()
    stats = cache.stats()
    assert (stats.objects, stats.used_bytes) == (0, 0)
    with cache.reserve_write([b"all"], stats.capacity) as batch:
        assert batch.status == [Status.OK]
        batch.abort()
