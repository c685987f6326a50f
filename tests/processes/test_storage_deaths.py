"""Processes that prefetch, store or read what was prefetched are killed, or stopped, in the midst of it: nobody ever
reads a half-loaded byte, who waits is told in bounded time, what was granted stays for the ranks, and others go on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S, Join, contents
from processes._crew import Member, wait_until
from processes._whole import check_whole
from storage_support import MemoryStore, chain, data_of, shares

import shmcache
from shmcache import ArenaConfig, Cache, ReapReport, Status
from shmcache.storage import FileStore, PrefetchResult, StorageManager

OK, NOT_FOUND, IN_FLIGHT, LOCKED = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.LOCKED
Enlist = Callable[..., Member]

BIG = 600 << 10  #: bytes of an object that is loaded by a call of its own
HALF = BIG // 2
KEYS = chain(4)
RANKS = 2
LEASE_S = 0.2
KILLS = 40
KILL_SECONDS = 9.0  #: that all of them may take

# What a member does that prefetches KEYS from an L2 which writes half of each object from the second on, and waits.
PREFETCH = f"""
import threading
from shmcache.storage import StorageManager
from storage_support import MemoryStore, chain, data_of
store, half_way, go_on = MemoryStore(chain(4), nbytes={BIG}), threading.Semaphore(0), threading.Event()
def load_half(request):
    if request.keys != [b"k0"]:
        for key, view in zip(request.keys, request.views):
            view[:{HALF}] = data_of(key, {BIG})[:{HALF}]
        half_way.release()
        go_on.wait()
    return request.go_on()
store.faults["load"] = load_half
storage = StorageManager(cache, [store], store=None, io_threads=4)
task = storage.submit_prefetch_task(chain(4), {BIG}, {{extra_count}})
for _ in range(3):
    half_way.acquire()
"""

# What a member does that stores four objects to an L2 which does not come to an end.
STORE = f"""
import threading
from shmcache.storage import StorageManager
from storage_support import MemoryStore, chain, data_of
store, reached = MemoryStore(), threading.Event()
def hang(request):
    reached.set()
    threading.Event().wait()
store.faults["store"] = hang
storage = StorageManager(cache, [store], backlog="8MiB")
for key in chain(4):
    cache.put(key, data_of(key, {BIG}))
