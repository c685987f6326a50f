"""A process's membership of a cluster of Mooncake: how it is joined, shared by threads, and left."""

from __future__ import annotations

import ctypes
import importlib
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, TypeAlias

from shmcache.errors import ClosedError, ShmcacheError
from shmcache.storage.mooncake_config import Config, endpoints

__all__ = ["Client", "Code", "Link", "MooncakeError", "named"]

_REACH_S: Final = 5.0  # how long a server may take to accept a connection

Client: TypeAlias = Any  #: mooncake.store.MooncakeDistributedStore, which has no type hints


class MooncakeError(ShmcacheError):
    """The cluster did not do what was asked. ``code`` is Mooncake's, None where there is none."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Code(IntEnum):
    """Mooncake's error codes, as in its ``types.h``: those that this module knows, and those that it names."""

    OK = 0
    INTERNAL_ERROR = -1
    BUFFER_OVERFLOW = -10
    SEGMENT_NOT_FOUND = -101
    CLIENT_NOT_FOUND = -103
    NO_AVAILABLE_HANDLE = -200
    INVALID_KEY = -400
    WRITE_FAIL = -500
    INVALID_PARAMS = -600
    ILLEGAL_CLIENT = -601
    INVALID_WRITE = -700
    INVALID_READ = -701
    INVALID_REPLICA = -702
    REPLICA_IS_NOT_READY = -703
    OBJECT_NOT_FOUND = -704
    OBJECT_ALREADY_EXISTS = -705
    OBJECT_HAS_LEASE = -706
    LEASE_EXPIRED = -707
    OBJECT_HAS_REPLICATION_TASK = -708
    REPLICA_NOT_FOUND = -710
    REPLICA_IS_GONE = -712
    OBJECT_REPLICA_BUSY = -714
    TRANSFER_FAIL = -800
    CHECKSUM_MISMATCH = -801
    RPC_FAIL = -900
    RPC_TIMEOUT = -901
    UNAVAILABLE_IN_CURRENT_STATUS = -1010
    UNAVAILABLE_IN_CURRENT_MODE = -1011
    TENANT_QUOTA_EXCEEDED = -1700


def named(code: int) -> str:
    """A code for an error message."""
    return f"{Code(code).name} ({code})" if code in set(Code) else f"error {code}"


class Link:
    """A client that is a member of the cluster, for any number of threads; ended when none is in a call of it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._buffers: dict[int, int] = {}  # bytes by address
        self._changed = threading.Condition()
        self._users = 0
        self._ending = False
        self._closed = False
        self._forked = False
        self._client: Client = _join(config, self._buffers)
        _links.add(self)

    @contextmanager
    def use(self) -> Iterator[Client]:
        """For the calls within. ClosedError after close and in a forked child."""
        with self._changed:
            self._changed.wait_for(lambda: not self._ending)
            self.check_open()
            if self._client is None:
                self._client = _join(self._config, self._buffers)
            client = self._client
            self._users += 1
        try:
            yield client
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def register(self, address: int, nbytes: int) -> None:
        """Tells the client of memory that it will be given; MooncakeError."""
        with self._changed, self.use() as client:
            _register(client, address, nbytes)
            self._buffers[address] = nbytes

    def renew(self, client: Client) -> None:
        """Ends the client, and with it all that it has left running, and what its memory held for the cluster.

        The next call gets another one.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._ending)
            if self._client is client:
                self._end()

    def close(self) -> None:
        """Ends the client for good, when running calls are over."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._ending)
            if self._client is not None and not self._forked:
                self._end()

    def disown(self) -> None:
        """In a forked child: the client's threads are not here, and to end it would crash; so it is kept for ever."""
        self._forked = True
        self._ending = False
        self._changed = threading.Condition()  # may be held by a thread that is not here
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._client))

    def check_open(self) -> None:
        """ClosedError after close and in a forked child."""
        master = self._config.master_server_address
        if self._forked:
            raise ClosedError(f"the MooncakeStore of {master!r} belongs to this process's parent; make another one")
        if self._closed:
            raise ClosedError(f"the MooncakeStore of {master!r} is closed; make another one")

    def _end(self) -> None:
        """With the lock held, which is let go of while calls are running."""
        self._ending = True
        try:
            self._changed.wait_for(lambda: not self._users)
            client, self._client = self._client, None
            for address in self._buffers:
                client.unregister_buffer(address)
            client.close()
        finally:
            self._ending = False
            self._changed.notify_all()


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _disown() -> None:
    for link in _links:
        link.disown()


os.register_at_fork(after_in_child=_disown)


# Joining a cluster


def _join(config: Config, buffers: Mapping[int, int]) -> Client:
    """A client that is a member of the cluster and knows these buffers. ImportError, MooncakeError."""
    store = _module()
    # The client would try for minutes, and hold up all threads meanwhile.
    here = _reach(config.master_server_address, "master")
    _reach(config.metadata_server, "metadata server")
    client = store.MooncakeDistributedStore()
    host = config.local_hostname or here or socket.gethostname()
    code = client.setup(
        host,
        config.metadata_server,
        config.global_segment_size,
        config.local_buffer_size,
        config.protocol,
        config.device_name,
        config.master_server_address,
        **({"tenant_id": config.tenant_id} if config.tenant_id else {}),
    )
    if code:
        client.close()
        raise MooncakeError(
            f"the cluster of master {config.master_server_address!r} and metadata server {config.metadata_server!r} "
            f"could not be joined: {named(code)}; expected both to be of this cluster, {host!r} to be this host, "
            f"{config.protocol} to work here (device_name={config.device_name!r}), and memory for "
            f"{config.global_segment_size + config.local_buffer_size:,} bytes; with MC_LOG_LEVEL=INFO in the "
            "environment from the start, Mooncake tells more on stderr",
            code,
        )
    for address, nbytes in buffers.items():
        _register(client, address, nbytes)
    return client


def _module() -> Any:
    """``mooncake.store``. It looks at its environment when it is imported, and only then."""
    quiet = "MC_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["MC_LOG_LEVEL"] = "ERROR"
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        raise ImportError(
            f"MooncakeStore needs Mooncake's client ({error}): pip install 'shmcache[mooncake]', and on Debian "
            "apt-get install libibverbs1 librdmacm1"
        ) from error
    finally:
        if quiet:
            del os.environ["MC_LOG_LEVEL"]


def _reach(address: str, what: str) -> str | None:
    """This host's address as the server sees it; None where ``address`` names no server. MooncakeError."""
    failure: Exception | None = None
    for endpoint in endpoints(address):
        try:
            with socket.create_connection(endpoint, _REACH_S) as connection:
                return str(connection.getsockname()[0])
        except (OSError, OverflowError) as error:  # the latter for a port that is none
            failure = error
    if failure is not None:
        raise MooncakeError(f"Mooncake's {what} {address!r} cannot be reached ({failure}); is it running, and there?")
    return None


def _register(client: Client, address: int, nbytes: int) -> None:
    code = client.register_buffer(address, nbytes)
    if code:
        raise MooncakeError(
            f"Mooncake could not register {nbytes:,} bytes: {named(code)}; over RDMA all of them must fit into memory "
            "and may be locked (ulimit -l unlimited, or docker run --ulimit memlock=-1)",
            code,
        )
