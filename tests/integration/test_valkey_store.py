"""ValkeyStore against real servers: what it loads is what was stored, whatever server, network and others do."""

from __future__ import annotations

import gc
import logging
import mmap
import random
import re
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, contents, descriptors, pattern, run_all, run_python
from integration import _servers
from integration._servers import Proxy, Server, eventually, join_cluster, wait_until_whole

import shmcache
from shmcache import Status
from shmcache.storage import StorageManager
from shmcache.storage.adapter import L2Adapter
from shmcache.storage.valkey import MAX_VALUE, ValkeyStore, _Cluster

valkey = _servers.client()

OK, NOT_FOUND, NO_SPACE = Status.OK, Status.NOT_FOUND, Status.NO_SPACE
MIB = 2**20
HEADER = 24  # bytes
SHORT_S = 0.3  # a time limit that a stopped server outlasts
ODD_KEYS = [b"\r\n", b"\0", b"$5\r\nabcde\r\n", b"{}", b"{a}b", b"\xff" * 64, b" ", b"*", bytes(range(64))]

StartServer = Callable[..., Server]
MakeStore = Callable[..., ValkeyStore]


@pytest.fixture
def make() -> Iterator[MakeStore]:
    """Makes a store, which is closed after the test."""
    stores: list[ValkeyStore] = []

    def make_one(url: str, *args: Any, **kwargs: Any) -> ValkeyStore:
        stores.append(ValkeyStore(url, *args, **kwargs))
        return stores[-1]

    yield make_one
    for store in stores:
        store.close()


@pytest.fixture
def store(server: Server, make: MakeStore) -> ValkeyStore:
    return make(server.unix_url)


@pytest.fixture
def plain(server: Server) -> Iterator[Any]:
    """The client by itself, at the same server."""
    with server.client as client:
        yield client


def put(store: ValkeyStore, **sizes: int) -> None:
    """Stores objects whose bytes only their key gives."""
    keys = [key.encode() for key in sizes]
    views = [memoryview(pattern(key, size)) for key, size in zip(keys, sizes.values(), strict=True)]
    assert store.store(keys, views) == [OK] * len(keys)


def get(store: ValkeyStore, **sizes: int) -> list[Status]:
    """Loads them, and checks the bytes of each that is OK, and those beside it."""
    keys = [key.encode() for key in sizes]
    return load(store, keys, list(sizes.values()))


def load(store: ValkeyStore, keys: list[bytes], sizes: list[int]) -> list[Status]:
    rooms = [bytearray(size + 2) for size in sizes]
    statuses = store.load(keys, [memoryview(room)[1:-1] for room in rooms])
    for key, room, size, status in zip(keys, rooms, sizes, statuses, strict=True):
        assert room[0] == room[-1] == 0
        if status is OK:
            assert room[1:-1] == pattern(key, size), key
    return statuses


def counted(store: ValkeyStore) -> list[tuple[str, int]]:
    """What the store counts from now on."""
    counts: list[tuple[str, int]] = []
    store.bind(memoryview(bytearray(1)), lambda name, n: counts.append((name, n)))
    return counts


def name_of(key: str) -> str:
    return f"shmcache:{key}"


# What comes back


def test_it_is_an_adapter(store: ValkeyStore) -> None:
    assert isinstance(store, L2Adapter)
    assert isinstance(ValkeyStore.from_url("valkey://host"), L2Adapter)


@pytest.mark.parametrize("tcp", [False, True])
def test_what_was_stored_comes_back(server: Server, make: MakeStore, chance: random.Random, tcp: bool) -> None:
    store = make(server.url if tcp else server.unix_url)
    sizes = [1, 2, 23, 24, 25, 4095, 4096, 65536, MIB, 4 * MIB, *(chance.randrange(1, 200_000) for _ in range(30))]
    keys = ODD_KEYS + [chance.randbytes(chance.randint(1, 64)) for _ in sizes[len(ODD_KEYS) :]]
    chance.shuffle(sizes)
    assert store.lookup(keys) == [False] * len(keys)
    views = [memoryview(pattern(key, size)) for key, size in zip(keys, sizes, strict=True)]
    assert store.store(keys, views) == [OK] * len(keys)
    assert store.lookup(keys) == [True] * len(keys)
    assert load(store, keys, sizes) == [OK] * len(keys)
    order = chance.sample(range(len(keys)), len(keys))
    assert load(store, [keys[i] for i in order], [sizes[i] for i in order]) == [OK] * len(keys)
    store.delete(keys[::2])
    assert store.lookup(keys) == [bool(i % 2) for i in range(len(keys))]


def test_empty_batches(store: ValkeyStore) -> None:
    assert (store.lookup([]), store.load([], []), store.store([], [])) == ([], [], [])
    store.delete([])


def test_delete_of_what_is_not_there(store: ValkeyStore) -> None:
    store.delete([b"a", b"b"])


def test_a_store_replaces(store: ValkeyStore) -> None:
    store.store([b"a"], [memoryview(b"old")])
    put(store, a=5000)
    assert get(store, a=5000) == [OK]


def test_views_of_any_shape(store: ValkeyStore) -> None:
    data: Any = memoryview(pattern(b"a", 4800)).cast("f", (30, 40))
    assert store.store([b"a"], [data]) == [OK]
    room = bytearray(4800)
    assert store.load([b"a"], [memoryview(room).cast("H")]) == [OK]
    assert room == pattern(b"a", 4800)


