"""ValkeyStore: objects in a server of Valkey or Redis, or in a cluster of them.

An object is one string, under the prefix and its key: a seal (``checksum.py``), then the payload.

Connections, their pool, errors and the cluster's map are the official client's. Its
reader, however, copies a value several times, each time into memory that the kernel must clear first; so a value of
the size that is asked for is received from the client's socket straight into the arena. Whatever else comes (nothing,
an error, another size, TLS) is left to the client, and costs a copy. Writing copies nothing either way.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from types import ModuleType
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from shmcache.config import MAX_SECONDS, check_bool, shown
from shmcache.errors import ClosedError
from shmcache.status import Status
from shmcache.storage.checksum import SEAL_BYTES, seal

__all__ = ["ValkeyStore"]

MAX_PREFIX: Final = 256  #: bytes
MAX_VALUE: Final = 512 * 2**20  #: bytes of a string, the protocol's limit
SCHEMES: Final = ("valkey", "valkeys", "redis", "rediss", "unix")

_AHEAD: Final = 4 * 2**20  # bytes asked for and not received: more only fill the server's memory
_PIECE: Final = 4 * 2**20  # bytes sent at once: the client's time limit is for each piece
_OPTIONS: Final = ("prefix", "ttl_s", "cluster", "timeout_s")  # what a URL's query may have for us
_BOOLS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_log = logging.getLogger("shmcache.storage")
_Command: TypeAlias = "tuple[str | bytes | int, ...]"
# The client's classes of these names; most of their methods have no type hints.
_Connection: TypeAlias = Any
_ConnectionPool: TypeAlias = Any
_ValkeyCluster: TypeAlias = Any


class ValkeyStore:
    """Keeps objects in Valkey or Redis: ``ValkeyStore("valkey://host:6379/0")``.

    ``url``: ``valkey://`` or ``redis://[user:password@]host[:port][/db]``, ``valkeys://`` or ``rediss://`` for TLS,
    ``unix://[user@]/path?db=0``. Its query may have ``prefix``, ``ttl_s``, ``cluster`` and ``timeout_s``, which then
    win over the arguments; the rest (``ssl_ca_certs``, ``socket_keepalive``, ...) goes to the client.

    - ``prefix``: what the server's keys begin with, at most 256 bytes. Models that differ in what a key means need one
      each. Whatever lies under it is taken for this store's: what is damaged there is deleted.
    - ``ttl_s``: objects that nobody loads for so long expire (a load begins it anew; this needs a server that has
      GETEX, 6.2 or later). None leaves it to the server's ``maxmemory-policy``.
    - ``cluster``: the URL names one node of a cluster; the client finds the others.
    - ``timeout_s``: how long connecting, and each piece of reading and writing, may take.

    Nothing connects before the first call, and a server that is away fails only the calls meanwhile. A forked child
    may go on using the store: it gets connections of its own. Errors of the server and the connection are the
    client's (``valkey.exceptions.ValkeyError``). A server whose memory is full (``noeviction``) and an object of more
    than 512 MiB are NO_SPACE.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "shmcache:",
        ttl_s: float | None = None,
        *,
        cluster: bool = False,
        timeout_s: float = 5.0,
    ) -> None:
        given: dict[str, Any] = {"prefix": prefix, "ttl_s": ttl_s, "cluster": cluster, "timeout_s": timeout_s}
        url, options = _split(url)
        given.update(options)
        self._prefix = _check_prefix(given["prefix"])
        self._expiry: _Command = () if given["ttl_s"] is None else ("PX", _check_ttl(given["ttl_s"]))
        limit_s = _check_seconds(given["timeout_s"], "timeout_s")
        pool = _pool(url, limit_s)
        self._name = _describe(url, pool)
        self._servers: _Servers = _Single(pool)
        if check_bool(given["cluster"], "cluster"):
            self._servers = _Cluster(url, pool, limit_s)
        self._count: Callable[[str, int], None] = _count_nowhere
        self._closed = threading.Event()
        self._warned = False

    @classmethod
    def from_url(cls, url: str) -> ValkeyStore:
        """The same, all from the URL."""
        return cls(url)

    def bind(self, payload: memoryview, count: Callable[[str, int], None]) -> None:  # noqa: ARG002 # the protocol's
        """Counts ``l2_damaged`` from now on."""
        self._count = count

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each object is there."""
        return [bool(reply) for reply in self._ask("EXISTS", keys)]

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Receives each object into its view. What is damaged is deleted; what is of another size stays."""
        exchange = _Load(keys, self._names(keys), views, self._expiry)
        found = [exchange.settle(at, reply) for at, reply in enumerate(self._run(exchange))]
        damaged = [key for key, status in zip(keys, found, strict=True) if status is None]
        if damaged:
            self._count("l2_damaged", len(damaged))
            with suppress(_client().ValkeyError):  # such as a replica's refusal
                self.delete(damaged)
        return [Status.NOT_FOUND if status is None else status for status in found]

    def store(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Sends each object; one that is there already is replaced."""
        fitting = [at for at, view in enumerate(views) if view.nbytes + SEAL_BYTES <= MAX_VALUE]
        if len(fitting) < len(views) and not self._warned:
            self._warned = True
            _log.warning("%r keeps no objects of more than %d bytes", self, MAX_VALUE - SEAL_BYTES)
        some = [keys[at] for at in fitting]
        exchange = _Store(some, self._names(some), [views[at] for at in fitting], self._expiry)
        statuses = [Status.NO_SPACE] * len(views)
        for at, reply in zip(fitting, self._run(exchange), strict=True):
            if not isinstance(reply, _client().exceptions.OutOfMemoryError):
                _check(reply)
                statuses[at] = Status.OK
        return statuses

    def delete(self, keys: Sequence[bytes]) -> None:
        """Removes objects; the server frees their memory in the background."""
        self._ask("UNLINK", keys)

    def close(self) -> None:
        """Closes the connections; one that a call uses, when that ends. Again: nothing."""
        self._closed.set()
        self._servers.close()

    def __repr__(self) -> str:
        return f"ValkeyStore({self._name!r})"

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
        return [self._prefix + key for key in keys]

    def _ask(self, word: str, keys: Sequence[bytes]) -> list[Any]:
        return [_check(reply) for reply in self._run(_Ask(word, self._names(keys)))]

    def _run(self, exchange: _Exchange) -> list[Any]:
        """The reply to each command, or the server's refusal of it."""
        if self._closed.is_set():
            raise ClosedError(f"{self!r} is closed; make another one")
        replies: list[Any] = [None] * len(exchange.names)
        try:
            for pool, some in self._servers.routes(exchange.names):
                for at, reply in zip(some, self._connected(pool, exchange, some), strict=True):
                    replies[at] = self._servers.follow(exchange, at, reply)
        except (_client().ConnectionError, _client().TimeoutError, _client().exceptions.SlotNotCoveredError):
            self._servers.recover()
            raise
        finally:
            if self._closed.is_set():  # meanwhile
                self._servers.close()
        return replies

    def _connected(self, pool: _ConnectionPool, exchange: _Exchange, some: list[int]) -> list[Any]:
        """An exchange over one connection; over another where that breaks, as it does when a server has restarted."""
        with suppress(_client().ConnectionError):
            return self._exchanged(pool, exchange, some)
        return self._exchanged(pool, exchange, some)

    def _exchanged(self, pool: _ConnectionPool, exchange: _Exchange, some: list[int]) -> list[Any]:
        connection = pool.get_connection("")  # the name of a command, which the pool does not use
        try:
            return exchange.run(connection, some)
        except BaseException:
            connection.disconnect()  # replies may be on their way, which the next call must not take for its own
            raise
        finally:
            pool.release(connection)


class _Exchange(Protocol):
    """Commands of one key each, and how they are sent and answered."""

    names: list[bytes]  #: the server's name of each key

    def run(self, connection: _Connection, some: list[int]) -> list[Any]:
        """Sends some of the commands and gives their replies, or the server's refusals, in the same order."""

    def command(self, at: int) -> _Command:
        """One of the commands for the client to send."""


class _Ask:
    """One short question about each name."""

    def __init__(self, word: str, names: list[bytes]) -> None:
        self._word = word
        self.names = names

    def run(self, connection: _Connection, some: list[int]) -> list[Any]:
        connection.send_packed_command(connection.pack_commands([self.command(at) for at in some]))
        return [_reply(connection) for _ in some]

    def command(self, at: int) -> _Command:
        return self._word, self.names[at]


class _Load:
    """Objects on their way into views. A reply is whether the view holds a sound object, or what the client read."""

    def __init__(
        self, keys: Sequence[bytes], names: list[bytes], views: Sequence[memoryview], expiry: _Command
    ) -> None:
        self.names = names
        self._keys = keys
        self._views = [view.cast("B") for view in views]
        self._expiry = expiry

    def run(self, connection: _Connection, some: list[int]) -> list[Any]:
        replies: list[Any] = []
        while len(replies) < len(some):
            replies += self._stream(connection, some[len(replies) :])
        return replies

    def command(self, at: int) -> _Command:
        return ("GETEX" if self._expiry else "GET", self.names[at], *self._expiry)

    def settle(self, at: int, reply: object) -> Status | None:
        """OK once the view is filled, NOT_FOUND, or None for what is damaged."""
        if isinstance(reply, bool):
            return Status.OK if reply else None
        if reply is None:
            return Status.NOT_FOUND
        if isinstance(reply, Exception) and str(reply).startswith("WRONGTYPE"):
            return None
        value = memoryview(_check(reply))
        payload = value[SEAL_BYTES:]
        if value[:SEAL_BYTES] != seal(self._keys[at], payload):
            return None
        if payload.nbytes != self._views[at].nbytes:
            return Status.NOT_FOUND
        self._views[at][:] = payload
        return Status.OK

    def _stream(self, connection: _Connection, some: list[int]) -> list[Any]:
        """Asks, receives and asks on. Ends early, with all that was asked for, once the client had to read a reply.

        For the client may have read ahead, and then what follows is not in the socket.
        """
        ends = list(accumulate((self._views[at].nbytes for at in some), initial=0))
        sock = _socket(connection)
        asking = True
        asked = 0
        replies: list[Any] = []
        while (done := len(replies)) < asked or (asking and asked < len(some)):
            if asking and (asked - done < 2 or ends[asked] - ends[done] < _AHEAD // 2):
                until = min(len(some), max(done + 2, bisect_right(ends, ends[done] + _AHEAD) - 1))
                commands = [self.command(at) for at in some[asked:until]]
                connection.send_packed_command(connection.pack_commands(commands), check_health=done == asked)
                asked = until
            sound = self._receive(sock, some[done]) if sock and asking else None
            asking = asking and (sock is None or sound is not None)
            replies.append(_reply(connection) if sound is None else sound)
        return replies

    def _receive(self, sock: socket.socket, at: int) -> bool | None:
        """Whether the next reply is a sound object, which is then in its view; None, with nothing read, for another."""
        header = bytearray(SEAL_BYTES)
        view = self._views[at]
        try:
            if not _receive_string(sock, header, view):
                return None
        except TimeoutError:
            raise _client().TimeoutError("the server did not send on in time") from None
        except OSError as error:
            raise _client().ConnectionError(f"the connection broke while an object was received: {error}") from None
        return header == seal(self._keys[at], view)


class _Store:
    """Objects on their way out of views."""

    def __init__(
        self, keys: Sequence[bytes], names: list[bytes], views: Sequence[memoryview], expiry: _Command
    ) -> None:
        self.names = names
        self._keys = keys
        self._views = [view.cast("B") for view in views]
        self._expiry = expiry

    def run(self, connection: _Connection, some: list[int]) -> list[Any]:
        for at in some:
            connection.send_packed_command(self._packed(at), check_health=at == some[0])
        return [_reply(connection) for _ in some]

    def command(self, at: int) -> _Command:
        view = self._views[at]
        return ("SET", self.names[at], seal(self._keys[at], view) + view, *self._expiry)

    def _packed(self, at: int) -> list[bytes | memoryview]:
        """The command as it is sent, without the copy that putting header and payload together would be."""
        name, view = self.names[at], self._views[at]
        begin = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (3 + len(self._expiry), len(name), name)
        begin += b"$%d\r\n%b" % (SEAL_BYTES + view.nbytes, seal(self._keys[at], view))
        end = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in map(_bytes, self._expiry))
        return [begin, *(view[start : start + _PIECE] for start in range(0, view.nbytes, _PIECE)), end]


class _Single:
    """One server."""

    def __init__(self, pool: _ConnectionPool) -> None:
        self._pool = pool

    def routes(self, names: Sequence[bytes]) -> Iterator[tuple[_ConnectionPool, list[int]]]:
        """The server's connections, and which of the names are there."""
        if names:
            yield self._pool, list(range(len(names)))

    def follow(self, exchange: _Exchange, at: int, reply: object) -> object:  # noqa: ARG002 # as in a cluster
        """The reply, or a refusal that says what to do."""
        if isinstance(reply, Exception) and str(reply).startswith("MOVED"):
            return _client().ResponseError(f"{reply}: the server is one of a cluster, so cluster=True is needed")
        return reply

    def recover(self) -> None:
        """After an error of a connection."""

    def close(self) -> None:
        """Closes the connections that no call uses: the client does not bear losing one in use to another thread."""
        self._pool.disconnect(inuse_connections=False)


class _Cluster:
    """The servers of a cluster; the client knows which has which slots, and learns when that changes."""

    def __init__(self, url: str, pool: _ConnectionPool, limit_s: float) -> None:
        kwargs = pool.connection_kwargs
        if "path" in kwargs or "host" not in kwargs or kwargs.get("db"):
            raise ValueError(f"url: a cluster is expected at a host and in database 0, got {_describe(url, pool)}")
        self._url = url
        self._limit_s = limit_s
        self._made: list[_ValkeyCluster] = []

    def routes(self, names: Sequence[bytes]) -> Iterator[tuple[_ConnectionPool, list[int]]]:
        """For each server its connections, and which of the names are there."""
        client = self._client()
        by_node: dict[str, tuple[Any, list[int]]] = {}
        for at, name in enumerate(names):
            node = client.get_node_from_key(name)
            by_node.setdefault(node.name, (node, []))[1].append(at)
        for node, some in by_node.values():
            yield client.get_valkey_connection(node).connection_pool, some

    def follow(self, exchange: _Exchange, at: int, reply: object) -> object:
        """The reply, from where a refusal points to."""
        if not isinstance(reply, _client().exceptions.AskError):  # also the base of MovedError
            return reply
        try:
            return self._client().execute_command(*exchange.command(at))
        except _client().exceptions.ResponseError as refusal:
            return refusal

    def recover(self) -> None:
        """After an error of a connection: looks which servers there are now."""
        with suppress(Exception):  # the error at hand is told instead
            self._client().nodes_manager.initialize()

    def close(self) -> None:
        """Closes the connections that no call uses."""
        for client in self._made:
            for node in client.get_nodes():
                if node.valkey_connection:
                    node.valkey_connection.connection_pool.disconnect(inuse_connections=False)

    def _client(self) -> _ValkeyCluster:
        if not self._made:  # two threads may make one each; one of these then is not used
            limits = {"socket_timeout": self._limit_s, "socket_connect_timeout": self._limit_s}
            self._made.append(_client().ValkeyCluster.from_url(self._url, cluster_error_retry_attempts=1, **limits))
        return self._made[0]


_Servers: TypeAlias = "_Single | _Cluster"


def _client() -> ModuleType:
    """The official client."""
    try:
        import valkey  # noqa: PLC0415 # an extra, imported where it is needed
    except ImportError:
        raise ImportError("ValkeyStore needs the official client: pip install 'shmcache[valkey]'") from None
    return valkey


def _count_nowhere(name: str, n: int) -> None:
    """Until ``bind``."""


def _bytes(word: str | bytes | int) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _reply(connection: _Connection) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except _client().ResponseError as refusal:
        return refusal


def _check(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


def _socket(connection: _Connection) -> socket.socket | None:
    """The connection's socket, where what is sent over it is what the server sends; None over TLS."""
    # The one private name of the client that is used here; without it, objects are copied out of what it reads.
    sock = getattr(connection, "_sock", None)
    return sock if type(sock) is socket.socket else None


def _receive_string(sock: socket.socket, header: bytearray, view: memoryview) -> bool:
    """Receives a string of just this size into both; False, with nothing received, where something else comes."""
    length = b"$%d\r\n" % (len(header) + view.nbytes)
    if sock.recv(len(length), socket.MSG_PEEK) != length:
        return False
    missing = [memoryview(bytearray(length)), memoryview(header), view, memoryview(bytearray(2))]
    while missing:
        got = sock.recvmsg_into(missing)[0]
        if not got:
            raise ConnectionResetError("closed by the server")
        while missing and got >= missing[0].nbytes:
            got -= missing.pop(0).nbytes
        if got:
            missing[0] = missing[0][got:]
    return True


def _split(url: str) -> tuple[str, dict[str, Any]]:
    """The client's part of a URL, and the options that its query has for us. No error tells what may be a password."""
    if not isinstance(url, str):
        raise TypeError(f"url: expected str, got {type(url).__name__}")
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port > 0
    except ValueError:
        known = False
    if not known or parts.scheme not in SCHEMES or parts.fragment:
        raise ValueError(
            f"url: expected [user:password@]host[:port][/db] after one of {', '.join(SCHEMES)} and ://, got something "
            "else; in a name or password : / ? # @ [ ] % are written %3A %2F %3F %23 %40 %5B %5D %25"
        )
    if parts.scheme == "unix" and (not parts.path or parts.netloc.rpartition("@")[2]):
        raise ValueError("url: expected the whole path of a socket as in unix:///run/valkey.sock")
    before, _, query = url.partition("?")
    pairs = {pair: parse_qsl(pair, keep_blank_values=True) for pair in query.split("&")}
    ours = dict(pair for parsed in pairs.values() for pair in parsed if pair[0] in _OPTIONS)
    rest = "&".join(text for text, parsed in pairs.items() if not (parsed and parsed[0][0] in _OPTIONS))
    return f"{before}?{rest}", {name: _parse_option(name, text) for name, text in ours.items()}


def _parse_option(name: str, text: str) -> object:
    if name == "prefix":
        return text
    try:
        return _BOOLS[text.lower()] if name == "cluster" else float(text)
    except (KeyError, ValueError):
        expected = "true or false" if name == "cluster" else "seconds"
        raise ValueError(f"{name}: expected {expected}, got {shown(text)}") from None


def _pool(url: str, limit_s: float) -> _ConnectionPool:
    """The client's pool of connections; ValueError for what it does not understand."""
    pool_class = _client().ConnectionPool
    try:
        pool: _ConnectionPool = pool_class.from_url(url, socket_timeout=limit_s, socket_connect_timeout=limit_s)
        pool.connection_class(**pool.connection_kwargs)  # not connected, only made: the pool makes none before it must
    except Exception as error:  # noqa: BLE001 # the client raises several kinds
        raise ValueError(f"url: the client does not understand it: {error}") from None
    if "decode_responses" in pool.connection_kwargs:
        raise ValueError("url: expected no decode_responses, as objects are bytes")
    return pool


def _describe(url: str, pool: _ConnectionPool) -> str:
    """A URL without user, password and the rest of its query."""
    kwargs = pool.connection_kwargs
    db = kwargs.get("db") or 0
    if "path" in kwargs:
        return f"unix://{kwargs['path']}?db={db}"
    host = kwargs.get("host", "localhost")
    host = f"[{host}]" if ":" in host else host
    return f"{urlsplit(url).scheme}://{host}:{kwargs.get('port', 6379)}/{db}"


def _check_prefix(prefix: str) -> bytes:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected str, got {shown(prefix)}")
    try:
        encoded = prefix.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"prefix: expected text that UTF-8 can hold, got {shown(prefix)}") from None
    if len(encoded) > MAX_PREFIX:
        raise ValueError(f"prefix: expected at most {MAX_PREFIX} bytes of UTF-8, got {len(encoded)}")
    return encoded


def _check_seconds(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected seconds as float, got {shown(value)}")
    if not 0 < value <= MAX_SECONDS:  # also refuses NaN
        raise ValueError(f"{what}: expected more than 0 and at most {MAX_SECONDS:g} seconds, got {shown(value)}")
    return float(value)


def _check_ttl(value: float) -> int:
    """Whole milliseconds, rounded up."""
    return math.ceil(_check_seconds(value, "ttl_s") * 1000)