reached.wait()
"""


@pytest.fixture
def config() -> ArenaConfig:
    return ArenaConfig("4MiB", block_size="64KiB", lanes=8)


def prefetch(cache: Cache, extra_count: int = 0, contend_s: float = TIMEOUT_S) -> PrefetchResult:
    """Prefetches KEYS from a sound L2."""
    with StorageManager(cache, [MemoryStore(KEYS, nbytes=BIG)], store=None, contend_s=contend_s) as storage:
        return storage.wait_prefetch_status(storage.submit_prefetch_task(KEYS, BIG, extra_count), TIMEOUT_S)


def check_readable(cache: Cache, keys: list[bytes]) -> None:
    with cache.read(keys) as batch:
        assert contents(batch) == [data_of(key, BIG) for key in keys]


# Who prefetches


@pytest.fixture
def ranks(join: Join) -> list[Cache]:
    return [join("engine", rank, RANKS) for rank in range(RANKS)]


@pytest.fixture
def loader(ranks: list[Cache], enlist: Enlist) -> Member:
    """A controller half-way in loading: the first of four keys is published, the others are half-written."""
    member = enlist("engine", None, RANKS)
    member.do(PREFETCH.format(extra_count=RANKS - 1))
    wait_until(lambda: ranks[0].lookup(KEYS) == 1)
    return member


def test_what_is_half_loaded_is_read_by_nobody(ranks: list[Cache], loader: Member) -> None:
    assert ranks[0].status(KEYS) == [OK, IN_FLIGHT, IN_FLIGHT, IN_FLIGHT]
    assert ranks[1].read(KEYS[1:]).views == [None] * 3
    assert ranks[1].reserve_read(KEYS[1:]) == [IN_FLIGHT] * 3
    loader.kill()
    assert ranks[0].lookup(KEYS[1:]) == 0
    assert ranks[0].read(KEYS[1:]).views == [None] * 3  # before anybody reaps
    assert ranks[0].reap() == ReapReport(lanes=1, shares=0, writes=3, lock=False)
    assert ranks[0].status(KEYS[1:]) == [NOT_FOUND] * 3
    assert ranks[0].verify() == []


def test_who_waits_for_a_load_is_told_that_it_is_gone(ranks: list[Cache], loader: Member, enlist: Enlist) -> None:
    waiters = [enlist(), enlist()]
    waiters[0].begin(f"cache.read([b'k1', b'k2', b'k3'], wait_s={TIMEOUT_S}).status")
    waiters[1].begin(f"cache.read([b'k1', b'k2', b'k3'], prefix=True, wait_s={TIMEOUT_S}).status")
    time.sleep(0.1)
    assert waiters[0].busy
    assert waiters[1].busy
    killed = time.monotonic()
    loader.kill()
    for waiter in waiters:
        assert waiter.answer() == [NOT_FOUND] * 3
    assert time.monotonic() - killed < TIMEOUT_S / 2, "they sat the time out"
    for waiter in waiters:
        waiter.kill()
    for rank in ranks:
        check_readable(rank, KEYS[:1])
    check_whole(ranks[0])


def test_what_was_granted_stays_for_the_ranks(arena: str, ranks: list[Cache], loader: Member) -> None:
    loader.kill()
    ranks[0].reap()
    assert shares(arena) == {0: (1, 0), 1: (1, 0)}
    assert ranks[0].delete(KEYS[:1]) == [LOCKED]
    for rank in ranks:
        check_readable(rank, KEYS[:1])
    assert ranks[0].stats().counters.claims == RANKS
    check_whole(ranks[0])


def test_a_successor_prefetches_the_same_keys_at_once(
    arena: str, ranks: list[Cache], loader: Member, join: Join
) -> None:
    loader.kill()
    assert prefetch(join("engine", None, RANKS), RANKS - 1) == PrefetchResult(4, 1, 3, None)
    assert shares(arena) == {0: (5, 0), 1: (5, 0)}  # of the first its predecessor's, too
    for rank in ranks:
        check_readable(rank, [KEYS[0], *KEYS])
    check_whole(ranks[0])


def test_who_waits_for_the_same_keys_loads_them_itself(arena: str, ranks: list[Cache], loader: Member) -> None:
    """A prefetch that finds them in the hands of another, who dies."""
    with StorageManager(ranks[0], [MemoryStore(KEYS, nbytes=BIG)], store=None, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(KEYS, BIG, RANKS - 1)
        wait_until(lambda: shares(arena)[0] == (2, 0))  # of the first
        loader.kill()
        assert storage.wait_prefetch_status(task, TIMEOUT_S / 2) == PrefetchResult(4, 1, 3, None)
    for rank in ranks:
        check_readable(rank, [KEYS[0], *KEYS])
    check_whole(ranks[0])


def test_its_gauges_go_with_it(ranks: list[Cache], loader: Member) -> None:
    wait_until(lambda: ranks[0].stats().gauges.l2_loading == 3)  # told a moment after the first key was there
    gauges = ranks[0].stats().gauges
    assert gauges.prefetch_in_flight == 1
    loader.kill()
    assert ranks[0].stats().gauges == shmcache.inspect(ranks[0].name).stats.gauges == type(gauges)()  # type: ignore[union-attr]
    assert ranks[0].stats().counters.prefetch_requests == 1  # counters stay


def test_a_rank_that_prefetches_for_itself(ranks: list[Cache], enlist: Enlist, join: Join) -> None:
    """Its shares die with it."""
    ranks.pop().close()
    member = enlist("engine", 1, RANKS)
    member.do(PREFETCH.format(extra_count=1))
    wait_until(lambda: ranks[0].lookup(KEYS) == 1)
    member.kill()
    assert ranks[0].reap() == ReapReport(lanes=1, shares=1, writes=3, lock=False)
    assert ranks[0].stats().reserved == 1
    check_readable(ranks[0], KEYS[:1])
    assert prefetch(join("engine", 1, RANKS), 0).hits == 4
    assert ranks[0].finish_read(KEYS) == [OK] * 4
    check_whole(ranks[0])


# Who reads what was prefetched


def test_a_worker_killed_before_it_claims(arena: str, join: Join, enlist: Enlist) -> None:
    controller, workers = join("engine", None, RANKS), [enlist("engine", rank, RANKS) for rank in range(RANKS)]
    assert prefetch(controller, RANKS - 1).hits == 4
    assert shares(arena) == {0: (4, 0), 1: (4, 0)}
    workers[0].kill()
    assert controller.reap() == ReapReport(lanes=1, shares=4, writes=0, lock=False)
    assert controller.delete(KEYS) == [LOCKED] * 4, "the other's shares are there"
    workers[1].do("batch = cache.read([b'k0', b'k1', b'k2', b'k3'])")
    assert workers[1].do("batch.hits") == 4
    assert controller.stats().counters.claims == 4
    workers[1].kill()
    assert controller.reap().shares == 4
    successor = join("engine", 0, RANKS)
    assert successor.finish_read(KEYS) == [Status.NO_SHARE] * 4, "what its predecessor was granted is not its own"
    assert controller.delete(KEYS) == [OK] * 4
    check_whole(controller)


def test_a_worker_killed_between_two_claims(arena: str, join: Join, enlist: Enlist) -> None:
    controller, workers = join("engine", None, RANKS), [enlist("engine", rank, RANKS) for rank in range(RANKS)]
    assert prefetch(controller, RANKS - 1).hits == 4
    workers[0].do("batch = cache.read([b'k0', b'k1'])")
    assert shares(arena) == {0: (2, 2), 1: (4, 0)}
    workers[0].kill()
    assert controller.reap().shares == 4
    assert controller.cancel_read(KEYS, RANKS - 1) == [OK] * 4
    workers[1].kill()
    check_whole(controller)


def test_a_consumer_for_all_killed_while_it_reads(arena: str, join: Join, enlist: Enlist) -> None:
    """What it would have given back is back by cancel, or with the ranks."""
    controller, consumer = join("engine", None, RANKS), enlist("engine", 0, RANKS)
    assert prefetch(controller, RANKS - 1).hits == 4
    consumer.do("from shmcache.storage import StorageManager; storage = StorageManager(cache)")
    consumer.do(
        "reading = storage.read_prefetched_results([b'k0', b'k1', b'k2', b'k3'], 1); batch = reading.__enter__()"
    )
    assert shares(arena) == {0: (4, 4), 1: (4, 0)}
    consumer.kill()
    assert controller.reap().shares == 8
    assert controller.delete(KEYS) == [LOCKED] * 4
    assert controller.cancel_read(KEYS, RANKS - 1) == [OK] * 4
    check_whole(controller)


# Who stores


def test_what_a_dead_process_was_storing_can_go(cache: Cache, enlist: Enlist) -> None:
    storing = enlist()
    storing.do(STORE)
    stats = cache.stats()
    assert (stats.held, stats.gauges.l2_storing, stats.gauges.l2_backlog_bytes) == (4, 1, 4 * BIG)
    assert cache.evict(1 << 30) == 0
    assert cache.delete(KEYS, force=True) == [LOCKED] * 4
    storing.kill()
    assert cache.reap() == ReapReport(lanes=1, shares=4, writes=0, lock=False)
    assert cache.stats().gauges.l2_backlog_bytes == 0
    check_readable(cache, KEYS)
    with StorageManager(cache, [store := MemoryStore()], store=None) as storage:
        storage.store(KEYS)
        storage.flush(TIMEOUT_S)
    assert sorted(store.objects) == KEYS
    assert cache.delete(KEYS) == [OK] * 4
    check_whole(cache)


def test_room_is_made_of_what_a_dead_process_was_storing(cache: Cache, enlist: Enlist) -> None:
    storing = enlist()
    storing.do(STORE)
    assert cache.put(b"all", b"x" * (4 << 20)) is Status.NO_SPACE
    storing.kill()
    assert cache.put(b"all", b"x" * (4 << 20)) is OK
    check_whole(cache)


# Stopped


def test_what_a_stopped_process_loads_ends_the_prefix_of_others(arena: str, ranks: list[Cache], loader: Member) -> None:
    loader.stop()
    begun = time.monotonic()
    result = prefetch(ranks[0], RANKS - 1, contend_s=0.2)
    assert result == PrefetchResult(1, 1, 0, None)
    assert time.monotonic() - begun < TIMEOUT_S / 2
    assert ranks[0].stats().counters.prefetch_contended == 1
    assert ranks[0].reap() == ReapReport(), "it lives"
    assert ranks[0].status(KEYS[1:]) == [IN_FLIGHT] * 3
    loader.resume()
    loader.do("go_on.set()")
    assert loader.do("str(storage.wait_prefetch_status(task, 60))") == str(PrefetchResult(4, 0, 4, None))
    assert shares(arena) == {0: (5, 0), 1: (5, 0)}
    assert prefetch(ranks[0], RANKS - 1) == PrefetchResult(4, 4, 0, None)
    for rank in ranks:
        check_readable(rank, [KEYS[0], *KEYS, *KEYS])
    loader.kill()
    check_whole(ranks[0])


def test_who_waits_for_a_stopped_process_gets_its_keys_when_it_goes_on(ranks: list[Cache], loader: Member) -> None:
    loader.stop()
    with StorageManager(ranks[0], [store := MemoryStore(KEYS, nbytes=BIG)], store=None, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(KEYS, BIG, RANKS - 1)
        with pytest.raises(TimeoutError):
            storage.wait_prefetch_status(task, 0.2)
        loader.resume()
        loader.do("go_on.set()")
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(4, 4, 0, None)
    assert store.asked("load") == [], "one process loads"
    for rank in ranks:
        check_readable(rank, [*KEYS, *KEYS])
    loader.kill()
    check_whole(ranks[0])


SHORT_LEASE = pytest.mark.parametrize(
    "config", [ArenaConfig("8MiB", block_size="64KiB", lanes=8, write_lease_s=LEASE_S)]
)


@SHORT_LEASE
def test_a_stopped_process_loses_its_keys_with_the_write_lease(ranks: list[Cache], loader: Member) -> None:
    """And publishes none of them when it goes on; its memory is not given to others meanwhile."""
    loader.stop()
    time.sleep(2 * LEASE_S)
    assert [ranks[0].put(key, data_of(key, BIG)) for key in KEYS[1:]] == [OK] * 3
    assert ranks[0].stats().writing == 3
    loader.resume()
    loader.do("go_on.set()")
    hits, error = loader.do("(lambda result: (result.hits, result.error))(storage.wait_prefetch_status(task, 60))")
    assert hits == 1
    assert "was lost to the write lease" in error
    wait_until(lambda: ranks[0].stats().writing == 0)
    for rank in ranks:
        check_readable(rank, KEYS)
    loader.kill()
    check_whole(ranks[0])


@SHORT_LEASE
def test_a_prefetch_loads_what_a_stopped_process_has_lost(ranks: list[Cache], loader: Member) -> None:
    loader.stop()
    time.sleep(2 * LEASE_S)
    assert prefetch(ranks[0], RANKS - 1, contend_s=1.0) == PrefetchResult(4, 1, 3, None)
    for rank in ranks:
        check_readable(rank, KEYS)


def test_a_stopped_process_that_stores_keeps_what_it_holds(cache: Cache, enlist: Enlist) -> None:
    storing = enlist()
    storing.do(STORE)
    storing.stop()
    assert cache.reap() == ReapReport()
    assert cache.evict(1 << 30) == 0
    assert cache.delete(KEYS, force=True) == [LOCKED] * 4
    check_readable(cache, KEYS)
    storing.kill()
    check_whole(cache)


# At any moment

SIZES = (100, 5000, 70_000)

# Prefetches, publishes, reads, cancels and stores for ever, in a directory that all share.
CHURN = """
import random
from shmcache.storage import FileStore, StorageManager
from storage_support import chain, data_of
rng = random.Random({seed})
files = FileStore({path!r})
storage = StorageManager(cache, [files], max_in_flight=3, io_threads=2, contend_s=0.05, backlog="256KiB")
def churn():
    while True:
        chosen = chain(8, f"{{rng.randrange(6)}}.")
        size = {sizes}[chosen[0][0] % 3]
        cache.delete(chosen[rng.randrange(9):], force=True)
        if rng.randrange(5) == 0:
            files.delete(chosen)
        what = rng.randrange(5)
        if what == 0:
            batch = cache.reserve_write(chosen, size)
            for key, view in zip(chosen, batch.views):
                if view is not None:
                    view[:] = data_of(key, size)
            batch.publish_and_reserve_read({ranks} - 1)
            continue
        tasks = [storage.submit_prefetch_task(chosen, size, rng.randrange({ranks})) for _ in range(rng.randint(1, 3))]
        if what == 1:
            storage.cancel_prefetch(tasks[0])
        if what == 2:
            cache.evict(rng.randrange(1 << 20))
        if what == 3:
            with storage.read_prefetched_results(chosen, {ranks} - 1) as batch:
                for key, view in zip(chosen, batch.views):
                    assert view is None or view == data_of(key, size), f"wrong bytes of {{key}}"
        storage.wait_prefetch_status(tasks[-1])
