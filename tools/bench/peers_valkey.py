"""A server of Valkey or Redis over a unix socket, which keeps nothing on a disk; each value is copied to its reader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers_common import Missing, Store, System, Work
from prefetch_stores import run_until_end


class Valkey(System):
    name = "Valkey"
    about = "valkey-server or redis-server over a unix socket, no persistence, client valkey: GET, MGET, SET"
    module = "peers_valkey"
    program: str

    def start(self) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None or find_spec("valkey") is None:
            raise Missing("needs valkey-server or redis-server on the PATH, and pip install '.[peers]'")
        self.program = program
        socket = self.folder / "valkey"
        flags = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        run_until_end(self.stack, [program, *flags, "--dir", str(self.folder)], socket.exists)
        self.socket = socket

    @contextmanager
    def store(self, keys: Sequence[bytes], value: bytes) -> Iterator[Store]:
        with closing(_client(self.socket)) as client:
            for key in keys:
                client.set(key, value)
            works: dict[str, Work] = {
                "hit": client.get,
                "hits": client.mget,
                "miss": client.get,
                "misses": client.mget,
                "put_new": lambda key: client.set(key, value),
                "put_over": lambda key: client.set(key, value),
            }
            store = Store(works, forget=lambda some: client.delete(*some), address=str(self.socket))
            store.cycle = store.cycle_by_key
            yield store
            client.flushall()  # after an error or an interrupt the server goes as a whole


@contextmanager
def join(address: str) -> Iterator[Work]:
    with closing(_client(Path(address))) as client:
        yield client.get


def _client(socket: Path) -> Any:
    return import_module("valkey").Valkey(unix_socket_path=str(socket))
