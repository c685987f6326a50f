"""MooncakeStore against a real master: what it keeps and refuses, and what becomes of it when others die."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, contents, mapped_as, pattern, run_all, run_python, started
from integration._mooncake import (
    MEMBER,
    PEER,
    PEER_SIZE,
    Master,
    free_port,
    overwrite,
    require_mooncake,
    stored_directly,
)
from storage_support import chain, check_nothing_leaked, data_of, eventually, fill

import shmcache
from shmcache import ClosedError, Status
from shmcache.storage.adapter import L2Adapter
from shmcache.storage.manager import StorageManager
from shmcache.storage.mooncake import MooncakeError, MooncakeStore
from shmcache.storage.mooncake_config import Config, read_fields

require_mooncake()

OK, NOT_FOUND, EXISTS, NO_SPACE = Status.OK, Status.NOT_FOUND, Status.EXISTS, Status.NO_SPACE
MIB = 2**20
TRAILER = 24  # bytes

MakeStore = Callable[..., MooncakeStore]
#: A store that is bound, and its counters. The memory that it is bound to must outlive it.
Counted = tuple[MooncakeStore, "Counter[str]", memoryview]


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """The master of all tests that do it no harm."""
    with Master(tmp_path_factory.mktemp("mooncake") / "log") as one:
        yield one


@pytest.fixture
def start_master(tmp_path: Path) -> Iterator[Callable[..., Master]]:
    """Starts a master of the test's own, with flags; it is killed afterwards."""
    masters: list[Master] = []

    def start(**flags: object) -> Master:
        masters.append(Master(tmp_path / f"log{len(masters)}", **flags))
        return masters[-1]

    yield start
    for one in masters:
        one.kill()


@pytest.fixture(scope="module")
def member(master: Master) -> Iterator[MooncakeStore]:
    """The store whose memory has the objects: it reads and writes them without a transfer."""
    store = MooncakeStore(master.fields(**MEMBER))
    yield store
    store.close()


def _counted(master: Master, **fields: object) -> Iterator[Counted]:
    store = MooncakeStore(master.fields(**fields))
    counters: Counter[str] = Counter()
    memory = memoryview(bytearray(MIB))
    store.bind(memory, lambda name, n: counters.update({name: n}))
    yield store, counters, memory
    store.close()


@pytest.fixture(scope="module")
def over_tcp(master: Master, member: MooncakeStore) -> Iterator[Counted]:  # noqa: ARG001 # who has the memory
    """A store that moves everything straight, over TCP."""
    yield from _counted(master)


@pytest.fixture(scope="module")
def over_rdma(master: Master, member: MooncakeStore) -> Iterator[Counted]:  # noqa: ARG001
    """A store that may give the client only the memory that it has registered, which is the one it is bound to.

    Where there is no RDMA device, Mooncake itself goes over TCP.
    """
    yield from _counted(master, protocol="rdma")


@pytest.fixture(params=["member", "over_tcp", "over_rdma"])
def any_store(request: pytest.FixtureRequest) -> MooncakeStore:
    found = request.getfixturevalue(request.param)
    store: MooncakeStore = found[0] if isinstance(found, tuple) else found
    return store


@pytest.fixture(params=["over_tcp", "over_rdma"])
def counted(request: pytest.FixtureRequest) -> Iterator[tuple[MooncakeStore, Counter[str]]]:
    store, counters, _ = request.getfixturevalue(request.param)
    counters.clear()
    yield store, counters
    counters.clear()


@pytest.fixture
def make() -> Iterator[MakeStore]:
    """Makes a store, which is closed after the test."""
    stores: list[MooncakeStore] = []

    def make_one(*args: Any, **kwargs: Any) -> MooncakeStore:
        stores.append(MooncakeStore(*args, **kwargs))
        return stores[-1]

    yield make_one
    while stores:
        stores.pop().close()


@pytest.fixture
def tag() -> bytes:
    """What a test's keys begin with: all tests share a cluster."""
    return secrets.token_bytes(8)


def ro(data: bytes) -> memoryview:
    return memoryview(data)


def room(*sizes: int) -> list[memoryview]:
    """Memory to load into, filled with what is in no object."""
    return [memoryview(bytearray(b"\xee" * size)) for size in sizes]


def put(store: MooncakeStore, keys: list[bytes], size: int = 5000) -> list[bytes]:
    data = [pattern(key, size) for key in keys]
    assert store.store(keys, list(map(ro, data))) == [OK] * len(keys)
    return data