def test_misses_among_hits(store: ValkeyStore, chance: random.Random) -> None:
    """A reply of another kind is the client's to read; the objects after it are right all the same."""
    sizes = {f"k{i}": chance.choice([10, 100_000, MIB]) for i in range(60)}
    there = {key: size for key, size in sizes.items() if chance.random() < 0.7}
    put(store, **there)
    assert get(store, **sizes) == [OK if key in there else NOT_FOUND for key in sizes]
    assert store.lookup([key.encode() for key in sizes]) == [key in there for key in sizes]


@pytest.mark.parametrize("size", [1, 999, 1001, 100_000])
def test_another_size_is_not_found_and_stays(store: ValkeyStore, size: int) -> None:
    counts = counted(store)
    put(store, a=1000, b=1000)
    assert get(store, a=size, b=1000) == [NOT_FOUND, OK]
    assert store.lookup([b"a"]) == [True]
    assert get(store, a=1000) == [OK]
    assert counts == []


def test_payloads_are_not_copied(store: ValkeyStore) -> None:
    put(store, warm=1)
    keys = [b"a", b"b", b"c"]
    views = [memoryview(bytearray(pattern(key, 4 * MIB))) for key in keys]
    tracemalloc.start()
    try:
        assert store.store(keys, views) == [OK] * 3
        assert store.load(keys, views) == [OK] * 3
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000  # bytes


def test_no_view_is_kept(store: ValkeyStore) -> None:
    room = bytearray(pattern(b"a", MIB))
    assert store.store([b"a", b"b"], [memoryview(room)[:100_000], memoryview(room)]) == [OK] * 2
    assert store.load([b"a", b"b"], [memoryview(room)[:100_000], memoryview(room)]) == [OK] * 2
    assert store.load([b"x"], [memoryview(room)]) == [NOT_FOUND]
    room.clear()  # BufferError while anything has a view of it


def test_what_the_client_would_decode_is_told(server: Server) -> None:
    with pytest.raises(ValueError, match="decode_responses"):
        ValkeyStore(server.url + "?decode_responses=true")


@pytest.mark.parametrize("query", ["protocol=3", "client_name=shmcache", "max_connections=2"])
def test_the_clients_own_options(server: Server, make: MakeStore, query: str) -> None:
    store = make(f"{server.url}/0?{query}")
    put(store, a=MIB, b=10)
    assert get(store, a=MIB, x=5, b=10) == [OK, NOT_FOUND, OK]


def test_health_checks_keep_out_of_batches(server: Server, make: MakeStore) -> None:
    """The client asks the server for its health before it sends something, unless it did so just now."""
    store = make(server.url + "?health_check_interval=1")
    kwargs_of(store)["health_check_interval"] = 1e-9  # seconds; a URL cannot have so little
    sizes = {f"k{i}": MIB for i in range(10)}
    put(store, **sizes)
    assert get(store, **sizes) == [OK] * 10
    assert store.lookup([b"k0", b"x"]) == [True, False]


def kwargs_of(store: ValkeyStore) -> dict[str, Any]:
    """What the client makes connections with."""
    assert not isinstance(store._servers, _Cluster)
    kwargs: dict[str, Any] = store._servers._pool.connection_kwargs
    return kwargs


def test_the_time_limit_is_the_clients(server: Server, make: MakeStore) -> None:
    kwargs = kwargs_of(make(server.url, timeout_s=1.5))
    assert (kwargs["socket_timeout"], kwargs["socket_connect_timeout"]) == (1.5, 1.5)
    kwargs = kwargs_of(make(server.url + "?socket_timeout=7", timeout_s=1.5))
    assert (kwargs["socket_timeout"], kwargs["socket_connect_timeout"]) == (7, 1.5)


def test_behind_an_arena(server: Server, join: Join) -> None:
    """Written through, evicted, prefetched: straight from and into the arena, which nothing keeps open afterwards."""
    cache = join(group="engine", rank=0, world_size=2)
    keys = [b"k%d" % i for i in range(20)]
    with StorageManager(cache, l2=[ValkeyStore(server.unix_url)]) as storage:
        for key in keys:
            assert cache.put(key, pattern(key, 30_000)) is OK
        storage.flush(TIMEOUT_S)
        assert cache.clear() == 20
        with server.client as plain:
            plain.setrange(name_of("k15"), 1000, b"~~~~")
        task = storage.submit_prefetch_task(keys, 30_000, extra_count=1)
        assert storage.wait_prefetch_status(task, TIMEOUT_S).l2_hits == 15
        with storage.read_prefetched_results(keys[:15], extra_count=1) as batch:
            assert contents(batch) == [pattern(key, 30_000) for key in keys[:15]]
    assert cache.stats().counters.l2_damaged == 1
    cache.close()


# Damage


def damage_magic(value: bytes) -> bytes:
    return b"X" + value[1:]


def damage_version(value: bytes) -> bytes:
    return value[:4] + b"\2" + value[5:]


def damage_size(value: bytes) -> bytes:
    return value[:8] + b"\1" + value[9:]


def damage_checksum(value: bytes) -> bytes:
    return value[:16] + bytes([value[16] ^ 1]) + value[17:]


def damage_first(value: bytes) -> bytes:
    return value[:HEADER] + bytes([value[HEADER] ^ 1]) + value[HEADER + 1 :]


def damage_last(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 128])


def truncate(value: bytes) -> bytes:
    return value[:-1]