"""


class Reader(threading.Thread):
    """Reads all that a rank can get, and looks whether it is right."""

    def __init__(self, cache: Cache, seed: int) -> None:
        super().__init__()
        self.wrong: list[bytes] = []
        self.read = 0
        self.error: BaseException | None = None
        self._cache = cache
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self.start()

    def end(self) -> None:
        self._over.set()
        self.join(TIMEOUT_S)
        assert self.error is None
        assert self.wrong == []

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._look()
        except BaseException as error:  # noqa: BLE001 # raised at the end
            self.error = error

    def _look(self) -> None:
        keys = chain(8, f"{self._rng.randrange(6)}.")
        with self._cache.read(keys, wait_s=self._rng.choice([0, 0.01])) as batch:
            found = [(key, data) for key, data in zip(keys, contents(batch), strict=True) if data is not None]
        time.sleep(0.001)
        self.read += len(found)
        self.wrong += [key for key, data in found if data != data_of(key, SIZES[key[0] % 3])]


@pytest.mark.parametrize("config", [ArenaConfig("2MiB", block_size="4KiB", lanes=8)])
def test_deaths_at_any_moment(
    start: Callable[[], Member], arena: str, join: Join, chance: random.Random, tmp_path: Path
) -> None:
    survivor = join("engine", 0, RANKS)
    reader = Reader(survivor, chance.getrandbits(32))
    deadline, kills = time.monotonic() + KILL_SECONDS, 0
    members: list[Member] = []
    try:
        while kills < KILLS and time.monotonic() < deadline:
            if len(members) < 2:
                members.append(start())
                members[-1].attach(arena, "engine", None, RANKS)
                order = CHURN.format(seed=chance.getrandbits(32), path=str(tmp_path), sizes=SIZES, ranks=RANKS)
                members[-1].do(order)
                members[-1].begin("churn()")
                continue
            time.sleep(chance.uniform(0, 0.1))
            victim = members.pop(chance.randrange(2))
            assert not (not victim.busy and victim.answer()), "it ended by itself"
            victim.kill()
            kills += 1
            if chance.random() < 0.5:
                survivor.reap()
            assert survivor.verify() == []
    finally:
        for member in members:
            member.kill()
        reader.end()
    print(f"{kills} kills, {reader.read} objects read, {survivor.stats().counters}")
    assert kills >= 5
    assert reader.read > 100
    check_files(survivor, tmp_path)
    for tag in range(6):
        while OK in survivor.cancel_read(chain(8, f"{tag}."), RANKS - 1):
            pass
    check_whole(survivor)


def check_files(cache: Cache, path: Path) -> None:
    """All that the dead stored is right."""
    cache.reap()
    files = FileStore(path)
    with StorageManager(cache, [files], store=None) as storage:
        for tag in range(6):
            keys = chain(8, f"{tag}.")
            cache.delete(keys, force=True)
            size = SIZES[keys[0][0] % 3]
            there = [*files.lookup(keys), False].index(False)
            result = storage.wait_prefetch_status(storage.submit_prefetch_task(keys, size), TIMEOUT_S)
            assert result == PrefetchResult(there, 0, there, None)
            with storage.read_prefetched_results(keys[:there]) as batch:
                assert contents(batch) == [data_of(key, size) for key in keys[:there]]
    assert cache.stats().counters.l2_damaged == 0
