"""A real master of Mooncake on a loopback port, and what a store of it needs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pytest
from arena_support import TIMEOUT_S

if TYPE_CHECKING:
    from typing_extensions import Self

    from shmcache.storage.mooncake import MooncakeStore

# A master does not outlive tests that crash.
_DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []

#: A store whose memory the cluster has.
MEMBER: dict[str, object] = {"global_segment_size": 64 << 20}


def require_mooncake() -> None:
    """Skips the tests where Mooncake cannot be had; in CI they fail instead."""
    try:
        importlib.import_module("xxhash")
        importlib.import_module("shmcache.storage.mooncake_link")._module()
    except ImportError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error), allow_module_level=True)


def free_port() -> int:
    """A port of the loopback interface that nobody has at the moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class Master:
    """``mooncake_master``; stopped at the end of a ``with``."""

    def __init__(self, log: Path, **flags: object) -> None:
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        self._program = Path(spec.submodule_search_locations[0]) / "mooncake_master"
        self._flags = [f"--{name}={value}" for name, value in flags.items()]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        deadline = time.monotonic() + TIMEOUT_S
        while not self.port:
            port = free_port()
            self.port = port if self._start(port) else 0
            assert time.monotonic() < deadline, self._log.read_text()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fields(self, **more: object) -> dict[str, object]:
        """The configuration of a store of this cluster, which adds no memory to it unless ``more`` says so."""
        sizes = {"global_segment_size": 0, "local_buffer_size": 32 << 20}
        return {"master_server_address": self.address, "local_hostname": "127.0.0.1", **sizes, **more}

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(TIMEOUT_S)

    def restart(self) -> None:
        """At the same address, and without what it knew."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._start(self.port):
            assert time.monotonic() < deadline, self._log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _start(self, port: int) -> bool:
        """False where it ended, as it does when somebody else has the port."""
        command = [
            *_DIES_WITH_US,
            str(self._program),
            f"--rpc_port={port}",
            "--rpc_address=127.0.0.1",
            f"--metrics_port={free_port()}",
            "--metrics_host=127.0.0.1",
            "--enable_metric_reporting=false",
            *self._flags,
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + TIMEOUT_S
        while self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
            except ConnectionRefusedError:
                time.sleep(0.01)
            else:
                return self._process.poll() is None
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(self._log.read_text())
        return False


PEER_SIZE = 100_000  #: bytes of each object of PEER

#: A process that adds memory to the cluster, stores objects and waits: argv has the configuration and the keys in hex.
PEER = f"""
import hashlib, json, sys
from shmcache.status import OK
from shmcache.storage.mooncake import MooncakeStore

store = MooncakeStore(json.loads(sys.argv[1]))
keys = [bytes.fromhex(key) for key in sys.argv[2:]]
data = [memoryview(hashlib.shake_128(key).digest({PEER_SIZE})) for key in keys]
print("ready" if store.store(keys, data) == [OK] * len(keys) else "failed", flush=True)
sys.stdin.readline()
"""


def stored_directly(store: MooncakeStore, key: bytes) -> bytes:
    """All that Mooncake has under the name of a key."""
    with store._link.use() as client:
        data: bytes = client.get(store._names([key])[0])
        return data


def overwrite(store: MooncakeStore, key: bytes, data: bytes) -> None:
    """Puts anything under the name of a key."""
    with store._link.use() as client:
        assert client.upsert(store._names([key])[0], data) == 0