def halve(value: bytes) -> bytes:
    return value[: len(value) // 2]


def lengthen(value: bytes) -> bytes:
    return value + b"\0"


def only_header(value: bytes) -> bytes:
    return value[:HEADER]


def half_header(value: bytes) -> bytes:
    return value[: HEADER // 2]


def nothing(_: bytes) -> bytes:
    return b""


def strange(_: bytes) -> bytes:
    return b"what somebody else keeps under this name"


DAMAGES = [
    damage_magic,
    damage_version,
    damage_size,
    damage_checksum,
    damage_first,
    damage_last,
    truncate,
    halve,
    lengthen,
    only_header,
    half_header,
    nothing,
    strange,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_not_found_counted_and_deleted(
    store: ValkeyStore, plain: Any, damage: Callable[[bytes], bytes]
) -> None:
    counts = counted(store)
    put(store, a=50_000, b=50_000, c=50_000)
    value = plain.get(name_of("b"))
    assert damage(value) != value
    plain.set(name_of("b"), damage(value))
    assert get(store, a=50_000, b=50_000, c=50_000) == [OK, NOT_FOUND, OK]
    assert counts == [("l2_damaged", 1)]
    assert store.lookup([b"a", b"b", b"c"]) == [True, False, True]
    put(store, b=50_000)
    assert get(store, b=50_000) == [OK]


def test_another_keys_object_is_damage(store: ValkeyStore, plain: Any) -> None:
    counts = counted(store)
    put(store, a=1000, b=1000)
    plain.rename(name_of("a"), name_of("b"))
    assert get(store, b=1000) == [NOT_FOUND]
    assert counts == [("l2_damaged", 1)]


def test_no_string_is_damage(store: ValkeyStore, plain: Any) -> None:
    counts = counted(store)
    put(store, a=1000, c=1000)
    plain.rpush(name_of("b"), "x")
    assert get(store, a=1000, b=1000, c=1000) == [OK, NOT_FOUND, OK]
    assert counts == [("l2_damaged", 1)]
    assert plain.exists(name_of("b")) == 0


def test_damage_before_anybody_counts(store: ValkeyStore, plain: Any) -> None:
    plain.set(name_of("a"), b"x")
    assert get(store, a=1) == [NOT_FOUND]


# Prefix, database, expiry


def test_stores_of_other_prefixes_do_not_meet(server: Server, make: MakeStore, plain: Any) -> None:
    one, two = make(server.url, "one:"), make(server.url, prefix="two:")
    put(one, a=1000)
    assert two.lookup([b"a"]) == [False]
    assert two.store([b"a"], [memoryview(b"else")]) == [OK]
    two.delete([b"b"])
    assert get(one, a=1000) == [OK]
    two.delete([b"a"])
    assert get(one, a=1000) == [OK]
    assert plain.keys() == [b"one:a"]


def test_what_others_keep_stays(store: ValkeyStore, plain: Any) -> None:
    plain.set("a", "theirs")
    put(store, a=10)
    store.delete([b"a"])
    assert plain.get("a") == b"theirs"


@pytest.mark.parametrize("url", ["{0.url}/3", "{0.unix_url}?db=3"])
def test_the_urls_database(server: Server, make: MakeStore, url: str) -> None:
    put(make(url.format(server)), a=10)
    with valkey.Valkey(unix_socket_path=str(server.path), db=3) as plain:
        assert plain.keys() == [b"shmcache:a"]
    assert make(server.url).lookup([b"a"]) == [False]


def test_the_url_has_the_last_word(server: Server, make: MakeStore, plain: Any) -> None:
    store = make(server.url + "?prefix=its%20%25own:&ttl_s=1000&timeout_s=7.5&cluster=false", "mine:", cluster=True)
    put(store, a=10)
    assert plain.keys() == [b"its %own:a"]
    assert 990_000 < plain.pttl("its %own:a") <= 1_000_000


def test_objects_expire(server: Server, make: MakeStore) -> None:
    put(make(server.url, ttl_s=1e-6), c=10)  # the server's least is a millisecond
    store = make(server.url, ttl_s=0.05)
    put(store, a=100_000, b=10)
    eventually(lambda: store.lookup([b"a", b"b"]) == [False, False], "the objects do not expire")
    assert get(store, a=100_000, b=10) == [NOT_FOUND, NOT_FOUND]


def test_a_load_begins_the_time_anew(server: Server, make: MakeStore, plain: Any) -> None:
    store = make(server.url, ttl_s=1000)
    put(store, a=100_000, b=10)
    for key in "ab":
        assert 990_000 < plain.pttl(name_of(key)) <= 1_000_000
        plain.pexpire(name_of(key), 500_000)
    store.lookup([b"a"])
    assert plain.pttl(name_of("a")) <= 500_000
    assert get(store, a=100_000, b=10, x=10) == [OK, OK, NOT_FOUND]
    assert all(plain.pttl(name_of(key)) > 990_000 for key in "ab")


def test_without_a_ttl_nothing_expires(store: ValkeyStore, plain: Any) -> None:
    put(store, a=10)
    get(store, a=10)
    assert plain.pttl(name_of("a")) == -1


# The server's troubles


def test_a_restarted_server(start_server: StartServer, make: MakeStore) -> None:
    """The connections in the pool are all stale then; no call notices."""
    server = start_server()
    store = make(server.url)
    run_all([lambda: put(store, a=MIB)] * 4)
    for call in (lambda: store.lookup([b"a"]), lambda: get(store, a=MIB), lambda: put(store, a=MIB)):
        server.kill()
        server.start()
        call()
    assert get(store, a=MIB) == [OK]


def test_a_server_that_is_away(start_server: StartServer, make: MakeStore) -> None:
    server = start_server()
    store = make(server.url)
    put(store, a=10)
    server.kill()
    for call in (lambda: store.lookup([b"a"]), lambda: get(store, a=10), lambda: put(store, a=10)):
        with pytest.raises(valkey.ConnectionError):
            call()
    server.start()
    assert get(store, a=10) == [NOT_FOUND]
    put(store, a=10)
    assert get(store, a=10) == [OK]


def test_a_server_that_comes_later(start_server: StartServer, make: MakeStore) -> None:
    server = start_server()
    server.kill()
    store = make(server.unix_url)
    with pytest.raises(valkey.ConnectionError):
        store.lookup([b"a"])
    server.start()
    assert store.lookup([b"a"]) == [False]


def test_a_server_killed_during_calls(start_server: StartServer, make: MakeStore, chance: random.Random) -> None:
    server = start_server()
    store = make(server.url)
    done = threading.Event()
    calls: list[int] = []

    def use(number: int) -> None:
        keys = {f"{number}-{i}": size for i, size in enumerate([10, 100_000, MIB])}
        while not done.is_set():
            with suppress(valkey.ConnectionError):
                put(store, **keys)
                assert set(get(store, **keys)) <= {OK, NOT_FOUND}
                calls.append(number)

    def kill() -> None:
        try:
            for _ in range(5):
                calls.clear()
                eventually(lambda: len(calls) > 3, "no call succeeds")
                time.sleep(chance.random() * 0.02)
                server.kill()
                server.start()
        finally:
            done.set()

    run_all([*(partial(use, number) for number in range(3)), kill])
    put(store, a=MIB)
    assert get(store, a=MIB) == [OK]


def test_a_stopped_server_ends_calls_in_time(start_server: StartServer, make: MakeStore) -> None:
    server = start_server()
    store, fresh = make(server.url, timeout_s=SHORT_S), make(server.url, timeout_s=SHORT_S)
    put(store, a=10, b=8 * MIB)
    server.stop()
    begun = time.monotonic()
    calls: list[Callable[[], object]] = [
        lambda: store.lookup([b"a"]),
        lambda: get(store, a=10),
        lambda: store.delete([b"a"]),
        lambda: put(store, b=8 * MIB),  # more than the sockets' buffers take
        lambda: fresh.lookup([b"a"]),
    ]
    for call in calls:
        with pytest.raises(valkey.TimeoutError):
            call()
    assert time.monotonic() - begun < TIMEOUT_S
    server.go_on()
    put(store, b=8 * MIB, c=20)
    assert get(store, b=8 * MIB, c=20) == [OK, OK]


def test_a_server_stopped_within_an_object(server: Server, make: MakeStore, chance: random.Random) -> None:
    """A proxy that takes nothing more off the server's hands after a while: half an object, then silence."""
    put(make(server.url), a=8 * MIB, b=10)
    with Proxy(server.port, chance, most=1 << 16) as proxy:
        store = make(f"valkey://127.0.0.1:{proxy.port}", timeout_s=SHORT_S)
        assert get(store, b=10) == [OK]
        proxy.hold_after(MIB)
        with pytest.raises(valkey.TimeoutError):
            get(store, a=8 * MIB)
        assert proxy.accepted == 1  # what ran out of time is not tried again
        proxy.hold_after(float("inf"))
        assert get(store, b=10, a=8 * MIB) == [OK, OK]


def test_a_network_that_delivers_piece_by_piece(server: Server, make: MakeStore, chance: random.Random) -> None:
    sizes = {f"k{i}": chance.choice([1, 10, 3000, 60_000]) for i in range(30)}
    there = {key: size for key, size in sizes.items() if chance.random() < 0.8}
    put(make(server.url), **there)
    for most in (3, 50, 5000):
        with Proxy(server.port, chance, most=most) as proxy:
            some = dict(chance.sample(sorted(sizes.items()), 6)) if most == 3 else sizes
            some = {key: min(size, 3000) if most == 3 else size for key, size in some.items()}
            store = make(f"valkey://127.0.0.1:{proxy.port}")
            expected = [OK if there.get(key) == size else NOT_FOUND for key, size in some.items()]
            assert get(store, **some) == expected
            store.close()


def test_one_broken_connection_fails_no_call(server: Server, make: MakeStore, chance: random.Random) -> None:
    put(make(server.url), a=8 * MIB, b=10)
    with Proxy(server.port, chance, most=1 << 20, cut_after=MIB, cuts=1) as proxy:
        store = make(f"valkey://127.0.0.1:{proxy.port}")
        assert get(store, a=8 * MIB, b=10) == [OK, OK]
        assert proxy.accepted == 2
        store.close()


def test_a_network_that_breaks(server: Server, make: MakeStore, chance: random.Random) -> None:
    """Each connection ends within some reply; whatever a load says is true."""
    sizes = {f"k{i}": chance.choice([10, 5000, 300_000]) for i in range(20)}
    put(make(server.url), **sizes)
    outcomes = set()
    with Proxy(server.port, chance, most=20_000, cut_after=MIB) as proxy:
        store = make(f"valkey://127.0.0.1:{proxy.port}")
        for _ in range(40):
            some = dict(chance.sample(sorted(sizes.items()), 5))
            try:
                assert get(store, **some) == [OK] * len(some)
                outcomes.add("loaded")
            except valkey.ConnectionError:
                outcomes.add("failed")
        store.close()
    assert "loaded" in outcomes


def test_a_full_server(start_server: StartServer, make: MakeStore) -> None:
    server = start_server("--maxmemory", "16mb", "--maxmemory-policy", "noeviction")
    store = make(server.url)
    keys = [b"k%d" % i for i in range(30)]
    statuses = store.store(keys, [memoryview(pattern(key, MIB)) for key in keys])
    assert set(statuses) == {OK, NO_SPACE}
    assert statuses[0] is OK
    assert [found is OK for found in load(store, keys, [MIB] * 30)] == [status is OK for status in statuses]
    store.delete(keys)
    eventually(lambda: store.store([b"a"], [memoryview(pattern(b"a", MIB))]) == [OK], "the server stays full")


def test_a_replica_serves_and_refuses(start_server: StartServer, make: MakeStore) -> None:
    primary, replica = start_server("--repl-diskless-sync-delay", "0"), start_server()
    counts = counted(store := make(replica.url))
    put(make(primary.url), a=100_000)
    with replica.client as plain, primary.client as first:
        first.set(name_of("b"), "damaged")
        plain.replicaof("127.0.0.1", primary.port)
        eventually(lambda: bool(plain.info("replication")["master_link_status"] == "up"), "the replica does not follow")
        assert get(store, a=100_000, b=10) == [OK, NOT_FOUND]
        assert counts == [("l2_damaged", 1)]
        with pytest.raises(valkey.ReadOnlyError):
            put(store, c=100_000, d=10)
        with pytest.raises(valkey.ReadOnlyError):
            store.delete([b"a"])
        assert get(store, a=100_000) == [OK]
        plain.replicaof("NO", "ONE")
        put(store, c=100_000)
        assert get(store, a=100_000, c=100_000) == [OK, OK]


def test_an_object_of_more_than_the_protocol_allows(store: ValkeyStore, caplog: pytest.LogCaptureFixture) -> None:
    with mmap.mmap(-1, MAX_VALUE - HEADER + 1) as room, memoryview(room) as too_large:  # no page is touched
        small = memoryview(pattern(b"b", 10))
        assert store.store([b"a", b"b"], [too_large, small]) == [NO_SPACE, OK]
        assert store.store([b"a"], [too_large]) == [NO_SPACE]
    assert [record.name for record in caplog.records] == ["shmcache.storage"]
    assert str(MAX_VALUE - HEADER) in caplog.text
    assert get(store, b=10) == [OK]


# Secrets


@pytest.fixture
def locked_server(start_server: StartServer) -> Server:
    return start_server("--requirepass", "sesame", "--user", *["kv", "on", ">tell%me/no@one", "allcommands", "allkeys"])


@pytest.mark.parametrize(
    "url",
    [
        "valkey://:sesame@127.0.0.1:{0.port}",
        "redis://kv:tell%25me%2Fno%40one@127.0.0.1:{0.port}/0",
        "unix://{0.path}?password=sesame",
        "unix://kv:tell%25me%2Fno%40one@{0.path}",
    ],
)
def test_a_password_opens(locked_server: Server, make: MakeStore, url: str) -> None:
    store = make(url.format(locked_server))
    put(store, a=100_000)
    assert get(store, a=100_000) == [OK]
    assert "sesame" not in repr(store)
    assert "tell" not in repr(store)


@pytest.mark.parametrize(
    "url",
    ["valkey://:hush@127.0.0.1:{0.port}", "valkey://kv:hush@127.0.0.1:{0.port}", "unix://{0.path}?password=hush"],
)
def test_a_wrong_password_is_not_told(
    locked_server: Server, make: MakeStore, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(url.format(locked_server))
    with caplog.at_level(logging.DEBUG), pytest.raises(valkey.AuthenticationError) as caught:
        store.lookup([b"a"])
    assert "hush" not in f"{caught.value!r} {caplog.text} {store!r}"


@pytest.mark.parametrize(
    "url",
    [
        "valkey://user:hush@host:port",
        "valkey://user:hush/es@host:6379",
        "valkey://user:hush#es@host:6379",
        "valkey://user:hush@host:6379/0#part",
        "valkey://user:hush?es@host:6379",
        "valkey://user:[hush@host:6379",
        "valkey://user:hush\u2100@host:6379",
        "valky://user:hush@host:6379",
        "user:hush@host:6379",
        "valkey://user:hush@host:6379?cluster=perhaps",
        "valkey://user:hush@host:6379?db=none",
        "valkey://user:hush@host:6379?what=is_it",
        "valkey://user:hush@host:0",
        "valkey://user:hush@host:99999",
        "unix://user:hush@",
        "unix://user:hush@run/valkey.sock",
        "unix:///run/valkey.sock?password=hush&db=none",
        "unix:///run/valkey.sock?password=hush&cluster=true",
        "valkey://:hush@host/3?cluster=true",
        "valkey://:hush@?cluster=true",
    ],
)
def test_a_bad_url_is_refused_and_no_password_told(url: str) -> None:
    with pytest.raises(ValueError, match="expected|understand") as caught:
        ValkeyStore(url)
    assert "hush" not in f"{caught.value!r}{caught.value.__cause__!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkey://host", "valkey://host:6379/0"),
        ("redis://u:hush@host:1234/5?prefix=x", "redis://host:1234/5"),
        ("valkeys://u:hush@[::1]:1234?ssl_password=hush", "valkeys://[::1]:1234/0"),
        ("unix:///run/v.sock?password=hush&db=2", "unix:///run/v.sock?db=2"),
        ("unix://u:hush@/run/v.sock", "unix:///run/v.sock?db=0"),
    ],
)
def test_what_is_shown_of_a_store(url: str, shown: str) -> None:
    assert repr(ValkeyStore(url)) == f"ValkeyStore({shown!r})"


def test_arguments() -> None:
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "prefix: expected str", {"prefix": b"x"}),
        (ValueError, "prefix: expected at most 256 bytes", {"prefix": "\u00e4" * 129}),
        (ValueError, "prefix: expected text", {"prefix": "\udc80"}),
        (TypeError, "ttl_s: expected seconds", {"ttl_s": "1"}),
        (TypeError, "ttl_s: expected seconds", {"ttl_s": True}),
        (ValueError, "ttl_s: expected more than 0", {"ttl_s": 0}),
        (ValueError, "ttl_s: expected more than 0", {"ttl_s": -1.0}),
        (ValueError, "ttl_s: expected more than 0", {"ttl_s": float("nan")}),
        (ValueError, "ttl_s: expected more than 0", {"ttl_s": float("inf")}),
        (ValueError, "timeout_s: expected more than 0", {"timeout_s": 0}),
        (TypeError, "timeout_s: expected seconds", {"timeout_s": None}),
        (TypeError, "cluster: expected bool", {"cluster": 1}),
    ]
    for kind, message, kwargs in wrong:
        with pytest.raises(kind, match=re.escape(message)):
            ValkeyStore("valkey://host", **kwargs)
    for no_url in (None, b"valkey://host", 5):
        with pytest.raises(TypeError, match="url: expected str"):
            ValkeyStore(no_url)  # type: ignore[arg-type]
    for query in ("ttl_s=x", "ttl_s=-1", "timeout_s=", "cluster=", "prefix=" + "x" * 257):
        with pytest.raises(ValueError, match=query.partition("=")[0] + ": expected"):
            ValkeyStore.from_url(f"valkey://host?{query}")
    ValkeyStore("valkey://host", prefix="", ttl_s=1e-6)


