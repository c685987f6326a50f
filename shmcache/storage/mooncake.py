"""MooncakeStore: objects in a cluster of Mooncake, the field's distributed KV store.

An object is one of Mooncake's, under the prefix and its key in hex: the payload, then its seal (``checksum.py``) as a
trailer. One call moves both, the payload between its view and the cluster, the trailer between a
small buffer and the cluster: nothing is copied on the way.

What is not in Mooncake's documentation, and what this module stands on (found with 0.3.13):

- Over TCP the client takes any memory of the process, registered or not, also a mapping that is read-only. Over RDMA
  it takes registered memory only, and a read-only mapping cannot be registered. So over TCP all goes straight; else
  loads into the arena do, whose payload ``bind`` registers, and the rest is copied by way of the client's own buffer.
- A call on a client that is closed crashes the process, as does the end of a client in a forked child.
- A put of a key that exists reports success. Of two equal keys in one batch only one gets its bytes, and both report
  success.
- A transfer that is not done after 60 seconds is reported as failed, but goes on: it may still write into the view.
  Nothing short of the client's end stops it.
- All calls let other threads run, but for ``setup`` and ``close``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

from shmcache.config import shown
from shmcache.status import Status
from shmcache.storage.adapter import Counting
from shmcache.storage.checksum import SEAL_BYTES, hasher, seal
from shmcache.storage.mooncake_config import Config, read_fields
from shmcache.storage.mooncake_link import Client, Code, Link, MooncakeError, named

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MooncakeError", "MooncakeStore"]

_ROUND: Final = 64  # keys of one call of the client
_ROUNDS: Final = 16  # calls at once that move objects; more wait
_LEFT_RUNNING_S: Final = 55.0  # a call that failed after so long may have left transfers running

#: There is no such object, or it is not whole yet, or it went while it was fetched.
_GONE: Final = frozenset(
    {
        Code.REPLICA_IS_NOT_READY,
        Code.OBJECT_NOT_FOUND,
        Code.LEASE_EXPIRED,
        Code.REPLICA_NOT_FOUND,
        Code.REPLICA_IS_GONE,
    }
)
_LOST: Final = _GONE | {Code.CHECKSUM_MISMATCH}
#: What a load of an object of another size may be told, but not only that.
_MISFIT: Final = frozenset({Code.INVALID_PARAMS, Code.TRANSFER_FAIL})
_STORED: Final[dict[int, Status]] = {
    Code.OK: Status.OK,
    Code.OBJECT_ALREADY_EXISTS: Status.EXISTS,
    Code.NO_AVAILABLE_HANDLE: Status.NO_SPACE,
    Code.TENANT_QUOTA_EXCEEDED: Status.NO_SPACE,
}


class MooncakeStore:
    """Keeps objects in a cluster of Mooncake: ``MooncakeStore("/etc/mooncake.json")``, or a mapping of the same fields.

    - ``master_server_address``: host:port of the master, or what a client of a master with standbys is given, such as
      "etcd://host:2379". The only field that must be there.
    - ``metadata_server``: "P2PHANDSHAKE" (the default: none is needed), "http://host:port/metadata" or
      "etcd://host:port".
    - ``local_hostname``: how others reach this host; by default the address from which it reaches the master.
    - ``protocol``: "tcp" (the default) or "rdma"; ``device_name``: RDMA devices, separated by commas; by default all.
    - ``global_segment_size``: memory that this process adds to the cluster; 0 or at least 16 MiB. What is stored there
      goes when this process does. ``local_buffer_size``: the client's own buffer, for what cannot be moved without a
      copy: nothing over TCP; over RDMA what is stored, so that it must take the objects of all calls at once. Both are
      int or text such as "4GB", which is 4 GiB, as Mooncake takes it, and by default what Mooncake's own file has:
      3.125 GiB and 1 GiB.
    - ``tenant_id``: of a cluster with tenants.
    - ``prefix``: what this store's keys begin with ("shmcache:"); the argument wins over the field. Models that differ
      in what a key means need one each. Whatever lies under it is taken for this store's: what is damaged there is
      deleted.

    A file may be shared with other users of Mooncake: fields that are not ours are passed over, and named in the log.
    In a mapping they are a ValueError.

    The cluster evicts by itself; NO_SPACE means that it could not. Objects of a client that has died are NOT_FOUND as
    soon as the master has noticed; until then they, and while the master is away all calls, raise MooncakeError after
    some seconds, a minute at the worst. The client finds a master that is back by itself.

    The client logs to stderr; this module asks it for errors only, unless ``MC_LOG_LEVEL`` is set, or somebody else has
    imported it before. Over TCP Mooncake knows no passwords: who reaches a client's ports can read and change what
    the cluster holds. A forked child cannot use the store (ClosedError), and should end by ``os._exit`` or ``exec``, as
    the children of ``multiprocessing`` and ``subprocess`` do: the client crashes in an ordinary exit.

    TypeError or ValueError for a bad configuration; OSError for a file that cannot be read; ImportError where the
    extra ``mooncake`` or a library of its is missing; MooncakeError where the cluster cannot be joined.
    """

    def __init__(self, config: Mapping[str, object] | str | os.PathLike[str], *, prefix: str | None = None) -> None:
        fields = read_fields(config)
        if prefix is not None:
            fields["prefix"] = prefix
        self._config = Config.parse(fields)
        self._count: Counting = _count_nothing
        self._trailers = _Trailers()
        self._payload = range(0)  # addresses
        hasher()  # if xxhash is missing, it is missed now
        self._link = Link(self._config)
        self._link.register(self._trailers.address, self._trailers.nbytes)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """The store of ``mooncake:///etc/mooncake.json`` or of ``mooncake://master:50051?protocol=tcp``.

        The query may have all fields, and wins over the file.
        """
        parts = urlsplit(url)
        try:
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)) if parts.query else {}
        except ValueError:
            query = {"": ""}
        if parts.fragment or "" in query or bool(parts.netloc) == (parts.path not in ("", "/")):
            raise ValueError(
                "l2: expected mooncake:///path/of/a/file.json or mooncake://host:port, and perhaps ?field=value&..., "
                f"got {shown(url)}"
            )
        fields = {"master_server_address": parts.netloc} if parts.netloc else read_fields(unquote(parts.path))
        return cls({**fields, **query})

    def __repr__(self) -> str:
        return f"MooncakeStore({self._config.master_server_address!r}, prefix={self._config.prefix!r})"

    def bind(self, payload: memoryview, count: Counting) -> None:
        """Registers the payload with the client, and from now on counts ``l2_damaged``.

        Over RDMA this allocates and locks all of the payload. MooncakeError where that fails.
        """
        self._count = count
        address = _address(payload)
        self._link.register(address, payload.nbytes)
        self._payload = range(address, address + payload.nbytes)

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each object is there."""
        with self._link.use() as client:
            codes = client.batch_is_exist(self._names(keys))
        for code in codes:
            if code < 0:
                raise self._error(code, "lookup")
        return [code == 1 for code in codes]

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Receives each object into its view. What is damaged or of another size is deleted.

        MooncakeError where no object was loaded, and one of them for another cause than that it is not there.
        """
        found = self._by_rounds(self._load, keys, views)
        failed = [code for code in found if code < 0]
        if failed and Status.OK not in found:
            raise self._error(failed[0], "load")
        return [Status(code) if code >= 0 else Status.NOT_FOUND for code in found]

    def store(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Sends each object: OK, EXISTS, or NO_SPACE where the cluster can make no room."""
        codes = self._by_rounds(self._store, keys, views)
        for code in codes:
            if code not in _STORED:
                raise self._error(code, "store")
        return [_STORED[code] for code in codes]

    def delete(self, keys: Sequence[bytes]) -> None:
        """Removes objects, also those that somebody is reading: that reader is told by the checksum."""
        with self._link.use() as client:
            codes = client.batch_remove(self._names(keys), True)  # not only those whose lease of 10 seconds is over
        for code in codes:
            if code < 0 and code not in _GONE:
                raise self._error(code, "delete")

    def close(self) -> None:
        """Leaves the cluster, when running calls are over. Again: nothing.

        Stops all threads meanwhile, as the client does not let go of the interpreter: for a second or two, or for
        some 15 where the master is away.
        """
        self._count = _count_nothing
        self._link.close()

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        return [self._config.prefix + key.hex() for key in keys]

    def _error(self, code: int, what: str) -> MooncakeError:
        return MooncakeError(f"{self!r}: {what}: {named(code)}", code)

    def _by_rounds(
        self,
        run: Callable[[list[bytes], list[memoryview]], list[int]],
        keys: Sequence[bytes],
        views: Sequence[memoryview],
    ) -> list[int]:
        """What ``run`` gives for each key, in calls of so many different keys as one call of the client may have."""
        self._link.check_open()
        found = [0] * len(keys)
        for some in _rounds(keys):
            codes = run([keys[at] for at in some], [views[at].cast("B") for at in some])
            for at, code in zip(some, codes, strict=True):
                found[at] = code
        return found

    def _straight(self, address: int, nbytes: int) -> bool:
        """Whether the client can move this memory without a copy."""
        within = address in self._payload and address + nbytes <= self._payload.stop
        return self._config.protocol == "tcp" or within

    # Load

    def _load(self, keys: list[bytes], views: list[memoryview]) -> list[int]:
        """What became of each object: a status, or the code of a failure."""
        names = self._names(keys)
        with self._trailers.take(len(keys)) as (trailers, address):
            codes = self._get(names, views, trailers, address)
            sound = [
                code == _whole(view) and trailer == seal(key, view)
                for code, key, view, trailer in zip(codes, keys, views, trailers, strict=True)
            ]
        found: list[int] = []
        bad: list[bytes] = []
        for at, code in enumerate(codes):
            if sound[at]:
                found.append(Status.OK)
                continue
            wanted = _whole(views[at])
            if code in _MISFIT:
                code = self._size(names[at], wanted, code)  # noqa: PLW2901 # it tells more
            if code in (wanted, Code.CHECKSUM_MISMATCH):
                self._count("l2_damaged", 1)
            if code >= 0 or code == Code.CHECKSUM_MISMATCH:
                bad.append(keys[at])
            found.append(code if code < 0 and code not in _LOST else Status.NOT_FOUND)
        if bad:
            with suppress(MooncakeError):
                self.delete(bad)
        return found

    def _get(self, names: list[str], views: list[memoryview], trailers: list[memoryview], address: int) -> list[int]:
        """Fetches objects. The size of each, or a code; where the size is the wanted one, all of it is there."""
        places = [_address(view) for view in views]
        straight = [at for at, view in enumerate(views) if self._straight(places[at], view.nbytes)]
        codes = [0] * len(names)
        began = (time.monotonic(), time.time())
        with self._link.use() as client:
            if straight:
                got = client.batch_get_into_multi_buffers(
                    [names[at] for at in straight],
                    [[places[at], address + at * SEAL_BYTES] for at in straight],
                    [[views[at].nbytes, SEAL_BYTES] for at in straight],
                )
                for at, code in zip(straight, got, strict=True):
                    codes[at] = code
            for at in set(range(len(names))) - set(straight):
                codes[at] = _copy_out(client, names[at], views[at], trailers[at])
        took_s = max(time.monotonic() - began[0], time.time() - began[1])  # the client goes by the latter
        if took_s > _LEFT_RUNNING_S and Code.TRANSFER_FAIL in codes:
            self._link.renew(client)
        return codes

    def _size(self, name: str, wanted: int, code: int) -> int:
        """The size of an object that is not of the ``wanted`` one, else ``code``; or the code that says why not."""
        with self._link.use() as client:
            size: int = client.get_size(name)
        return code if size == wanted else size

    # Store

    def _store(self, keys: list[bytes], views: list[memoryview]) -> list[int]:
        """The client's code of each object."""
        names = self._names(keys)
        with self._trailers.take(len(keys)) as (trailers, address), self._link.use() as client:
            there = client.batch_is_exist(names)
            codes = [Code.OBJECT_ALREADY_EXISTS if code == 1 else code for code in there]
            new = [at for at, code in enumerate(there) if code == 0]
            for at in new:
                trailers[at][:] = seal(keys[at], views[at])
            places = {at: _address(views[at]) for at in new}
            straight = [at for at in new if self._straight(places[at], views[at].nbytes)]
            if straight:
                put = client.batch_put_from_multi_buffers(
                    [names[at] for at in straight],
                    [[places[at], address + at * SEAL_BYTES] for at in straight],
                    [[views[at].nbytes, SEAL_BYTES] for at in straight],
                )
                for at, code in zip(straight, put, strict=True):
                    codes[at] = code
            for at in set(new) - set(straight):
                codes[at] = client.put_parts(names[at], views[at], trailers[at])
        return codes