def check_loads(store: MooncakeStore, keys: list[bytes], data: list[bytes]) -> None:
    views = room(*map(len, data))
    assert store.load(keys, views) == [OK] * len(keys)
    assert list(map(bytes, views)) == data


# Keeping objects


def test_is_an_adapter(member: MooncakeStore) -> None:
    assert isinstance(member, L2Adapter)


def test_what_is_stored_is_loaded(any_store: MooncakeStore, tag: bytes) -> None:
    sizes = [1, 7, TRAILER, 4095, 4096, 65536, MIB + 1, 4 * MIB]
    keys = [tag + b"%d" % size for size in sizes]
    data = [pattern(key, size) for key, size in zip(keys, sizes, strict=True)]
    assert any_store.lookup(keys) == [False] * len(keys)
    assert any_store.load(keys, room(*sizes)) == [NOT_FOUND] * len(keys)
    assert any_store.store(keys, list(map(ro, data))) == [OK] * len(keys)
    assert any_store.lookup([*keys, tag]) == [True] * len(keys) + [False]
    check_loads(any_store, keys, data)
    any_store.delete([*keys, tag])  # read just now: their leases are not over
    assert any_store.lookup(keys) == [False] * len(keys)
    assert any_store.load(keys, room(*sizes)) == [NOT_FOUND] * len(keys)


def test_stores_of_a_cluster_see_the_same_objects(
    member: MooncakeStore, over_tcp: Counted, over_rdma: Counted, tag: bytes
) -> None:
    stores = [member, over_tcp[0], over_rdma[0]]
    for at, store in enumerate(stores):
        keys = [tag + b"%d" % at]
        data = put(store, keys, MIB + 3)
        for other in stores:
            check_loads(other, keys, data)


def test_an_object_is_kept_once(any_store: MooncakeStore, tag: bytes) -> None:
    keys = [tag + b"0", tag + b"1"]
    data = put(any_store, keys[:1])
    other = pattern(b"other", 5000)
    assert any_store.store(keys, [ro(other), ro(other)]) == [EXISTS, OK]
    check_loads(any_store, keys, [data[0], other])


def test_keys_of_any_bytes_and_lengths(any_store: MooncakeStore) -> None:
    keys = [bytes([value]) * length for value in (0, 47, 255) for length in (1, 2, 63, 64)]
    any_store.delete(keys)
    data = put(any_store, keys, 100)
    check_loads(any_store, keys, data)
    any_store.delete(keys)


def test_more_keys_than_one_call_of_the_client_has(any_store: MooncakeStore, tag: bytes) -> None:
    keys = [tag + b"%d" % i for i in range(200)]
    missing = set(keys[::3])
    data = put(any_store, [key for key in keys if key not in missing], 300)
    assert any_store.lookup(keys) == [key not in missing for key in keys]
    views = room(*[300] * len(keys))
    assert any_store.load(keys, views) == [NOT_FOUND if key in missing else OK for key in keys]
    assert [bytes(view) for key, view in zip(keys, views, strict=True) if key not in missing] == data
    any_store.delete(keys)


def test_a_key_that_is_asked_for_twice_is_loaded_twice(any_store: MooncakeStore, tag: bytes) -> None:
    keys = [tag + b"0", tag + b"1", tag + b"0", tag + b"0"]
    data = [pattern(key, 5000) for key in keys]
    assert any_store.store(keys, list(map(ro, data))) == [OK, OK, EXISTS, EXISTS]
    check_loads(any_store, keys, data)


def test_nothing_is_asked_for(any_store: MooncakeStore) -> None:
    assert any_store.lookup([]) == []
    assert any_store.load([], []) == []
    assert any_store.store([], []) == []
    any_store.delete([])


def test_views_of_other_formats(any_store: MooncakeStore, tag: bytes) -> None:
    data = pattern(tag, 80)
    assert any_store.store([tag], [ro(data).cast("q")]) == [OK]
    into = bytearray(80)
    assert any_store.load([tag], [memoryview(into).cast("Q", (2, 5))]) == [OK]
    assert into == data


# The arena's memory


