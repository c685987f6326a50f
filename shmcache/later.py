"""Shares that go back once a stream has passed, and the thread that sees to it.

Whoever calls the cache looks after them on the way; the thread does while nobody calls. It lives while there is
something to look after. A stream is asked (a query, which blocks nothing); it never calls into Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shmcache.config import shown
from shmcache.device import Driver, Event

__all__ = ["Later", "event_in"]

_POLL_S: Final = 0.001  #: between two looks while a stream is waited for
_LOOK_S: Final = 0.2  #: between two looks while regions of others are open


class Later:
    """What ends by itself. ``chores`` closes regions that are lost, and says whether others are open.

    ``lock`` is the attachment's, an RLock. There must be no second one: a finalizer may run wherever Python allocates,
    in this thread too, and call anything of the attachment.
    """

    def __init__(self, lock: threading.RLock, chores: Callable[[], bool]) -> None:
        #: What is waited for: never another list, so that who calls the cache can look at it for next to nothing.
        self.waiting: Final[list[tuple[Event, Callable[[], object]]]] = []
        self._chores: Final = chores
        self._lock: Final = lock  # of changes of waiting, and of the thread
        self._looking = False
        self._wake: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, event: Event, give_back: Callable[[], object]) -> None:
        """``give_back`` is called when the event's stream has passed it."""
        with self._lock:
            self.waiting.append((event, give_back))
            self.watch()

    def poll(self) -> None:
        """Gives back what can go. Returns at once where another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()

    def waits(self) -> bool:
        """The same, and whether something has to be waited for yet."""
        with self._lock:
            self._look()
            return bool(self.waiting)

    def _look(self) -> None:
        """Under the lock, so that nothing is on its way when it is let go. A finalizer that comes here while this
        thread is at it finds all that waited still waiting."""
        if self._looking:
            return
        self._looking = True
        try:
            for one in list(self.waiting):
                event, give_back = one
                if event.passed():
                    give_back()
                    event.destroy()
                    self.waiting.remove(one)
        finally:
            self._looking = False

    def watch(self) -> None:
        """Lets the thread look after what there is from now on. Where the process may have no more threads, those who
        call the cache do alone."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="shmcache-later", daemon=True)
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread
        self.wake()

    def wake(self) -> None:
        """The thread looks now. It ends where nothing is left."""
        self._wake.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._look()
                if not (self._chores() or self.waiting):
                    self._thread = None
                    return
                self._wake.clear()
                pause_s = _POLL_S if self.waiting else _LOOK_S
            self._wake.wait(pause_s)


def event_in(driver: Driver, stream: object) -> Event:
    """Where a stream is now. ``stream``: torch's, or anything with ``cuda_stream`` or ``__cuda_stream__``, or its
    handle as int. TypeError for others."""
    number = _handle_of(stream)
    ordinal = getattr(stream, "device_index", None)
    if isinstance(ordinal, int):
        return Event(driver, driver.device(ordinal).context, number)
    context = driver.own_context()
    if number > 2:  # below are the default streams, which every context has
        with driver.current(context):
            context = driver.one(driver.calls.cuStreamGetCtx(number))
    return Event(driver, context, number)


def _handle_of(stream: object) -> int:
    handle = getattr(stream, "cuda_stream", stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if callable(protocol):
        handle = protocol()[1]
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise TypeError(f"stream: expected a torch.cuda.Stream, or a stream's handle as int, got {shown(stream)}")
    return handle