class _Trailers:
    """Memory for the trailers of a few calls at once."""

    def __init__(self) -> None:
        self.nbytes: Final = _ROUNDS * _ROUND * SEAL_BYTES
        self._memory = memoryview(bytearray(self.nbytes))
        self.address: Final = _address(self._memory)
        self._free: SimpleQueue[int] = SimpleQueue()
        for start in range(0, self.nbytes, _ROUND * SEAL_BYTES):
            self._free.put(start)

    @contextmanager
    def take(self, n: int) -> Iterator[tuple[list[memoryview], int]]:
        """Those of one call, one after the other, and the address of the first."""
        start = self._free.get()
        size = SEAL_BYTES
        try:
            yield (
                [self._memory[at : at + size] for at in range(start, start + n * size, size)],
                self.address + start,
            )
        finally:
            self._free.put(start)


# What is moved


def _rounds(keys: Sequence[bytes]) -> Iterator[list[int]]:
    """The positions of the keys, in lists that one call of the client may have."""
    some: list[int] = []
    met: set[bytes] = set()
    for at, key in enumerate(keys):
        if len(some) == _ROUND or key in met:
            yield some
            some, met = [], set()
        some.append(at)
        met.add(key)
    if some:
        yield some


def _address(view: memoryview) -> int:
    """Where a view's memory is. The array that tells is gone again."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _whole(view: memoryview) -> int:
    """Bytes of an object with its trailer."""
    return view.nbytes + SEAL_BYTES


def _copy_out(client: Client, name: str, view: memoryview, trailer: memoryview) -> int:
    """Fetches an object by way of the client's own buffer; its size, or a code."""
    buffer = client.get_buffer(name)
    if buffer is None:  # and that is all that it says
        size: int = client.get_size(name)
        return Code.TRANSFER_FAIL if size >= 0 else size
    with memoryview(buffer).cast("B") as whole:
        if whole.nbytes == _whole(view):
            view[:] = whole[: view.nbytes]
            trailer[:] = whole[view.nbytes :]
        return whole.nbytes


def _count_nothing(name: str, n: int) -> None:
    """Until ``bind`` and after ``close``."""