@pytest.mark.parametrize("config", [shmcache.ArenaConfig("8MiB", block_size="4KiB")])
@pytest.mark.parametrize("protocol", ["tcp", "rdma"])
@pytest.mark.usefixtures("member")
def test_objects_of_the_arena_go_straight_into_their_slots(
    master: Master, cache: shmcache.Cache, make: MakeStore, protocol: str, tag: bytes
) -> None:
    store = make(master.fields(protocol=protocol))
    store.bind(cache._attachment.payload(writable=True), lambda name, n: pytest.fail(f"{name} {n}"))
    sizes = [1, 4096, 70_000, MIB, 2 * MIB - 5]
    keys = [tag + b"%d" % i for i in range(len(sizes))]
    data = [pattern(key, size) for key, size in zip(keys, sizes, strict=True)]
    for key, each in zip(keys, data, strict=True):
        assert cache.put(key, each) is OK
    with cache.read(keys) as batch:
        views = [view for view in batch.views if view is not None]
        assert mapped_as(cache.name, _address(views[0]), 1) == "r--s"
        assert store.store(keys, views) == [OK] * len(keys)
        del views  # that the batch can be released shows that the store has kept none
    assert cache.clear() == len(keys)
    writes = cache.reserve_write([*keys, tag], [*sizes, 100])
    views = [view for view in writes.views if view is not None]
    assert mapped_as(cache.name, _address(views[0]), 1) == "rw-s"
    assert all(store._straight(_address(view), view.nbytes) for view in views)
    assert store.load([*keys, tag], views) == [OK] * len(keys) + [NOT_FOUND]
    del views
    writes.publish_leading(len(keys), 0)
    writes.abort()
    with cache.read(keys) as batch:
        assert contents(batch) == data
    store.close()


def _address(view: memoryview) -> int:
    from shmcache.storage.mooncake import _address

    return _address(view)


def test_what_is_straight(over_tcp: Counted, over_rdma: Counted) -> None:
    registered, other = _address(over_rdma[2]), _address(memoryview(bytearray(8)))
    nbytes = over_rdma[2].nbytes
    rdma = over_rdma[0]._straight
    assert rdma(registered, nbytes)
    assert rdma(registered + nbytes - 1, 1)
    assert not rdma(registered, nbytes + 1)
    assert not rdma(registered + nbytes, 1)
    assert not rdma(registered - 1, 2)
    assert not rdma(other, 8)
    assert over_tcp[0]._straight(other, 8)


@pytest.mark.parametrize("config", [shmcache.ArenaConfig("4MiB", block_size="4KiB")])
@pytest.mark.usefixtures("member")
def test_a_prefetch_gives_what_was_written_through(master: Master, join: Join, tag: bytes) -> None:
    cache = join("engine", None, 2)
    keys = [tag + key for key in chain(20)]
    with StorageManager(cache, [MooncakeStore(master.fields())]) as storage:
        fill(cache, keys)
        storage.flush(TIMEOUT_S)
        assert cache.clear() == len(keys)
        task = storage.submit_prefetch_task([*keys, tag], 5000, 1)
        result = storage.wait_prefetch_status(task, TIMEOUT_S)
        assert (result.hits, result.l1_hits, result.l2_hits, result.error) == (20, 0, 20, None)
        with storage.read_prefetched_results(keys, 1) as batch:
            assert contents(batch) == [data_of(key) for key in keys]
        check_nothing_leaked(cache)


# Objects that are not what they should be


def _flip(at: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)

    return damage


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(_flip(at), id=f"bit in byte {at}") for at in (0, -25, -24, -20, -16, -8, -1)),
        pytest.param(lambda data: b"\0" * len(data), id="zeros"),
        pytest.param(lambda data: data[-TRAILER:] + data[:-TRAILER], id="trailer in front"),
    ],
)
def test_a_damaged_object_is_not_found(
    counted: tuple[MooncakeStore, Counter[str]], tag: bytes, size: int, damage: Callable[[bytes], bytes]
) -> None:
    store, counters = counted
    keys = [tag + b"0", tag + b"1", tag + b"2"]
    data = put(store, keys, size)
    overwrite(store, keys[1], damage(stored_directly(store, keys[1])))
    views = room(size, size, size)
    assert store.load(keys, views) == [OK, NOT_FOUND, OK]
    assert [bytes(views[0]), bytes(views[2])] == [data[0], data[2]]
    assert counters["l2_damaged"] == 1
    assert store.lookup(keys) == [True, False, True]
    put(store, [keys[1]], size)
    check_loads(store, keys, data)
    assert counters["l2_damaged"] == 1