def test_without_the_client() -> None:
    program = "import sys; sys.modules['valkey'] = None\n"
    program += "from shmcache.storage.valkey import ValkeyStore; ValkeyStore('valkey://host')"
    assert "ImportError: ValkeyStore needs the official client: pip install 'shmcache[valkey]'" in (
        run_python(program).stderr
    )


# Closing


def connections() -> int:
    """This process's descriptors, without those that only wait for the garbage collector."""
    gc.collect()
    return descriptors()


def test_close(server: Server) -> None:
    before = connections()
    store = ValkeyStore(server.url)
    run_all([lambda: put(store, a=MIB)] * 4)
    assert connections() > before
    store.close()
    store.close()
    assert connections() == before
    for call in (lambda: store.lookup([b"a"]), lambda: get(store, a=1), lambda: put(store, a=1)):
        with pytest.raises(shmcache.ClosedError, match=re.escape(repr(store))):
            call()
    with pytest.raises(shmcache.ClosedError):
        store.delete([])


@pytest.mark.usefixtures("hasty_switches")
def test_close_under_calls(server: Server, make: MakeStore) -> None:
    put(make(server.url), a=MIB, b=10)
    for _ in range(10):
        before = connections()
        store = ValkeyStore(server.url)
        running = threading.Semaphore(0)

        def use(store: ValkeyStore = store, running: threading.Semaphore = running) -> None:
            with suppress(shmcache.ClosedError):
                while get(store, a=MIB, b=10) == [OK, OK]:
                    running.release()
                pytest.fail("an object is missing")

        def close(store: ValkeyStore = store, running: threading.Semaphore = running) -> None:
            for _ in range(6):
                assert running.acquire(timeout=TIMEOUT_S)
            store.close()

        run_all([use, use, use, close])
        assert connections() == before


