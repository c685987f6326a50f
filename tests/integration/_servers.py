"""Real servers for tests: Valkey or Redis on a loopback port and a socket, and a proxy that spoils what they say."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from arena_support import TIMEOUT_S

if TYPE_CHECKING:
    from typing_extensions import Self

SLOTS = 16384  #: of a cluster


def lacking(what: str) -> NoReturn:
    """Skips the test, or the module that is being imported; where CI is set, fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)


def client() -> Any:
    """The official client; its methods have few type hints."""
    try:
        return importlib.import_module("valkey")
    except ImportError:
        lacking("the extra valkey is not installed")


def free_port() -> int:
    """A port of the loopback that nobody listens at now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def eventually(there: Callable[[], bool], what: str) -> None:
    """For what no event tells: asks until it is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Server:
    """One server, with nothing on disk that outlives it. Its port stays its own when it is restarted."""

    def __init__(self, folder: Path, *options: str, cluster: bool = False) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            lacking("neither valkey-server nor redis-server is installed")
        self.folder = folder
        self.path = folder / "s"
        self.port = free_port()
        self._log = folder / "log"
        self._command = [program, "--dir", str(folder), "--unixsocket", str(self.path), "--bind", "127.0.0.1"]
        self._command += ["--save", "", "--appendonly", "no", *options]
        if cluster:
            self.bus = free_port()
            self._command += ["--cluster-enabled", "yes", "--cluster-port", str(self.bus)]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Over TCP."""
        return f"valkey://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Over the socket."""
        return f"unix://{self.path}"

    @property
    def client(self) -> Any:
        """The client by itself; for servers that want no password."""
        return client().Valkey(unix_socket_path=str(self.path))

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            command = [*self._command, "--port", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            eventually(self._answers, f"the server does not answer: {self._log}")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """As a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)
            self._process = None

    def stop(self) -> None:
        """It is there, but does nothing until ``go_on``."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text(encoding="utf-8")
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(self.path))
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False


def join_cluster(servers: list[Server]) -> None:
    """Makes one cluster of servers made with ``cluster=True``, each with its share of the slots."""
    step = -(-SLOTS // len(servers))
    for number, server in enumerate(servers):
        first, last = number * step, min(SLOTS, (number + 1) * step) - 1
        with server.client as plain:
            plain.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            plain.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            plain.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port, servers[0].bus)
    wait_until_whole(servers)


def wait_until_whole(servers: list[Server]) -> None:
    """Until each server of a cluster says that all of it is there."""
    for server in servers:
        eventually(partial(_knows, server, servers), "the cluster does not come together")


def _knows(server: Server, servers: list[Server]) -> bool:
    """Whether one sees the whole cluster, and each other one where it is."""
    with server.client as plain:
        seen = {primary[1] for _, _, primary, *_ in plain.execute_command("CLUSTER SLOTS")}
        whole: bool = plain.execute_command("CLUSTER INFO")["cluster_state"] == "ok"
        return whole and seen == {each.port for each in servers}


class Proxy:
    """Stands between a client and a server, and sends on what the server says in pieces of random size.

    With ``cut_after``, each connection breaks after about so many bytes of it; with ``cuts``, only so many do.
    """

    def __init__(
        self, port: int, chance: random.Random, *, most: int, cut_after: int | None = None, cuts: float = float("inf")
    ) -> None:
        self._port = port
        self._chance = chance
        self._most = most
        self._cut_after = cut_after
        self._cuts = cuts
        self.accepted = 0  #: connections so far
        self._allowed = float("inf")  # bytes
        self._change = threading.Condition()
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)

    def hold_after(self, nbytes: float) -> None:
        """Sends so many more bytes of the server's on, and then none until this is called again."""
        with self._change:
            self._allowed = nbytes
            self._change.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold_after(float("inf"))
        for sock in (self._listener, *self._socks):
            _shut(sock)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        for sock in (self._listener, *self._socks):
            sock.close()

    def _spawn(self, work: Callable[..., None], *args: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.accepted += 1
                far = socket.create_connection(("127.0.0.1", self._port))
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socks += [near, far]
                self._spawn(self._ask, near, far)
                self._spawn(self._answer, far, near)

    def _ask(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)
        _shut(far)

    def _answer(self, far: socket.socket, near: socket.socket) -> None:
        left = 1 << 62
        if self._cut_after is not None and self.accepted <= self._cuts:
            left = self._chance.randrange(1, 2 * self._cut_after)
        with suppress(OSError):
            while left > 0 and (data := far.recv(min(left, self._chance.randint(1, self._most)))):
                with self._change:
                    assert self._change.wait_for(lambda: self._allowed > 0, TIMEOUT_S)
                    self._allowed -= len(data)
                near.sendall(data)
                left -= len(data)
        _shut(near)
        _shut(far)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
