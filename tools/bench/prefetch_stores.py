"""The stores that prefetch.py measures, each with its peer: who loads the same objects without shmcache."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from shmcache.storage import FileStore, L2Adapter, MooncakeStore, ValkeyStore


class Missing(Exception):  # noqa: N818 # it is not wrong
    """What this store needs is not installed."""


class Store(ABC):
    """A store in a folder of its own; a context manager that ends what ``start`` started, also where that fails."""

    name: ClassVar[str]
    peer: ClassVar[str]  #: how the peer is called in the report

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()

    def start(self) -> None:  # noqa: B027 # most have a server to start, files have none
        """Missing where the store cannot be had here."""

    def __enter__(self) -> Self:
        with self.stack:
            self.start()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    @abstractmethod
    def adapter(self) -> L2Adapter:
        """What a StorageManager is given."""

    @abstractmethod
    def load(self, keys: Sequence[bytes], views: Sequence[memoryview], threads: int) -> float:
        """The peer loads every object, into its view if it can: seconds."""


def in_threads(threads: int, work: Callable[[int], object], count: int) -> float:
    """Calls ``work`` with 0 to ``count - 1``, in turn from each thread: seconds."""

    def one_thread(first: int) -> None:
        for i in range(first, count, threads):
            work(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there
        began = time.perf_counter()
        for done in [pool.submit(one_thread, first) for first in range(threads)]:
            done.result()
        return time.perf_counter() - began


class Files(Store):
    """Files in the page cache, beside open, preadv and close of the same files, without a look at what was read."""

    name = "file"
    peer = "preadv"

    def adapter(self) -> L2Adapter:
        return FileStore(self.folder)

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview], threads: int) -> float:
        paths = {bytes.fromhex(path.stem): str(path) for path in self.folder.glob("*/*.safetensors")}

        def read(i: int) -> None:
            file = os.open(paths[keys[i]], os.O_RDONLY)
            done, view = 0, views[i]
            while done < len(view):
                done += os.preadv(file, [view[done:]], os.fstat(file).st_size - len(view) + done)
            os.close(file)

        return in_threads(threads, read, len(keys))


class Valkey(Store):
    """A server of Valkey or Redis over a unix socket, beside the client's GET, whose bytes go nowhere."""

    name = "valkey"
    peer = "client's GET"

    def start(self) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None or not all(map(find_spec, ("valkey", "xxhash"))):
            raise Missing("needs valkey-server or redis-server, and pip install '.[valkey]'")
        self.socket = self.folder / "socket"
        command = [program, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.folder)]
        run_until_end(self.stack, command, self.socket.exists)

    def adapter(self) -> L2Adapter:
        return ValkeyStore(f"unix://{self.socket}")

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview], threads: int) -> float:
        client = import_module("valkey").Valkey.from_url(f"unix://{self.socket}")

        def get(i: int) -> None:
            if len(client.get(b"shmcache:" + keys[i])) < len(views[i]):
                raise RuntimeError("the server does not have the object")

        took = in_threads(threads, get, len(keys))
        client.close()
        return took


class Mooncake(Store):
    """A cluster of one holder on this host over TCP, beside the client's batch_get_into of the same objects, in
    batches of 16, into memory of its own."""

    name = "mooncake"
    peer = "batch_get_into"

    def start(self) -> None:
        found = find_spec("mooncake")
        if found is None or not found.submodule_search_locations or find_spec("xxhash") is None:
            raise Missing("needs pip install '.[mooncake]'")
        port = free_port()
        self.config = {
            "master_server_address": f"127.0.0.1:{port}",
            "local_hostname": "127.0.0.1",
            "global_segment_size": 0,
            "local_buffer_size": 64 << 20,
        }
        program = Path(found.submodule_search_locations[0]) / "mooncake_master"
        flags = [f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={free_port()}"]
        run_until_end(self.stack, [str(program), *flags, "--metrics_host=127.0.0.1"], lambda: listens(port))
        ready = self.folder / "ready"
        holder = json.dumps({**self.config, "global_segment_size": 1 << 30})
        run_until_end(self.stack, [sys.executable, "-c", _HOLDER, holder, str(ready)], ready.exists)
        self.client: Any = None

    def adapter(self) -> L2Adapter:
        return MooncakeStore(self.config)

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview], threads: int) -> float:
        nbytes = len(views[0]) + _TRAILER_BYTES
        if self.client is None:
            self.client = self._join()
        memory = np.zeros((len(keys), nbytes), np.uint8)
        self.client.register_buffer(memory.ctypes.data, memory.nbytes)
        names = [f"shmcache:{key.hex()}" for key in keys]
        places = [memory[i].ctypes.data for i in range(len(keys))]

        def get(batch: int) -> None:
            some = slice(16 * batch, 16 * batch + 16)
            got = self.client.batch_get_into(names[some], places[some], [nbytes] * len(names[some]))
            if set(got) != {nbytes}:
                raise RuntimeError(f"expected objects of {nbytes} bytes, got {got}")

        took = in_threads(threads, get, -(-len(keys) // 16))
        self.client.unregister_buffer(memory.ctypes.data)
        return took

    def _join(self) -> Any:
        client = import_module("mooncake.store").MooncakeDistributedStore()
        address = self.config["master_server_address"]
        if client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", address):
            raise RuntimeError("Mooncake's client could not join the cluster")
        self.stack.callback(client.close)
        return client


_TRAILER_BYTES = 24  # what MooncakeStore puts behind each object
_HOLDER = """
import json, pathlib, sys, time
from shmcache.storage import MooncakeStore
store = MooncakeStore(json.loads(sys.argv[1]))
pathlib.Path(sys.argv[2]).touch()
time.sleep(10**6)
"""


def run_until_end(stack: ExitStack, command: list[str], there: Callable[[], bool]) -> None:
    """Runs a program until the stack ends, and returns when ``there()``. RuntimeError where it ends before.

    In a session of its own: Ctrl-C on the terminal is not for the program, which its clients still need to clean up.
    """
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)

    def end() -> None:
        process.kill()
        process.wait()

    stack.callback(end)
    while not there():
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


STORES: dict[str, Callable[[Path], Store]] = {"file": Files, "valkey": Valkey, "mooncake": Mooncake}