def test_a_close_does_not_wait(start_server: StartServer, make: MakeStore) -> None:
    """Not for a call that a stopped server keeps; that ends by itself, and its connection with it."""
    server = start_server()
    before = connections()
    store = make(server.url, timeout_s=SHORT_S)
    put(store, a=10)
    server.stop()
    begun, closed = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        with pytest.raises(valkey.TimeoutError):
            store.load([b"a"], [memoryview(bytearray(10))])
        assert closed.wait(TIMEOUT_S)

    def close() -> None:
        begun.wait(TIMEOUT_S)
        time.sleep(SHORT_S / 3)  # most times the call waits by now
        store.close()
        closed.set()

    run_all([wait, close])
    with pytest.raises(shmcache.ClosedError):
        store.lookup([b"a"])
    assert connections() == before


# Many at once


@pytest.mark.usefixtures("hasty_switches")
def test_threads(server: Server, make: MakeStore, chance: random.Random) -> None:
    store = make(server.url)
    shared = {f"s{i}": chance.choice([10, 5000, 200_000]) for i in range(20)}
    put(store, **shared)
    seeds = [chance.random() for _ in range(6)]

    def use(number: int) -> None:
        mine = random.Random(seeds[number])
        own = {f"{number}-{i}": mine.choice([1, 3000, 100_000]) for i in range(5)}
        for _ in range(10):
            put(store, **own)
            both = [*mine.sample(sorted(shared.items()), 5), *own.items(), ("gone", 10)]
            mine.shuffle(both)
            assert get(store, **dict(both)) == [NOT_FOUND if key == "gone" else OK for key, _ in both]
            assert store.lookup([key.encode() for key, _ in both]) == [key != "gone" for key, _ in both]
            store.delete([key.encode() for key in own])

    run_all([partial(use, number) for number in range(len(seeds))])