def test_an_object_under_anothers_key_is_damaged(counted: tuple[MooncakeStore, Counter[str]], tag: bytes) -> None:
    store, counters = counted
    keys = [tag + b"0", tag + b"1"]
    put(store, keys)
    overwrite(store, keys[0], stored_directly(store, keys[1]))
    assert store.load(keys, room(5000, 5000)) == [NOT_FOUND, OK]
    assert counters["l2_damaged"] == 1


@pytest.mark.parametrize("size", [1, 3999, 4001, 4000 - TRAILER, 4000 + TRAILER, 100_000])
def test_an_object_of_another_size_is_not_found(
    counted: tuple[MooncakeStore, Counter[str]], tag: bytes, size: int
) -> None:
    store, counters = counted
    keys = [tag + b"0", tag + b"1"]
    data = put(store, keys, 4000)
    views = room(size, 4000)
    assert store.load(keys, views) == [NOT_FOUND, OK]
    assert bytes(views[1]) == data[1]
    assert store.load(keys[:1], room(4000)) == [NOT_FOUND]  # it was in the way of one of the right size
    put(store, keys[:1], size)
    check_loads(store, keys, [pattern(keys[0], size), data[1]])
    assert counters["l2_damaged"] == 0


def test_what_is_no_object_of_ours_is_not_found(counted: tuple[MooncakeStore, Counter[str]], tag: bytes) -> None:
    store, counters = counted
    for foreign in (b"x", b"x" * TRAILER, b"x" * 5000, b"x" * 5023, b"x" * 5025):
        overwrite(store, tag, foreign)
        assert store.load([tag], room(5000)) == [NOT_FOUND]
        assert store.lookup([tag]) == [False]
    assert counters["l2_damaged"] == 0
    overwrite(store, tag, b"x" * 5024)
    assert store.load([tag], room(5000)) == [NOT_FOUND]
    assert counters["l2_damaged"] == 1


def test_an_object_that_is_being_stored_is_not_there_yet(any_store: MooncakeStore, tag: bytes) -> None:
    name = any_store._names([tag])
    with any_store._link.use() as client:
        assert client.batch_put_session_start(name, [5000 + TRAILER]) == [0]
    try:
        assert any_store.lookup([tag]) == [False]
        assert any_store.load([tag], room(5000)) == [NOT_FOUND]
        any_store.delete([tag])
    finally:
        with any_store._link.use() as client:
            assert client.batch_put_session_revoke(name) == [0]
    data = put(any_store, [tag])
    check_loads(any_store, [tag], data)


# Room


def test_a_cluster_without_room(start_master: Callable[..., Master], make: MakeStore) -> None:
    own = start_master()
    copying = make(own.fields(protocol="rdma"))
    assert copying.store([b"k"], [ro(b"v")]) == [NO_SPACE]  # nobody has added any memory
    assert copying.lookup([b"k"]) == [False]
    store = make(own.fields(global_segment_size=16 * MIB))
    keys = chain(8)
    data = [pattern(key, 4 * MIB) for key in keys]
    for each in (store, copying):
        assert each.store([b"huge"], [ro(bytes(17 * MIB))]) == [NO_SPACE]
    found = store.store(keys, list(map(ro, data)))
    assert set(found) <= {OK, NO_SPACE}
    assert NO_SPACE in found
    assert store.lookup([b"huge"]) == [False]
    views = room(*[4 * MIB] * len(keys))
    loaded = store.load(keys, views)  # what was stored may have been evicted, but what is loaded is right
    assert [bytes(view) for view, status in zip(views, loaded, strict=True) if status is OK] == [
        each for each, status in zip(data, loaded, strict=True) if status is OK
    ]
    store.delete(keys)
    check_loads(store, [b"small"], put(store, [b"small"], 1000))


# Threads, forks, the end


def test_many_threads(any_store: MooncakeStore, chance: random.Random) -> None:
    def work(own: random.Random, tag: bytes) -> None:
        for turn in range(8):
            sizes = [own.choice([1, 100, 5000, 65536, 300_000]) for _ in range(own.randint(1, 6))]
            keys = [tag + b"%d.%d" % (turn, i) for i in range(len(sizes))]
            data = [own.randbytes(size) for size in sizes]
            assert any_store.store(keys, list(map(ro, data))) == [OK] * len(keys)
            check_loads(any_store, keys, data)
            any_store.delete(keys)
            assert any_store.lookup(keys) == [False] * len(keys)

    threads = 20  # more than may move objects at once
    run_all([partial(work, random.Random(chance.random()), secrets.token_bytes(8)) for _ in range(threads)])


