"""The calls of one adapter, on threads of their own: an adapter that hangs stops nobody but itself."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from shmcache.config import shown
from shmcache.storage.adapter import L2Adapter

__all__ = ["Call", "Channel", "answers", "describe"]


_log = logging.getLogger("shmcache.storage")


def describe(adapter: L2Adapter, error: BaseException) -> str:
    """An adapter's error in words. Not the exception: its traceback would keep views of the arena alive."""
    try:
        return f"{adapter!r}: {type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 # of somebody's __repr__ or __str__
        return f"{type(adapter).__name__}: {type(error).__name__}"


def answers(value: object, n: int, *kinds: type) -> bool:
    """Whether an adapter answered once a key, and in one of these types: what else compares as it likes, or raises."""
    return type(value) in (list, tuple) and len(value) == n and all(type(one) in kinds for one in value)  # type: ignore[arg-type, attr-defined]


class Call:
    """One call of an adapter. ``done(call)`` is called in the channel's thread once ``value`` or ``error`` is set."""

    __slots__ = ("_lock", "_state", "done", "error", "run", "started", "took_s", "value")

    def __init__(self, run: Callable[[], Any], done: Callable[[Call], None]) -> None:
        self.run = run
        self.done = done
        self.value: Any = None
        self.error: str | None = None
        self.started = 0.0  # time.monotonic() when a thread took it up
        self.took_s = 0.0
        self._state = "queued"
        self._lock = threading.Lock()

    def _move(self, before: str, after: str) -> bool:
        with self._lock:
            moved = self._state == before
            self._state = after if moved else self._state
            return moved

    def take_up(self) -> bool:
        """For the channel's thread: False where it was called off."""
        self.started = time.monotonic()
        return self._move("queued", "running")

    def call_off(self) -> bool:
        """False where it is running already; else it will never run."""
        return self._move("queued", "off")

    def runs_longer_than(self, limit_s: float) -> bool:
        """Whether a thread is at it for so long."""
        return self._state == "running" and time.monotonic() - self.started > limit_s

    def end(self) -> None:
        """For the channel's thread: tells who waits."""
        self._move("running", "over")
        self.done(self)


class Channel:
    """Up to ``threads`` calls of one adapter at once, begun in the order given.

    The threads are daemons: an adapter that never returns does not keep the process from ending.
    """

    def __init__(self, adapter: L2Adapter, threads: int) -> None:
        self.adapter: Final = adapter
        self.name: Final = shown(adapter)
        self.threads: Final = threads
        self._failing = False
        self._started: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._running: dict[int, Call] = {}  # by thread
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()

    def submit(self, run: Callable[[], Any], done: Callable[[Call], None]) -> Call:
        """Begins ``run()`` as soon as a thread is free. One thread may submit: the prefetch loop's."""
        if not self._idle.acquire(blocking=False) and len(self._started) < self.threads:
            self._start_thread()
        call = Call(run, done)
        self._calls.put(call)
        return call

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="shmcache-l2", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._started:  # else those that are there do it all
                raise
        else:
            self._started.append(thread)

    def hangs(self, limit_s: float) -> bool:
        """Whether every thread is in a call for longer than ``limit_s``: what waits behind them waits for ever."""
        running = list(self._running.values())
        return len(running) == self.threads and all(call.runs_longer_than(limit_s) for call in running)

    def note(self, error: str | None) -> None:
        """For the loop: what came of a call. Logs when the adapter begins to fail, and when it works again."""
        if error is not None and not self._failing:
            _log.warning("an L2 fails: %s", error)
        if error is None and self._failing:
            _log.warning("an L2 works again: %s", self.name)
        self._failing = error is not None

    def close(self) -> None:
        """Ends each thread once it is back; waits for none."""
        for _ in self._started:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if call.take_up():
                self._running[threading.get_ident()] = call
                self._run(call)
                del self._running[threading.get_ident()]
            del call  # a thread that waits keeps no view alive
            self._idle.release()

    def _run(self, call: Call) -> None:
        try:
            call.value = call.run()
        except BaseException as error:  # noqa: BLE001 # whatever an adapter raises is its failure, not ours
            call.error = describe(self.adapter, error)
        call.took_s = time.monotonic() - call.started
        del call.run  # and the views in it
        call.end()