WORKER = """
import os, sys, threading
from arena_support import pattern
from shmcache import Status
from shmcache.storage.valkey import ValkeyStore

store = ValkeyStore(sys.argv[1])
SIZE = 100_000

def work(tag, rounds=20):
    keys = [b"%s-%d" % (tag, i) for i in range(5)]
    for _ in range(rounds):
        views = [memoryview(pattern(key, SIZE)) for key in keys]
        assert store.store(keys, views) == [Status.OK] * 5
        rooms = [bytearray(SIZE) for _ in keys]
        assert store.load(keys, [memoryview(room) for room in rooms]) == [Status.OK] * 5
        assert rooms == [pattern(key, SIZE) for key in keys]
        assert store.lookup(keys + [b"none"]) == [True] * 5 + [False]
"""


def _python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    return run_python(f"import sys; sys.path.insert(0, {tests!r})\n{program}", *args)


def test_processes(server: Server) -> None:
    def run(tag: str) -> None:
        done = _python(WORKER + f"work({tag.encode()!r})", server.url)
        assert done.returncode == 0, done.stderr

    run_all([partial(run, tag) for tag in ("one", "two", "three")])


def test_forked_children_have_their_own_connections(server: Server) -> None:
    """Parent and children use the store that was there before the fork, all at once, with connections in its pool."""
    program = """
work(b"before")
children = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(b"child%d" % number)
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
work(b"parent")
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
work(b"after", rounds=2)
"""
    done = _python(WORKER + program, server.url)
    assert done.returncode == 0, done.stderr