def count_nothing(name: str, n: int) -> None:
    """Counters that nobody looks at."""


def calls_of(store: MooncakeStore) -> list[Callable[[], object]]:
    return [
        lambda: store.lookup([b"k"]),
        lambda: store.load([b"k"], room(5)),
        lambda: store.store([b"k"], [ro(b"12345")]),
        lambda: store.delete([b"k"]),
        lambda: store.bind(room(5)[0], count_nothing),
        lambda: store.lookup([]),
        lambda: store.load([], []),
    ]


def test_close_waits_for_running_calls_and_allows_no_more(master: Master, member: MooncakeStore, tag: bytes) -> None:
    keys = [tag + b"%d" % i for i in range(4)]
    data = put(member, keys, MIB)
    store = MooncakeStore(master.fields())
    running = threading.Barrier(5)

    def load() -> None:
        check_loads(store, keys, data)
        running.wait(TIMEOUT_S)
        while True:
            check_loads(store, keys, data)

    def load_to_the_end() -> None:
        with pytest.raises(ClosedError):
            load()

    def close() -> None:
        running.wait(TIMEOUT_S)
        store.close()

    run_all([load_to_the_end, load_to_the_end, load_to_the_end, close, close])
    for call in calls_of(store):
        with pytest.raises(ClosedError, match=rf"'{master.address}' is closed; make another one"):
            call()
    store.close()


def test_a_forked_child_has_no_store(over_tcp: Counted, tag: bytes) -> None:
    store = over_tcp[0]
    data = put(store, [tag])
    free = store._trailers._free
    taken = [free.get() for _ in range(free.qsize())]  # by threads that the child has not
    pid = os.fork()
    if pid == 0:
        os._exit(_allowed_in_child(store))
    for start in taken:
        free.put(start)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check_loads(store, [tag], data)


def _allowed_in_child(store: MooncakeStore) -> int:
    """How many calls a child is not refused; 99 where it fails otherwise."""
    signal.alarm(TIMEOUT_S)
    allowed = 0
    try:
        for call in calls_of(store):
            try:
                call()
            except ClosedError as error:
                allowed += "belongs to this process's parent" not in str(error)
            else:
                allowed += 1
        store.close()
        del call, store  # whose client must not end here
        gc.collect()
    except BaseException:  # noqa: BLE001 # nothing may leave a child of pytest
        return 99
    return allowed


def test_a_client_that_is_renewed(master: Master, member: MooncakeStore, make: MakeStore, tag: bytes) -> None:
    keys = [tag + b"%d" % i for i in range(4)]
    data = put(member, keys, 100_000)
    store = make(master.fields(protocol="rdma"))
    memory = memoryview(bytearray(100_000))
    counters: Counter[str] = Counter()
    store.bind(memory, lambda name, n: counters.update({name: n}))
    over = threading.Event()

    def load(key: bytes, each: bytes) -> None:
        while not over.is_set():
            check_loads(store, [key], [each])

    def renew() -> None:
        try:
            with store._link.use() as first:
                pass
            store._link.renew(first)
            store._link.renew(first)  # as a second thread does that met the same failure
            assert store.load(keys[:1], [memory]) == [OK]
            assert bytes(memory) == data[0]
            with store._link.use() as second:
                assert second is not first
            store._link.renew(first)  # which is not the client any more
            with store._link.use() as still:
                assert still is second
        finally:
            over.set()

    run_all([partial(load, *each) for each in zip(keys, data, strict=True)] + [renew])
    assert counters == Counter()


@pytest.mark.usefixtures("member")
def test_a_transfer_that_the_client_gave_up_is_ended(
    master: Master, make: MakeStore, monkeypatch: pytest.MonkeyPatch, tag: bytes
) -> None:
    """A load of a wrong size fails as one that takes too long does; with no patience at all they look alike."""
    store = make(master.fields())
    put(store, [tag])
    with store._link.use() as first:
        pass
    assert store.load([tag], room(6000)) == [NOT_FOUND]
    with store._link.use() as still:
        assert still is first
    put(store, [tag])
    monkeypatch.setattr("shmcache.storage.mooncake._LEFT_RUNNING_S", 0.0)
    assert store.load([tag], room(6000)) == [NOT_FOUND]
    with store._link.use() as second:
        assert second is not first


