"""Processes that do what a test tells them, until it stops or kills them.

A member is a process of its own, forked by a nursery: a process that has imported all that members need, and never
was in an arena. A member runs orders: Python source, in names that outlive the order, so that a share taken by one
order is still held at the next.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch  # noqa: F401 # here, once, since members that look at tensors are forked from who has it
from arena_support import TIMEOUT_S, pattern
from processes._segment import Segment

import shmcache

NAP_S = 0.001  #: between two looks at what another process does


class Member:
    """One such process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._orders = Connection(ours.detach())
        with theirs:
            self.pid = _nursery().fork(theirs)
        self._alive = True

    def attach(self, arena: str, group: str | None = None, rank: int | None = None, world_size: int = 1) -> None:
        """Gives later orders ``cache``, a cache attached to ``arena``."""
        self.do(f"cache = shmcache.attach({arena!r}, group={group!r}, rank={rank}, world_size={world_size})")

    def do(self, order: str) -> Any:
        """Has an order run, and gives the value where it is an expression. Raises what it raised."""
        self.begin(order)
        return self.answer()

    def begin(self, order: str) -> None:
        """Has an order run, and does not wait for it."""
        self._orders.send(order)

    def answer(self) -> Any:
        """What came of the order begun."""
        assert self._orders.poll(TIMEOUT_S), "the order hangs"
        fine, value = self._orders.recv()
        if not fine:
            raise value
        return value

    @property
    def busy(self) -> bool:
        """Whether the order begun has not come to its end."""
        return not self._orders.poll(0)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if self._alive:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> None:
        """Returns when the process is gone."""
        _nursery().wait(self.pid)
        self._alive = False
        self._orders.close()

    def stop(self) -> None:
        """SIGSTOP; returns when the process stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(self.pid) == "T")

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    """The letter in /proc: R, S, T (stopped), Z (a zombie); empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits for what another process brings about."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "what was waited for does not come"
        time.sleep(NAP_S)


class _Nursery:
    """The parent of all members, as a test sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(TIMEOUT_S)
        path = os.pathsep.join(sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )

    def fork(self, orders: socket.socket) -> int:
        """A new member, which takes its orders from a socket: its pid."""
        socket.send_fds(self._socket, [b"fork"], [orders.fileno()])
        return int(self._socket.recv(16))

    def wait(self, pid: int) -> None:
        """Waits for a member's end."""
        self._socket.send(b"%d" % pid)
        assert self._socket.recv(16) == b"gone"


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()


def _tend(parent: socket.socket) -> None:
    """The nursery's life, which ends with its parent's."""
    while True:
        request, fds, _, _ = socket.recv_fds(parent, 16, 1)
        if not request:
            return
        if not fds:
            os.waitpid(int(request), 0)
            parent.send(b"gone")
            continue
        pid = os.fork()
        if pid == 0:
            parent.close()
            _obey(Connection(fds[0]))
        os.close(fds[0])
        parent.send(b"%d" % pid)


def _obey(orders: Connection) -> None:
    """A member's life, which ends with its parent's, too."""
    names = {"os": os, "time": time, "shmcache": shmcache, "pattern": pattern, "Segment": Segment}
    while True:
        try:
            order = orders.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        orders.send(_outcome(order, names))


def _outcome(order: str, names: dict[str, Any]) -> tuple[bool, Any]:
    try:
        try:
            expression = compile(order, "<order>", "eval")
        except SyntaxError:
            exec(order, names)  # noqa: S102 # an order is a part of the test
            return True, None
        return True, eval(expression, names)  # noqa: S307
    except Exception as error:  # noqa: BLE001 # the test is told
        return False, error


if __name__ == "__main__":
    _tend(socket.socket(fileno=int(sys.argv[1])))