def test_a_childs_close_is_its_own(server: Server) -> None:
    program = """
work(b"before", rounds=2)
pid = os.fork()
if pid == 0:
    store.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
work(b"after", rounds=2)
"""
    done = _python(WORKER + program, server.url)
    assert done.returncode == 0, done.stderr


# TLS


@pytest.fixture
def tls_server(start_server: StartServer, tmp_path: Path) -> tuple[Server, str]:
    """A server that speaks TLS beside, and a URL for that."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", _servers.free_port()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        _servers.lacking("openssl is not installed")
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    server = start_server(*options, "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no")
    return server, f"valkeys://localhost:{port}/0?ssl_ca_certs={certificate}&ssl_check_hostname=true"


def test_tls(tls_server: tuple[Server, str], make: MakeStore) -> None:
    store = make(tls_server[1])
    put(store, a=3 * MIB, b=10, c=100_000)
    assert get(store, a=3 * MIB, x=10, b=10, c=99_999) == [OK, NOT_FOUND, OK, NOT_FOUND]
    tls_server[0].kill()
    tls_server[0].start()
    put(store, a=3 * MIB)
    assert get(store, a=3 * MIB) == [OK]


def test_tls_to_somebody_else(tls_server: tuple[Server, str], make: MakeStore) -> None:
    store = make(tls_server[1].partition("?")[0])
    with pytest.raises(valkey.ConnectionError, match="certificate"):
        store.lookup([b"a"])


# Clusters


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three servers that share the slots."""
    servers: list[Server] = []
    try:
        while len(servers) < 3:
            servers.append(Server(tmp_path_factory.mktemp("c"), "--cluster-node-timeout", "60000", cluster=True))
        join_cluster(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def nodes(cluster: list[Server]) -> list[Server]:
    """A cluster that holds nothing yet."""
    for server in cluster:
        with server.client as plain:
            plain.flushall()
    return cluster


def objects_of(server: Server) -> int:
    with server.client as plain:
        count: int = plain.dbsize()
        return count


def test_a_cluster_takes_batches_across_its_servers(
    nodes: list[Server], make: MakeStore, chance: random.Random
) -> None:
    store = make(nodes[0].url + "?cluster=true")
    sizes = {f"k{i}": chance.choice([10, 5000, 300_000]) for i in range(60)}
    put(store, **sizes)
    assert all(objects_of(node) > 5 for node in nodes)
    assert sum(map(objects_of, nodes)) == 60
    assert get(store, **sizes, gone=10) == [OK] * 60 + [NOT_FOUND]
    keys = [key.encode() for key in sizes]
    assert store.lookup([*keys, b"gone"]) == [True] * 60 + [False]
    store.delete(keys[:30])
    assert store.lookup(keys) == [False] * 30 + [True] * 30
    assert repr(store) == f"ValkeyStore('valkey://127.0.0.1:{nodes[0].port}/0')"


def test_a_cluster_verifies_and_expires(nodes: list[Server], make: MakeStore) -> None:
    store = make(nodes[1].url, cluster=True, ttl_s=1000)
    counts = counted(store)
    put(store, a=1000, b=1000, c=1000)
    for node in nodes:
        with node.client as plain:
            for name in plain.scan_iter():
                assert 990_000 < plain.pttl(name) <= 1_000_000
                plain.setrange(name, 500, b"~")
    assert get(store, a=1000, b=1000, c=1000) == [NOT_FOUND] * 3
    assert counts == [("l2_damaged", 3)]
    assert sum(map(objects_of, nodes)) == 0


class Slot:
    """The slot of one key, and the two servers between which a test moves it; it must hold nothing when it moves."""

    def __init__(self, nodes: list[Server], key: str) -> None:
        self._nodes = nodes
        self.number = slot_of(nodes[0], key)
        number = self.number * len(nodes) // _servers.SLOTS
        self.owner, self.other = nodes[number], nodes[(number + 1) % 3]

    def begin(self) -> None:
        """The owner still has the slot, but sends whoever asks for what it has not got to the other one."""
        self._set(self.other, "IMPORTING", self.owner)
        self._set(self.owner, "MIGRATING", self.other)

    def move(self, to: Server) -> None:
        for node in self._nodes:
            self._set(node, "NODE", to)

    def _set(self, at: Server, what: str, server: Server) -> None:
        with at.client as plain, server.client as other:
            plain.execute_command("CLUSTER SETSLOT", self.number, what, other.execute_command("CLUSTER MYID"))


def slot_of(server: Server, key: str) -> int:
    with server.client as plain:
        slot: int = plain.execute_command("CLUSTER KEYSLOT", name_of(key))
        return slot


def has(server: Server, key: str) -> bool:
    """Asked of a server that need not own the key's slot, nor want to tell."""
    with server.client as plain:
        return name_of(key).encode() in plain.execute_command("KEYS", "*")


@pytest.mark.parametrize("ttl_s", [None, 1000])
def test_a_slot_that_has_moved(nodes: list[Server], make: MakeStore, ttl_s: float | None) -> None:
    """Each kind of call learns it from the old owner's refusal."""
    loader, storer, looker, deleter = stores = [make(nodes[0].url, cluster=True, ttl_s=ttl_s) for _ in range(4)]
    for store in stores:
        assert store.lookup([b"a", b"b"]) == [False, False]
    slot = Slot(nodes, "a")
    slot.move(slot.other)
    try:
        put(storer, a=50_000, b=10)
        assert has(slot.other, "a")
        assert get(loader, a=50_000, x=10, b=10) == [OK, NOT_FOUND, OK]
        assert looker.lookup([b"a", b"b", b"c"]) == [True, True, False]
        deleter.delete([b"a"])
        assert storer.lookup([b"a"]) == [False]
    finally:
        slot.move(slot.owner)
    assert looker.lookup([b"a", b"b"]) == [False, True]


def test_a_slot_that_is_being_moved(nodes: list[Server], make: MakeStore) -> None:
    store = make(nodes[0].url, cluster=True)
    slot = Slot(nodes, "a")
    slot.begin()
    try:
        put(store, a=50_000, b=10)
        assert has(slot.other, "a")
        assert get(store, a=50_000, b=10) == [OK, OK]
        assert store.lookup([b"a", b"b"]) == [True, True]
        store.delete([b"a"])
        assert not has(slot.other, "a")
    finally:
        slot.move(slot.owner)
    put(store, a=50_000)
    assert get(store, a=50_000) == [OK]


def test_a_server_of_a_cluster_restarts(nodes: list[Server], make: MakeStore) -> None:
    store = make(nodes[0].url, cluster=True)
    sizes = {f"k{i}": 1000 for i in range(30)}
    put(store, **sizes)
    lost = objects_of(nodes[2])
    nodes[2].kill()
    with pytest.raises(valkey.ConnectionError):
        get(store, **sizes)
    nodes[2].start()
    wait_until_whole(nodes)
    assert get(store, **sizes).count(OK) == 30 - lost
    put(store, **sizes)
    assert get(store, **sizes) == [OK] * 30


def test_a_server_of_a_cluster_comes_back_elsewhere(nodes: list[Server], make: MakeStore) -> None:
    """At another port: a call that finds nobody at the old one looks where the servers are now."""
    store = make(nodes[0].url, cluster=True, timeout_s=2.5)
    sizes = {f"k{i}": 1000 for i in range(30)}
    put(store, **sizes)
    nodes[2].kill()
    nodes[2].port = _servers.free_port()
    nodes[2].start()
    wait_until_whole(nodes)
    with pytest.raises(valkey.ConnectionError):
        put(store, **sizes)
    put(store, **sizes)
    assert get(store, **sizes) == [OK] * 30
    assert kwargs_of_node(store, nodes[2])["socket_timeout"] == 2.5


def kwargs_of_node(store: ValkeyStore, server: Server) -> dict[str, Any]:
    assert isinstance(store._servers, _Cluster)
    node = store._servers._client().get_node("127.0.0.1", server.port)
    kwargs: dict[str, Any] = node.valkey_connection.connection_pool.connection_kwargs
    return kwargs


def test_the_server_that_the_url_names_may_go(nodes: list[Server], make: MakeStore) -> None:
    """Once the store knows the others."""
    store = make(nodes[0].url, cluster=True, timeout_s=1)
    sizes = {f"k{i}": 1000 for i in range(30)}
    put(store, **sizes)
    elsewhere = [key for key in sizes if slot_of(nodes[1], key) * 3 // _servers.SLOTS]
    nodes[0].kill()
    try:
        with pytest.raises(valkey.ConnectionError):
            get(store, **sizes)
        assert get(store, **dict.fromkeys(elsewhere, 1000)) == [OK] * len(elsewhere)
    finally:
        nodes[0].start()
    wait_until_whole(nodes)
    put(store, **sizes)
    assert get(store, **sizes) == [OK] * 30


def test_a_cluster_that_is_not_there(make: MakeStore, server: Server) -> None:
    store = make(f"valkey://127.0.0.1:{_servers.free_port()}", cluster=True)
    with pytest.raises(valkey.exceptions.ValkeyClusterException):
        store.lookup([b"a"])
    with pytest.raises(valkey.exceptions.ValkeyClusterException, match="not enabled"):
        make(server.url, cluster=True).lookup([b"a"])


def test_a_clusters_server_taken_for_a_single_one(nodes: list[Server], make: MakeStore) -> None:
    with pytest.raises(valkey.ResponseError, match="cluster=True is needed"):
        make(nodes[0].url).lookup([b"%d" % i for i in range(30)])


def test_closing_a_cluster(nodes: list[Server]) -> None:
    before = connections()
    store = ValkeyStore(nodes[0].url, cluster=True)
    put(store, a=10, b=10, c=10, d=10)
    store.close()
    store.close()
    assert connections() == before
    with pytest.raises(shmcache.ClosedError):
        store.lookup([b"a"])