# Deaths


def test_a_peer_that_dies_with_its_memory(start_master: Callable[..., Master], make: MakeStore) -> None:
    own = start_master(client_ttl=4)
    keys = chain(3)
    data = [pattern(key, PEER_SIZE) for key in keys]
    store = make(own.fields())
    with started(PEER, json.dumps(own.fields(**MEMBER)), *[key.hex() for key in keys]) as peer:
        assert store.lookup(keys) == [True] * 3
        check_loads(store, keys, data)
        os.kill(peer.pid, signal.SIGKILL)
        peer.wait(TIMEOUT_S)

    failures: list[str] = []

    def gone() -> bool:
        try:
            return store.load(keys, room(*[PEER_SIZE] * 3)) == [NOT_FOUND] * 3
        except MooncakeError as error:
            failures.append(str(error).rpartition("'): ")[2])
            return False

    eventually(gone, "the master notices that the peer is dead")
    assert set(failures) <= {"load: TRANSFER_FAIL (-800)"}
    assert store.lookup(keys) == [False] * 3
    with started(PEER, json.dumps(own.fields(**MEMBER)), *[key.hex() for key in keys]):
        check_loads(store, keys, data)


def test_what_can_be_loaded_is_loaded(start_master: Callable[..., Master], make: MakeStore) -> None:
    """The memory of one object has died, and the master does not know it yet; that of another has not."""
    own = start_master(client_ttl=3600)
    store = make(own.fields())
    make(own.fields(**MEMBER))
    dead = chain(16)
    with started(PEER, json.dumps(own.fields(**MEMBER)), *[key.hex() for key in dead]) as peer:
        os.kill(peer.pid, signal.SIGKILL)
        peer.wait(TIMEOUT_S)
    views = room(*[PEER_SIZE] * len(dead))
    found = store.load(dead, views)  # the master has spread them
    assert set(found) == {OK, NOT_FOUND}
    for key, view, status in zip(dead, views, found, strict=True):
        assert status is NOT_FOUND or bytes(view) == pattern(key, PEER_SIZE)
    lost = [key for key, status in zip(dead, found, strict=True) if status is NOT_FOUND]
    with pytest.raises(MooncakeError, match=r"load: TRANSFER_FAIL \(-800\)"):
        store.load(lost, room(*[PEER_SIZE] * len(lost)))


def test_a_master_that_is_killed_and_comes_back(start_master: Callable[..., Master], make: MakeStore) -> None:
    own = start_master()
    store = make(own.fields(**MEMBER))
    put(store, [b"before"])
    own.kill()

    def fails(call: Callable[[], object]) -> None:
        with pytest.raises(MooncakeError, match=r"MooncakeStore\('127.0.0.1:\d+'.*: RPC_FAIL \(-900\)"):
            call()

    run_all([partial(fails, call) for call in calls_of(store)[:4]])
    own.restart()

    def works() -> bool:
        try:
            store.delete([b"k"])
            return store.store([b"k"], [ro(pattern(b"k", 5000))]) == [OK]
        except MooncakeError:
            return False

    eventually(works, "the client finds the master again, and adds its memory to the cluster")
    check_loads(store, [b"k"], [pattern(b"k", 5000)])
    assert store.load([b"before"], room(5000)) == [NOT_FOUND]


# Joining


def test_a_cluster_that_is_not_there(master: Master, make: MakeStore) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    cases: list[tuple[dict[str, object], str]] = [
        ({"master_server_address": nobody}, f"master '{nobody}' cannot be reached"),
        ({"master_server_address": "127.0.0.1:99999"}, "master '127.0.0.1:99999' cannot be reached"),
        ({"master_server_address": f"etcd://{nobody}"}, f"master 'etcd://{nobody}' cannot be reached"),
        (
            {"metadata_server": f"http://{nobody}/metadata"},
            f"metadata server 'http://{nobody}/metadata' cannot be reached",
        ),
        ({"metadata_server": f"etcd://{nobody}"}, f"metadata server 'etcd://{nobody}' cannot be reached"),
    ]
    for fields, message in cases:
        began = time.monotonic()
        with pytest.raises(MooncakeError, match=message) as caught:
            make(master.fields(**fields))
        assert caught.value.code is None
        assert time.monotonic() - began < TIMEOUT_S  # not the client's own minutes


def test_a_client_that_cannot_be_set_up(master: Master, make: MakeStore) -> None:
    with pytest.raises(MooncakeError) as caught:
        make(master.fields(global_segment_size=2**60))
    assert caught.value.code is not None
    for part in (master.address, "P2PHANDSHAKE", "127.0.0.1", f"{2**60 + 32 * MIB:,}", "MC_LOG_LEVEL=INFO"):
        assert part in str(caught.value)


QUIET = """
import os, sys
from shmcache.storage.mooncake import MooncakeStore
store = MooncakeStore({"master_server_address": sys.argv[1], "global_segment_size": 0})
store.store([b"k"], [memoryview(b"v")])
print(os.environ.get("MC_LOG_LEVEL"), flush=True)
os._exit(0)  # the client's own end takes a second
"""


def test_the_client_logs_errors_only_unless_it_was_told_otherwise(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MC_LOG_LEVEL", raising=False)
    quiet = run_python(QUIET, master.address)
    assert (quiet.returncode, quiet.stdout) == (0, "None\n")
    assert "\nI" not in quiet.stderr
    monkeypatch.setenv("MC_LOG_LEVEL", "INFO")
    loud = run_python(QUIET, master.address)
    assert (loud.returncode, loud.stdout) == (0, "INFO\n")
    assert "\nI" in loud.stderr


@pytest.mark.parametrize("missing", ["mooncake", "mooncake.store"])
def test_without_the_client(missing: str) -> None:
    ran = run_python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from shmcache.storage.mooncake import MooncakeStore\n"
        "MooncakeStore({'master_server_address': '127.0.0.1:1'})"
    )
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: MooncakeStore needs Mooncake's client (")
    assert "pip install 'shmcache[mooncake]', and on Debian apt-get install libibverbs1 librdmacm1" in last


# The configuration


def parse(**fields: object) -> Config:
    return Config.parse(read_fields({"master_server_address": "m:1", **fields}))


def test_defaults() -> None:
    assert parse() == Config("m:1", "P2PHANDSHAKE", "", "tcp", "", 3355443200, 2**30, "", "shmcache:")


def mooncakes() -> Any:
    return importlib.import_module("mooncake.mooncake_config")


def test_the_defaults_are_mooncakes() -> None:
    mooncake_config = mooncakes()
    assert parse().global_segment_size == mooncake_config.DEFAULT_GLOBAL_SEGMENT_SIZE
    assert parse().local_buffer_size == mooncake_config.DEFAULT_LOCAL_BUFFER_SIZE


@pytest.mark.parametrize(
    "size", ["4GB", "4gb", "4 GB", " 4GB ", "4g", "1.5GiB", "64MB", "16MiB", "16384KB", "33554432", 33554432, "1tb", 0]
)
def test_sizes_are_what_mooncake_takes_them_for(size: int | str) -> None:
    # It knows no units with an i; what it calls GB is one with an i.
    theirs = size.replace("i", "") if isinstance(size, str) else size
    assert parse(global_segment_size=size).global_segment_size == mooncakes()._parse_segment_size(theirs)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"master": "m:1"}, ValueError, "expected fields of master_server_address, .*prefix, got 'master'"),
        ({1: 2}, ValueError, "got 1"),
        ({}, ValueError, "expected master_server_address, the host:port"),
        ({"master_server_address": 5}, TypeError, "master_server_address: expected str, got 5"),
        ({"master_server_address": ""}, ValueError, "master_server_address: expected host:port, got ''"),
        ({"master_server_address": "host"}, ValueError, "expected host:port, got 'host'"),
        ({"metadata_server": ""}, ValueError, "metadata_server: expected P2PHANDSHAKE, http"),
        ({"metadata_server": "redis://host:1"}, ValueError, "got 'redis://host:1'"),
        ({"metadata_server": "p2phandshake"}, ValueError, "got 'p2phandshake'"),
        ({"local_hostname": None}, TypeError, "local_hostname: expected str, got None"),
        ({"local_hostname": "a\0b"}, ValueError, "local_hostname: expected text without NUL"),
        ({"protocol": "udp"}, ValueError, "protocol: expected one of tcp, rdma, got 'udp'"),
        ({"device_name": ["mlx5_0"]}, TypeError, "device_name: expected str"),
        ({"global_segment_size": 1}, ValueError, "global_segment_size: expected 0 or at least 16 MiB, got 1"),
        ({"global_segment_size": "15MB"}, ValueError, "expected 0 or at least 16 MiB, got '15MB'"),
        ({"global_segment_size": True}, TypeError, "global_segment_size: expected bytes"),
        ({"global_segment_size": False}, TypeError, "global_segment_size: expected bytes"),
        ({"global_segment_size": 1.5}, TypeError, "global_segment_size: expected bytes"),
        ({"global_segment_size": -1}, ValueError, "global_segment_size: expected at least 1 byte, got -1"),
        ({"local_buffer_size": "much"}, ValueError, "local_buffer_size: expected a number and one of"),
        ({"local_buffer_size": "1.5.5GB"}, ValueError, "local_buffer_size: expected a number and one of"),
        ({"tenant_id": 1}, TypeError, "tenant_id: expected str"),
        ({"prefix": b"a"}, TypeError, "prefix: expected str"),
        ({"prefix": "x" * 257}, ValueError, "prefix: expected at most 256 characters, got 257"),
    ],
)
def test_what_is_no_configuration(fields: dict[str, object], error: type[Exception], message: str) -> None:
    fill_in = {} if not fields or "master_server_address" in fields else {"master_server_address": "m:1"}
    with pytest.raises(error, match=message):
        MooncakeStore({**fill_in, **fields})


def test_a_configuration_is_a_mapping_or_a_path() -> None:
    for value in (5, None, [("master_server_address", "m:1")]):
        with pytest.raises(TypeError, match="config: expected a mapping or the path of a JSON file"):
            MooncakeStore(value)  # type: ignore[arg-type] # that is what is tested


def test_a_file_that_others_use_too(
    master: Master, tmp_path: Path, make: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mooncake.json"
    fields = {
        **master.fields(),
        "local_hostname": None,
        "mode": "embedded",
        "enable_offload": False,
        "device_name": None,
    }
    path.write_text(json.dumps(fields))
    caplog.set_level("INFO", "shmcache.storage")
    store = make(path, prefix="file:")
    assert repr(store) == f"MooncakeStore({master.address!r}, prefix='file:')"
    (record,) = caplog.records
    assert record.getMessage() == f"{str(path)!r}: passed over what is not ours: enable_offload, mode"
    with store._link.use() as client:
        assert client.get_hostname().startswith("127.0.0.1:")  # from where it reaches the master


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON in '.*mooncake.json'"),
        ("{", "expected JSON in"),
        ("\xff", "expected JSON in"),
        ("[]", "expected a JSON object in .*, got \\[\\] \\(list\\)"),
        ("{}", "expected master_server_address"),
        ('{"master_server_address": "m:1", "protocol": "x"}', "protocol: expected"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mooncake.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        MooncakeStore(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MooncakeStore(tmp_path / "none.json")


def test_urls_and_prefixes(master: Master, member: MooncakeStore, tmp_path: Path, tag: bytes) -> None:
    path = tmp_path / "a config.json"
    path.write_text(json.dumps(master.fields(prefix="file:", mode="embedded")))
    at = str(path).replace(" ", "%20")
    data = put(member, [tag])
    for url, prefix in [
        (f"mooncake://{master.address}/?global_segment_size=0&local_buffer_size=1mb&prefix=a%20b:", "a b:"),
        (f"mooncake://{at}?local_buffer_size=1mb", "file:"),
    ]:
        store = MooncakeStore.from_url(url)
        assert repr(store) == f"MooncakeStore({master.address!r}, prefix={prefix!r})"
        assert store.lookup([tag]) == [False]
        put(store, [tag], 70)
        with store._link.use() as client:
            assert client.batch_is_exist([f"{prefix}{tag.hex()}", f"shmcache:{tag.hex()}"]) == [1, 1]
        store.delete([tag])
        store.close()
    check_loads(member, [tag], data)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncake:", "expected mooncake:///path"),
        ("mooncake://", "expected mooncake:///path"),
        ("mooncake://m:1/etc/mooncake.json", "expected mooncake:///path"),
        ("mooncake://m:1#part", "expected mooncake:///path"),
        ("mooncake://m:1?protocol", "expected mooncake:///path"),
        ("mooncake://m", "master_server_address: expected host:port, got 'm'"),
        ("mooncake://m:1?protocl=tcp", "expected fields of .*, got 'protocl'"),
        ("mooncake://m:1?protocol=x", "protocol: expected one of"),
    ],
)
def test_what_is_no_url(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MooncakeStore.from_url(url)
