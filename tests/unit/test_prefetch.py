"""Prefetch, from submit to the last share given back, with an L2 that does what it should."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents, started
from storage_support import (
    BLOCK,
    SIZE,
    Gate,
    MemoryStore,
    Request,
    alternate,
    chain,
    check_idle,
    check_no_thread_stays,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    shares,
)

import shmcache
from shmcache import ArenaConfig, Cache, Layout, Status
from shmcache.storage import PrefetchResult, StorageManager

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT

RANKS = 4
TINY = ArenaConfig("16KiB", block_size="4KiB")  #: room for four objects of a block


def prefetch(
    storage: StorageManager, keys: Sequence[bytes], layout: Any = SIZE, extra_count: int = 0, **how: Any
) -> PrefetchResult:
    """Submits and waits."""
    task = storage.submit_prefetch_task(keys, layout, extra_count, **how)
    return storage.wait_prefetch_status(task, TIMEOUT_S)


def consume(cache: Cache, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """Reads the right bytes under this lane's reserved shares, and gives them back."""
    before = cache.stats().counters.claims
    with cache.read(keys) as batch:
        assert contents(batch) == [data_of(key, nbytes) for key in keys]
    assert cache.stats().counters.claims == before + len(keys)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does."""
    yield
    check_no_thread_stays()


@pytest.fixture
def controller(join: Join) -> Cache:
    """A controller of a group of four."""
    return join("engine", None, RANKS)


@pytest.fixture
def ranks(join: Join) -> list[Cache]:
    """The ranks of that group."""
    return [join("engine", rank, RANKS) for rank in range(RANKS)]


# What may be passed


@pytest.mark.parametrize("door", ["submit", "read"])
@pytest.mark.parametrize(
    ("extra_count", "error"),
    [
        (True, TypeError),
        (False, TypeError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (np.int64(1), TypeError),
        (-1, ValueError),
        (RANKS, ValueError),
        (10**30, ValueError),
    ],
)
def test_every_door_checks_extra_count_in_the_callers_thread(
    controller: Cache, door: str, extra_count: Any, error: type[Exception]
) -> None:
    store = MemoryStore(chain(1))
    with StorageManager(controller, [store], store=None) as storage:
        doors: dict[str, Callable[[], object]] = {
            "submit": lambda: storage.submit_prefetch_task(chain(1), SIZE, extra_count),
            "read": lambda: storage.read_prefetched_results(chain(1), extra_count).__enter__(),
        }
        with pytest.raises(error, match="extra_count: expected"):
            doors[door]()
        assert store.calls == []
        assert controller.stats().counters.prefetch_requests == 0
        assert prefetch(storage, chain(1), extra_count=RANKS - 1).hits == 1


def test_a_cache_without_a_group_has_no_extra_ranks(cache: Cache) -> None:
    with StorageManager(cache) as storage, pytest.raises(ValueError, match="expected 0 to 0, as world_size is 1"):
        storage.submit_prefetch_task(chain(1), SIZE, 1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"keys": b"k0"}, TypeError),
        ({"keys": 7}, TypeError),
        ({"keys": ["k0"]}, TypeError),
        ({"keys": [b""]}, ValueError),
        ({"keys": [b"k" * 65]}, ValueError),
        ({"layout": 0}, ValueError),
        ({"layout": True}, TypeError),
        ({"layout": None}, TypeError),
        ({"layout": [SIZE, SIZE]}, ValueError),
        ({"layout": [None]}, TypeError),
        ({"skip_l2": 1}, TypeError),
        ({"temporary": None}, TypeError),
    ],
)
def test_bad_arguments_of_submit(cache: Cache, arguments: dict[str, Any], error: type[Exception]) -> None:
    with StorageManager(cache, [MemoryStore()], store=None) as storage:
        with pytest.raises(error):
            storage.submit_prefetch_task(**{"keys": chain(1), "layout": SIZE, **arguments})
        assert cache.stats().counters.prefetch_requests == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cache": None}, TypeError),
        ({"l2": "file"}, TypeError),
        ({"l2": MemoryStore()}, TypeError),
        ({"l2": [object()]}, TypeError),
        ({"l2": ["no-such-scheme://x"]}, ValueError),
        ({"max_in_flight": 0}, ValueError),
        ({"max_in_flight": 1025}, ValueError),
        ({"max_in_flight": True}, TypeError),
        ({"max_in_flight": 1.0}, TypeError),
        ({"io_threads": 0}, ValueError),
        ({"io_threads": None}, TypeError),
        ({"store": "write_back"}, ValueError),
        ({"store": []}, ValueError),
        ({"l2_timeout_s": 0}, ValueError),
        ({"l2_timeout_s": math.nan}, ValueError),
        ({"l2_timeout_s": "1"}, TypeError),
        ({"contend_s": -1}, ValueError),
        ({"contend_s": math.inf}, ValueError),
        ({"backlog": "much"}, ValueError),
        ({"backlog": 0}, ValueError),
    ],
)
def test_bad_arguments_of_a_manager(cache: Cache, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        StorageManager(**{"cache": cache, **arguments})
    with StorageManager(cache, [MemoryStore()], store=None):  # the cache is none the worse
        assert cache.put(b"k", b"data") is OK


@pytest.mark.parametrize(
    ("timeout_s", "error"),
    [
        (-1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (1e300, ValueError),
        (10**400, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_bad_timeouts(cache: Cache, timeout_s: Any, error: type[Exception]) -> None:
    with StorageManager(cache) as storage:
        task = storage.submit_prefetch_task([], SIZE)
        with pytest.raises(error, match="timeout_s: expected"):
            storage.wait_prefetch_status(task, timeout_s)


def test_tasks_of_others_are_refused(cache: Cache) -> None:
    with StorageManager(cache) as storage, StorageManager(cache) as other:
        task: Any = other.submit_prefetch_task([], SIZE)
        for ask in (storage.query_prefetch_status, storage.wait_prefetch_status, storage.cancel_prefetch):
            with pytest.raises(ValueError, match="task of this StorageManager"):
                ask(task)
            with pytest.raises(TypeError, match="what submit_prefetch_task gave"):
                ask(object())  # type: ignore[arg-type] # that is the point
        assert other.wait_prefetch_status(task, TIMEOUT_S).hits == 0


# One share a rank


@pytest.mark.parametrize("extra_count", [0, 1, 3])
@pytest.mark.parametrize("l1", [0, 2, 3])
def test_each_rank_gets_its_share_and_claims_no_other(
    controller: Cache, ranks: list[Cache], extra_count: int, l1: int
) -> None:
    keys, name = chain(3), controller.name
    fill(controller, keys[:l1])
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        assert prefetch(storage, keys, extra_count=extra_count) == PrefetchResult(3, l1, 3 - l1, None)
        expected = {rank: (3 if rank <= extra_count else 0, 0) for rank in range(RANKS)}
        assert shares(name) == expected
        assert controller.stats().counters.grants == 3 * (1 + extra_count)
        for rank, worker in enumerate(ranks[: extra_count + 1]):
            assert controller.delete(keys) == [Status.LOCKED] * 3  # what is left of the shares keeps them
            with worker.read(keys) as batch:
                expected[rank] = (0, 3)
                assert shares(name) == expected
                assert contents(batch) == [data_of(key) for key in keys]
            expected[rank] = (0, 0)
            assert shares(name) == expected
        assert controller.stats().counters.claims == 3 * (1 + extra_count)
        check_idle(controller)
        assert controller.delete(keys) == [OK] * 3
    check_nothing_leaked(controller)


def test_a_rank_beyond_extra_count_reads_under_a_share_of_its_own(controller: Cache, ranks: list[Cache]) -> None:
    with StorageManager(controller, [MemoryStore(chain(1))], store=None) as storage:
        assert prefetch(storage, chain(1), extra_count=1).hits == 1
        with ranks[3].read(chain(1)) as batch:
            assert batch.hits == 1
            assert shares(controller.name) == {0: (1, 0), 1: (1, 0), 2: (0, 0), 3: (0, 1)}
    assert controller.stats().counters.claims == 0


def test_shares_wait_for_ranks_that_attach_later(controller: Cache, join: Join) -> None:
    with StorageManager(controller, [MemoryStore(chain(2))], store=None) as storage:
        assert prefetch(storage, chain(2), extra_count=1).hits == 2
    consume(join("engine", 1, RANKS), chain(2))
    consume(join("engine", 0, RANKS), chain(2))
    check_nothing_leaked(controller)


def test_a_rank_prefetches_for_its_group(ranks: list[Cache]) -> None:
    with StorageManager(ranks[2], [MemoryStore(chain(2))], store=None) as storage:
        assert prefetch(storage, chain(2), extra_count=2).hits == 2
        assert shares(ranks[0].name) == {0: (2, 0), 1: (2, 0), 2: (2, 0), 3: (0, 0)}
        for rank in range(3):
            consume(ranks[rank], chain(2))
    check_nothing_leaked(ranks[0])


def test_a_cache_without_a_group_prefetches_for_itself(cache: Cache) -> None:
    with StorageManager(cache, [MemoryStore(chain(2))], store=None) as storage:
        assert prefetch(storage, chain(2)).hits == 2
        assert cache.stats().reserved == 2
        consume(cache, chain(2))
    check_nothing_leaked(cache)


def test_a_rank_with_all_the_shares_it_can_have_ends_the_prefix(cache: Cache) -> None:
    keys = chain(3)
    fill(cache, keys[:2])
    assert cache.reserve_read([keys[1]] * 65535) == [OK] * 65535
    with StorageManager(cache, [MemoryStore(keys)], store=None) as storage:
        result = prefetch(storage, keys)
        assert (result.hits, result.l1_hits) == (1, 1)
        assert result.error is not None
        assert f"65,535 shares of key {keys[1].hex()}" in result.error
    cache.cancel_read([keys[0], *[keys[1]] * 65535])
    check_nothing_leaked(cache)


# The prefix


@pytest.mark.parametrize("extra_count", [0, 3])
def test_the_longest_prefix_of_l1_and_l2_whatever_lies_where(
    controller: Cache, ranks: list[Cache], extra_count: int
) -> None:
    """Five keys, each nowhere, in L1, in L2, or in both: all 1,024 ways."""
    del ranks  # they hold the lanes that get the shares
    keys = chain(5)
    store = MemoryStore()
    with StorageManager(controller, [store], store=None) as storage:
        for places in itertools.product(("nowhere", "l1", "l2", "both"), repeat=5):
            l1 = [key for key, place in zip(keys, places, strict=True) if place in {"l1", "both"}]
            store.objects = {k: data_of(k) for k, place in zip(keys, places, strict=True) if place in {"l2", "both"}}
            hits = places.index("nowhere") if "nowhere" in places else 5
            l1_hits = len(set(keys[:hits]) & set(l1))
            controller.clear()
            fill(controller, l1)
            task = storage.submit_prefetch_task(keys, SIZE, extra_count)
            assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(hits, l1_hits, hits - l1_hits, None)
            stats = controller.stats()
            assert (stats.reserved, stats.held, stats.writing) == (hits * (1 + extra_count), 0, 0), places
            # Slots are reserved for the prefix only, and what was there stays.
            assert stats.objects == len(l1) + hits - l1_hits, places
            assert controller.status(keys[:hits]) == [OK] * hits
            storage.cancel_prefetch(task)
            assert controller.stats().reserved == 0, places
        loaded = {key for keys in store.asked("load") for key in keys}
        assert loaded == set(keys)
    check_nothing_leaked(controller)


def test_what_load_does_not_find_ends_the_prefix_and_frees_what_lies_behind(cache: Cache) -> None:
    keys = chain(6)
    for missing in range(6):
        cache.clear()
        store = MemoryStore(keys)
        store.faults["lookup"] = lambda request: [True] * len(request.keys)
        del store.objects[keys[missing]]
        with StorageManager(cache, [store], store=None) as storage:
            assert prefetch(storage, keys) == PrefetchResult(missing, 0, missing, None)
            assert cache.stats().objects == missing
            if missing:
                consume(cache, keys[:missing])
        check_nothing_leaked(cache)
    counters = cache.stats().counters
    assert (counters.l2_loads, counters.l2_load_misses, counters.l2_load_errors) == (30, 6, 0)


def test_what_one_call_does_not_find_ends_the_prefix_for_all(cache: Cache) -> None:
    keys = chain(8)
    even, odd = alternate(keys)
    odd.faults["load"] = lambda request: [NOT_FOUND] * len(request.keys)
    with StorageManager(cache, [even, odd], store=None, io_threads=1) as storage:
        assert prefetch(storage, keys) == PrefetchResult(1, 0, 1, None)
        assert cache.stats().objects == 1
    consume(cache, keys[:1])
    check_nothing_leaked(cache)


def test_skip_l2(cache: Cache) -> None:
    fill(cache, chain(2))
    store = MemoryStore(chain(4))
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage, chain(4), skip_l2=True) == PrefetchResult(2, 2, 0, None)
        consume(cache, chain(2))
        assert store.calls == []
    check_nothing_leaked(cache)


@pytest.mark.parametrize("l1", [[], [0], [0, 2]])
def test_without_an_l2(cache: Cache, l1: list[int]) -> None:
    fill(cache, [chain(3)[i] for i in l1])
    with StorageManager(cache) as storage:
        hits = min(len(l1), 1)
        assert prefetch(storage, chain(3)) == PrefetchResult(hits, hits, 0, None)
        assert cache.stats().reserved == hits


def test_no_keys(cache: Cache) -> None:
    with StorageManager(cache, [store := MemoryStore()], store=None) as storage:
        assert prefetch(storage, []) == PrefetchResult(0, 0, 0, None)
        assert prefetch(storage, np.empty((0, 8), np.uint8)) == PrefetchResult(0, 0, 0, None)  # type: ignore[arg-type]
        assert store.calls == []
        with storage.read_prefetched_results([]) as batch:
            assert len(batch) == 0


@pytest.mark.parametrize("l1", [False, True])
def test_a_key_that_comes_twice_gets_a_share_each_time(cache: Cache, l1: bool) -> None:
    keys = [b"a", b"b", b"a", b"a"]
    store = MemoryStore([b"a", b"b"])
    if l1:
        fill(cache, [b"a"])
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage, keys).hits == 4
        assert cache.stats().reserved == 4
        assert cache.cancel_read([b"a"] * 4) == [OK, OK, OK, Status.NO_SHARE]
        assert cache.cancel_read([b"b"] * 2) == [OK, Status.NO_SHARE]
        assert cache.stats().counters.l2_loads == (1 if l1 else 2)
    check_nothing_leaked(cache)


def test_keys_in_a_matrix(cache: Cache) -> None:
    matrix = np.frombuffer(b"".join(chain(4)), np.uint8).reshape(4, 2).copy()
    with StorageManager(cache, [MemoryStore(chain(4))], store=None) as storage:
        task = storage.submit_prefetch_task(matrix, SIZE)
        matrix[:] = 0  # the request has its own
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 4
    consume(cache, chain(4))


# Layouts, temporary objects


def test_layouts_go_with_the_objects(cache: Cache) -> None:
    keys = chain(3)
    layouts: list[Layout | int] = [
        Layout((5, 7), "float32"),
        100,
        Layout([((3,), "int64"), ((2, 2), "bfloat16")]),
    ]
    sizes = [one if isinstance(one, int) else one.nbytes for one in layouts]
    store = MemoryStore()
    store.objects = {key: data_of(key, nbytes) for key, nbytes in zip(keys, sizes, strict=True)}
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage, keys, layouts).hits == 3
        with cache.read(keys) as batch:
            assert contents(batch) == [data_of(key, nbytes) for key, nbytes in zip(keys, sizes, strict=True)]
            first, second, third = batch.arrays()
            assert (first.shape, first.dtype) == ((5, 7), np.float32)
            assert (second.shape, second.dtype) == ((100,), np.uint8)
            assert [one.shape for one in third] == [(3,), (2, 2)]
            del first, second, third
        cache.clear()
        one = Layout((SIZE // 4,), "float32")
        store.objects = {key: data_of(key) for key in keys}
        assert prefetch(storage, keys, one).hits == 3
        consume(cache, keys)


def test_what_l2_has_under_another_size_is_not_found(cache: Cache) -> None:
    with StorageManager(cache, [MemoryStore(chain(2))], store=None) as storage:
        assert prefetch(storage, chain(2), SIZE + 1) == PrefetchResult(0, 0, 0, None)
        assert prefetch(storage, chain(2), [SIZE, SIZE - 1]) == PrefetchResult(1, 0, 1, None)
    consume(cache, chain(1))
    check_nothing_leaked(cache)


def test_temporary_objects_go_with_their_last_share(controller: Cache, ranks: list[Cache]) -> None:
    keys = chain(2)
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        fill(controller, keys[:1])
        assert prefetch(storage, keys, extra_count=1, temporary=True).hits == 2
        consume(ranks[0], keys)
        assert controller.status(keys) == [OK, OK]
        consume(ranks[1], keys)
        assert controller.status(keys) == [OK, NOT_FOUND]  # what was there already is not temporary
        task = storage.submit_prefetch_task(keys, SIZE, 1, temporary=True)
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 2
        storage.cancel_prefetch(task)
        assert controller.status(keys) == [OK, NOT_FOUND]
        assert prefetch(storage, keys, extra_count=1, temporary=True).hits == 2
        with storage.read_prefetched_results(keys, 1) as batch:
            assert contents(batch) == list(map(data_of, keys))
        assert controller.status(keys) == [OK, NOT_FOUND]
    check_nothing_leaked(controller)


# Several adapters


def test_adapters_are_asked_in_their_order_for_what_is_left(cache: Cache) -> None:
    keys = chain(6)
    fill(cache, [keys[5]])
    near, far = MemoryStore([keys[0], keys[3]], name="near"), MemoryStore(keys[:5], name="far")
    with StorageManager(cache, [near, far], store=None) as storage:
        assert prefetch(storage, keys) == PrefetchResult(6, 1, 5, None)
    assert near.asked("lookup") == [keys[:5]]
    assert far.asked("lookup") == [[keys[1], keys[2], keys[4]]]
    assert sorted(near.asked("load")) == [[keys[0]], [keys[3]]]
    assert sorted(far.asked("load")) == [[keys[1], keys[2]], [keys[4]]]
    counters = cache.stats().counters
    assert (counters.l2_lookups, counters.l2_lookup_hits) == (8, 5)
    consume(cache, keys)
    check_nothing_leaked(cache)


def test_adapters_that_have_all_or_nothing(cache: Cache) -> None:
    keys = chain(3)
    first, empty, last = MemoryStore(keys), MemoryStore(), MemoryStore(keys)
    with StorageManager(cache, [first, empty, last], store=None) as storage:
        assert prefetch(storage, keys).hits == 3
    assert (empty.calls, last.calls) == ([], [])
    assert first.closed
    assert last.closed
    cache.cancel_read(keys)
    cache.clear()
    with StorageManager(cache, [empty, last], store=None) as storage:
        assert prefetch(storage, keys).hits == 3
        assert prefetch(storage, [b"nowhere"]).hits == 0
    assert empty.asked("load") == []


# Several requests


def test_no_more_than_max_in_flight_are_at_the_adapter(cache: Cache) -> None:
    store = MemoryStore(chain(6))
    with Gate() as gate, StorageManager(cache, [store], store=None, max_in_flight=2, io_threads=8) as storage:
        store.faults["lookup"] = gate
        tasks = [storage.submit_prefetch_task([key], SIZE) for key in chain(6)]
        gate.reached(2)
        eventually(lambda: cache.stats().gauges.prefetch_queued == 4, "the others queue")
        assert cache.stats().gauges.prefetch_in_flight == 2
        assert store.asked("lookup") == [[key] for key in chain(2)]
        gate.open()
        assert [storage.wait_prefetch_status(task, TIMEOUT_S).hits for task in tasks] == [1] * 6
    assert store.most <= 2
    assert [keys for (keys,) in store.asked("lookup")] == chain(6)  # begun in their order
    consume(cache, chain(6))
    check_nothing_leaked(cache)
    assert cache.stats().histograms.prefetch_queue.count == 6


def test_a_task_that_ends_while_nothing_else_happens_lets_the_next_begin(cache: Cache, join: Join) -> None:
    writer = join()
    batch = writer.reserve_write([b"contended"], SIZE)
    with StorageManager(cache, max_in_flight=1) as storage:
        first, second = (storage.submit_prefetch_task(keys, SIZE) for keys in ([b"contended"], []))
        eventually(lambda: cache.stats().gauges.prefetch_queued == 1, "the second queues")
        batch.publish()
        assert storage.wait_prefetch_status(first, TIMEOUT_S).hits == 1
        assert storage.wait_prefetch_status(second, TIMEOUT_S).hits == 0


def test_two_requests_for_the_same_keys_load_once_and_both_get_their_shares(
    controller: Cache, ranks: list[Cache]
) -> None:
    keys = chain(4)
    store = MemoryStore(keys)
    with Gate() as gate, StorageManager(controller, [store], store=None) as storage:
        store.faults["load"] = gate
        first = storage.submit_prefetch_task(keys, SIZE, 3)
        gate.reached()
        second, third = (storage.submit_prefetch_task(keys, SIZE, extra_count) for extra_count in (1, 3))
        gate.open()
        results = [storage.wait_prefetch_status(task, TIMEOUT_S) for task in (first, second, third)]
        assert results == [PrefetchResult(4, 0, 4), PrefetchResult(4, 4, 0), PrefetchResult(4, 4, 0)]
        assert len(store.asked("load")) == 1
        assert shares(controller.name) == {0: (12, 0), 1: (12, 0), 2: (8, 0), 3: (8, 0)}
        storage.cancel_prefetch(first)
        assert shares(controller.name) == {0: (8, 0), 1: (8, 0), 2: (4, 0), 3: (4, 0)}
        consume(ranks[3], keys)
        storage.cancel_prefetch(second)
        storage.cancel_prefetch(third)
    check_nothing_leaked(controller)


def test_of_two_requests_for_the_same_keys_the_second_goes_on_where_the_first_is_cancelled(cache: Cache) -> None:
    keys = chain(4)
    store = MemoryStore(keys)
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        first = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        second = storage.submit_prefetch_task(keys, SIZE)
        canceller = threading.Thread(target=storage.cancel_prefetch, args=(first,))
        canceller.start()
        eventually(lambda: cache.stats().counters.prefetch_cancels == 1, "the cancel has begun")
        gate.open()
        canceller.join(TIMEOUT_S)
        assert storage.wait_prefetch_status(first, 0).hits == 0
        assert storage.wait_prefetch_status(second, TIMEOUT_S) == PrefetchResult(4, 0, 4)
        assert len(store.asked("load")) == 2
    consume(cache, keys)
    check_nothing_leaked(cache)


def test_a_key_that_this_manager_loads_itself_is_no_contended_one(cache: Cache, join: Join) -> None:
    """Its load has a deadline of its own, and may take longer than others are waited for."""
    keys = chain(3)
    store = MemoryStore(keys)
    foreign = join().reserve_write([b"foreign"], SIZE)
    with Gate() as gate, StorageManager(cache, [store], store=None, contend_s=0.05) as storage:
        store.faults["load"] = gate
        first = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        second = storage.submit_prefetch_task(keys, SIZE)
        assert prefetch(storage, [b"foreign"]).hits == 0  # contend_s is over, for the second, too
        gate.open()
        assert storage.wait_prefetch_status(first, TIMEOUT_S) == PrefetchResult(3, 0, 3)
        assert storage.wait_prefetch_status(second, TIMEOUT_S) == PrefetchResult(3, 3, 0)
        assert cache.stats().counters.prefetch_contended == 1
    foreign.abort()
    cache.cancel_read(keys * 2)
    check_nothing_leaked(cache)


def test_nor_is_one_that_it_has_loaded_and_cannot_publish_yet(cache: Cache, join: Join) -> None:
    """The first request waits for the load of its first key, and the second for both."""
    keys = chain(2)
    even, odd = alternate(keys)
    foreign = join().reserve_write([b"foreign"], SIZE)
    with Gate() as gate, StorageManager(cache, [even, odd], store=None, contend_s=0.05) as storage:
        even.faults["load"] = gate
        first = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        eventually(lambda: cache.stats().histograms.l2_load.count == 1, "the second key is loaded")
        second = storage.submit_prefetch_task(keys, SIZE)
        assert prefetch(storage, [b"foreign"]).hits == 0  # contend_s is over, for the second, too
        gate.open()
        assert storage.wait_prefetch_status(first, TIMEOUT_S) == PrefetchResult(2, 0, 2)
        assert storage.wait_prefetch_status(second, TIMEOUT_S) == PrefetchResult(2, 2, 0)
    foreign.abort()
    cache.cancel_read(keys * 2)
    check_nothing_leaked(cache)


def test_many_threads_submit_wait_and_cancel(cache: Cache, hasty_switches: None) -> None:
    del hasty_switches
    store = MemoryStore(chain(8))
    with StorageManager(cache, [store], store=None, max_in_flight=3) as storage:

        def work(number: int) -> None:
            for i in range(30):
                keys = chain(8)[i % 4 : i % 4 + 1 + number]
                task = storage.submit_prefetch_task(keys, SIZE)
                if (i + number) % 3:
                    hits = storage.wait_prefetch_status(task, TIMEOUT_S).hits
                    assert hits == len(keys)
                storage.cancel_prefetch(task)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
    check_nothing_leaked(cache)


# Query and wait


def test_query_gives_a_result_once_and_wait_as_often_as_asked(cache: Cache) -> None:
    store = MemoryStore(chain(1))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        task = storage.submit_prefetch_task(chain(1), SIZE)
        gate.reached()
        assert storage.query_prefetch_status(task) is None
        for timeout_s in (0, 0.0, 0.01):
            with pytest.raises(TimeoutError, match="not finished after"):
                storage.wait_prefetch_status(task, timeout_s)
        gate.open()
        expected = PrefetchResult(1, 0, 1, None)
        assert storage.wait_prefetch_status(task) == expected
        assert storage.query_prefetch_status(task) == expected
        assert storage.query_prefetch_status(task) is None
        assert storage.wait_prefetch_status(task, 0) == expected
        assert storage.wait_prefetch_status(task, 0) == expected


def test_a_result_says_what_it_is(cache: Cache) -> None:
    with StorageManager(cache, [MemoryStore(chain(2))], store=None) as storage:
        task = storage.submit_prefetch_task(chain(2), SIZE)
        storage.wait_prefetch_status(task, TIMEOUT_S)
        assert "2 keys, extra_count=0: PrefetchResult(hits=2" in repr(task)
        assert cache.name in repr(storage)
    assert "closed" in repr(storage)


# Keys become readable in order, as they arrive


def test_the_first_keys_are_readable_while_the_last_is_loaded(cache: Cache, join: Join) -> None:
    keys = chain(3)
    worker = join()
    even, odd = alternate(keys)
    with Gate(keys[2]) as gate, StorageManager(cache, [even, odd], store=None) as storage:
        even.faults["load"] = gate
        task = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        with worker.read(keys[:2], wait_s=TIMEOUT_S) as batch:
            assert contents(batch) == list(map(data_of, keys[:2]))
        eventually(lambda: cache.stats().histograms.prefetch_first_key.count == 1, "the first is counted")
        assert cache.status(keys) == [OK, OK, IN_FLIGHT]
        assert cache.stats().reserved == 2
        assert storage.query_prefetch_status(task) is None
        assert cache.stats().histograms.prefetch_total.count == 0
        gate.open()
        with worker.read(keys[2:], wait_s=TIMEOUT_S) as batch:
            assert contents(batch) == [data_of(keys[2])]
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 3
    consume(cache, keys)
    check_nothing_leaked(cache)


def test_no_key_is_readable_before_those_in_front_of_it(cache: Cache) -> None:
    keys = chain(3)
    even, odd = alternate(keys)
    with Gate(keys[0]) as gate, StorageManager(cache, [even, odd], store=None) as storage:
        even.faults["load"] = gate
        task = storage.submit_prefetch_task(keys, SIZE)
        eventually(lambda: cache.stats().histograms.l2_load.count == 2, "the last two are loaded")
        assert cache.status(keys) == [IN_FLIGHT] * 3
        gate.open()
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 3
    consume(cache, keys)


# Room


def test_loading_evicts(cache: Cache) -> None:
    filler = chain(cache.stats().capacity // (2 * BLOCK), "old")
    fill(cache, filler)
    assert cache.stats().used_bytes == cache.stats().capacity
    with StorageManager(cache, [MemoryStore(chain(20))], store=None) as storage:
        assert prefetch(storage, chain(20)) == PrefetchResult(20, 0, 20, None)
    assert cache.stats().counters.evictions == 20
    consume(cache, chain(20))
    check_nothing_leaked(cache)


def test_what_is_held_is_not_evicted(cache: Cache, join: Join) -> None:
    holder = join()
    filler = chain(cache.stats().capacity // (2 * BLOCK), "old")
    fill(cache, filler)
    store = MemoryStore(chain(3))
    with StorageManager(cache, [store], store=None) as storage:
        with holder.read(filler):
            assert prefetch(storage, chain(3)) == PrefetchResult(0, 0, 0, None)
            assert cache.stats().counters.prefetch_no_space == 1
            assert cache.stats().objects == len(filler)
        with holder.read(filler[2:]):
            assert prefetch(storage, chain(3)) == PrefetchResult(2, 0, 2, None)
        consume(cache, chain(2))
        assert prefetch(storage, chain(3)) == PrefetchResult(3, 2, 1, None)
    assert cache.stats().counters.prefetch_no_space == 2
    consume(cache, chain(3))
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [TINY])
@pytest.mark.parametrize("l1", [[], [1, 2, 3, 4], [2, 3], [0, 4], [5]])
def test_a_chain_that_is_longer_than_the_arena_is_served_as_far_as_there_is_room(cache: Cache, l1: list[int]) -> None:
    keys = chain(9)
    fill(cache, [keys[i] for i in l1], BLOCK)
    with StorageManager(cache, [MemoryStore(keys, nbytes=BLOCK)], store=None) as storage:
        result = prefetch(storage, keys, BLOCK)
        assert (result.hits, result.error) == (4, None)
        assert cache.stats().counters.prefetch_no_space == 1
        consume(cache, keys[:4], BLOCK)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [TINY])
def test_an_object_that_is_larger_than_the_arena(cache: Cache) -> None:
    keys = chain(3)
    store = MemoryStore(keys, nbytes=BLOCK)
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage, keys, [BLOCK, 5 * BLOCK, BLOCK]) == PrefetchResult(1, 0, 1, None)
        consume(cache, keys[:1], BLOCK)
    check_nothing_leaked(cache)


# Keys in another writer's hands


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_key_that_another_writes_is_waited_for(cache: Cache, join: Join, at: int) -> None:
    keys = chain(3)
    writer = join()
    batch = writer.reserve_write([keys[at]], SIZE)
    store = MemoryStore(set(keys) - {keys[at]})
    with StorageManager(cache, [store], store=None, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(keys, SIZE)
        eventually(lambda: cache.status(keys)[:at] == [OK] * at, "those in front are readable")
        eventually(lambda: len(store.asked("load")) > 0, "the others are loaded meanwhile")
        assert storage.query_prefetch_status(task) is None
        view = batch.views[0]
        assert view is not None
        view[:] = data_of(keys[at])
        batch.publish()
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(3, 1, 2, None)
    consume(cache, keys)
    check_nothing_leaked(cache)


def test_a_writer_that_makes_headway_is_waited_for_longer(cache: Cache, join: Join) -> None:
    """Between two of its keys less than contend_s goes by, though all together take longer."""
    keys, contend_s = chain(4), 3.0
    writer = join()
    batches = [writer.reserve_write([key], SIZE) for key in keys]
    with StorageManager(cache, contend_s=contend_s) as storage:
        task = storage.submit_prefetch_task(keys, SIZE)
        for i, batch in enumerate(batches):
            threading.Event().wait(0.35 * contend_s)  # nothing but time tells that it has passed
            batch.publish()
            eventually(lambda i=i: cache.stats().reserved == i + 1, "it is granted")  # type: ignore[misc]
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(4, 4, 0, None)
    cache.cancel_read(keys)
    check_nothing_leaked(cache)


def test_keys_that_others_give_up_are_looked_for_in_l2(cache: Cache, join: Join) -> None:
    keys = chain(6)
    writer = join()
    batches = [writer.reserve_write([key], SIZE) for key in keys[:5]]
    store = MemoryStore(keys)
    with StorageManager(cache, [store], store=None, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(keys, SIZE)
        for i, batch in enumerate(batches):
            eventually(lambda i=i: len(store.asked("load")) == i + 1, "the one before is loaded")  # type: ignore[misc]
            batch.abort()
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(6, 0, 6, None)
    consume(cache, keys)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("publish", [True, False])
def test_a_key_that_another_begins_to_write_while_it_is_looked_up(cache: Cache, join: Join, publish: bool) -> None:
    keys = chain(2)
    other = join()
    even, odd = alternate(keys)
    with Gate() as gate, StorageManager(cache, [even, odd], store=None, contend_s=TIMEOUT_S) as storage:
        odd.faults["lookup"] = gate
        task = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        batch = other.reserve_write(keys[:1], SIZE)
        gate.open()
        eventually(lambda: odd.asked("load") == [keys[1:]], "the one behind it is loaded")
        assert storage.query_prefetch_status(task) is None
        if publish:
            view = batch.views[0]
            assert view is not None
            view[:] = data_of(keys[0])
            batch.publish()
        else:
            batch.abort()
        l1_hits = int(publish)
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(2, l1_hits, 2 - l1_hits, None)
    consume(cache, keys)
    check_nothing_leaked(cache)


def test_a_key_that_another_gives_up_and_no_l2_has_ends_the_prefix(cache: Cache, join: Join) -> None:
    keys = chain(3)
    batch = join().reserve_write([keys[1]], SIZE)
    store = MemoryStore([keys[0], keys[2]])
    with StorageManager(cache, [store], store=None, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(keys, SIZE)
        eventually(lambda: len(store.asked("load")) == 2, "the others are loaded")
        batch.abort()
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(1, 0, 1, None)
    consume(cache, keys[:1])
    check_nothing_leaked(cache)


def test_a_key_that_another_never_finishes_ends_the_prefix(cache: Cache, join: Join) -> None:
    keys = chain(3)
    batch = join().reserve_write([keys[1]], SIZE)
    with StorageManager(cache, [MemoryStore(keys)], store=None, contend_s=0.05) as storage:
        assert prefetch(storage, keys) == PrefetchResult(1, 0, 1, None)
        assert cache.stats().counters.prefetch_contended == 1
        assert cache.stats().objects == 1
        batch.abort()
        assert prefetch(storage, keys) == PrefetchResult(3, 1, 2, None)
    consume(cache, keys)
    assert cache.stats().reserved == 1  # of the first prefetch
    cache.cancel_read(keys)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", write_lease_s=1e-6)])
def test_a_writer_that_is_stuck_beyond_its_lease_loses_the_key_to_the_prefetch(cache: Cache, join: Join) -> None:
    keys = chain(3)
    batch = join().reserve_write([keys[1]], SIZE)
    with StorageManager(cache, [MemoryStore(keys)], store=None, contend_s=0.05) as storage:
        assert prefetch(storage, keys) == PrefetchResult(3, 0, 3, None)
        consume(cache, keys)
    assert batch.publish() == [Status.NOT_OWNER]
    check_nothing_leaked(cache)


def test_a_writer_that_dies_is_noticed(cache: Cache) -> None:
    keys = chain(3)
    program = (
        "import sys, shmcache\n"
        "cache = shmcache.attach(sys.argv[1])\n"
        f"batch = cache.reserve_write([{keys[1]!r}], {SIZE})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    store = MemoryStore(keys)
    with (
        started(program, cache.name) as writer,
        StorageManager(cache, [store], store=None, contend_s=TIMEOUT_S) as storage,
    ):
        task = storage.submit_prefetch_task(keys, SIZE)
        eventually(lambda: len(store.asked("load")) == 2, "the others are loaded")
        assert storage.query_prefetch_status(task) is None
        writer.kill()
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(3, 0, 3, None)
    consume(cache, keys)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", write_lease_s=1e-6)])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_key_lost_to_the_write_lease_ends_the_prefix(cache: Cache, join: Join, lost: int) -> None:
    keys = chain(3)
    other = join()
    store = MemoryStore(keys)
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        task = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        with other.reserve_write([keys[lost]], SIZE) as batch:
            assert batch.status == [OK]
            gate.open()
            result = storage.wait_prefetch_status(task, TIMEOUT_S)
            assert (result.hits, result.l2_hits) == (lost, lost)
            assert result.error is not None
            assert f"key {keys[lost].hex()} was lost to the write lease" in result.error
            assert cache.stats().reserved == lost
            batch.abort()
    if lost:
        consume(cache, keys[:lost])
    check_nothing_leaked(cache)


# Cancel


def test_cancel_while_queued(cache: Cache) -> None:
    store = MemoryStore(chain(4))
    with Gate() as gate, StorageManager(cache, [store], store=None, max_in_flight=1) as storage:
        store.faults["lookup"] = gate
        first, second, third = (storage.submit_prefetch_task([key], SIZE) for key in chain(3))
        gate.reached()
        assert storage.cancel_prefetch(second) == PrefetchResult(0, 0, 0, None)
        eventually(lambda: cache.stats().gauges.prefetch_queued == 1, "the third is there")
        gate.open()
        assert [storage.wait_prefetch_status(task, TIMEOUT_S).hits for task in (first, second, third)] == [1, 0, 1]
    assert store.asked("lookup") == [[b"k0"], [b"k2"]]
    cache.cancel_read(chain(3))
    check_nothing_leaked(cache)


def test_cancel_in_look_up(cache: Cache) -> None:
    store = MemoryStore(chain(4))
    fill(cache, chain(2))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["lookup"] = gate
        task = storage.submit_prefetch_task(chain(4), SIZE)
        gate.reached()
        assert cache.stats().reserved == 2
        assert storage.cancel_prefetch(task) == PrefetchResult(0, 0, 0, None)  # though the look-up is not back
        check_idle(cache)
        gate.open()
        assert prefetch(storage, chain(4)).hits == 4
        storage.cancel_prefetch(storage.submit_prefetch_task([], SIZE))
    consume(cache, chain(4))
    check_nothing_leaked(cache)


def test_cancel_while_waiting_for_another_writer(cache: Cache, join: Join) -> None:
    batch = join().reserve_write([b"k1"], SIZE)
    fill(cache, [b"k0", b"k2"])
    with StorageManager(cache, contend_s=TIMEOUT_S) as storage:
        task = storage.submit_prefetch_task(chain(3), SIZE)
        eventually(lambda: cache.stats().reserved == 2, "the others have their shares")
        assert storage.cancel_prefetch(task).hits == 0
        assert cache.stats().reserved == 0
        batch.abort()
    check_nothing_leaked(cache)


def test_cancel_while_loading_waits_for_a_load_that_comes_back_soon(cache: Cache) -> None:
    store = MemoryStore(chain(4))
    fill(cache, chain(1))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        task = storage.submit_prefetch_task(chain(4), SIZE)
        gate.reached()
        eventually(lambda: cache.stats().gauges.l2_loading == 3, "the load is noted")
        canceller = threading.Thread(target=storage.cancel_prefetch, args=(task,))
        canceller.start()
        eventually(lambda: cache.stats().reserved == 0, "what was granted is back at once")
        gate.open()
        canceller.join(TIMEOUT_S)
        check_idle(cache)
        assert storage.query_prefetch_status(task) == PrefetchResult(0, 0, 0, None)
        assert cache.status(chain(4)) == [OK, NOT_FOUND, NOT_FOUND, NOT_FOUND]
    check_nothing_leaked(cache)


def test_cancel_between_two_keys_gives_the_published_back_and_leaves_the_blocked_behind(cache: Cache) -> None:
    keys = chain(8)
    even, odd = alternate(keys)
    with Gate(keys[2]) as gate, StorageManager(cache, [even, odd], store=None, io_threads=1) as storage:
        even.faults["load"] = gate
        task = storage.submit_prefetch_task(keys, SIZE)
        gate.reached()
        eventually(lambda: cache.stats().reserved == 2, "two are published")
        assert cache.stats().writing > 1
        assert storage.cancel_prefetch(task) == PrefetchResult(0, 0, 0, None)  # though the load is not back
        stats = cache.stats()
        assert (stats.reserved, stats.held, stats.writing) == (0, 0, 1)
        assert cache.status(keys[:4]) == [OK, OK, IN_FLIGHT, NOT_FOUND]
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the slot is given back when its load is back")
        eventually(lambda: cache.stats().gauges.l2_loading == 0, "and counted")
        assert cache.status(keys[:4]) == [OK, OK, NOT_FOUND, NOT_FOUND]
        assert even.asked("load") == [[keys[0]], [keys[2]]]  # the others never began
    check_nothing_leaked(cache)


def test_cancel_when_finished(controller: Cache, ranks: list[Cache]) -> None:
    keys = chain(3)
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        task = storage.submit_prefetch_task(keys, SIZE, 3)
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 3
        with ranks[1].read(keys[:2]) as batch:
            for _ in range(2):  # again: nothing
                assert storage.cancel_prefetch(task) == PrefetchResult(0, 0, 0, None)
                assert shares(controller.name) == {0: (0, 0), 1: (0, 2), 2: (0, 0), 3: (0, 0)}
                assert contents(batch) == list(map(data_of, keys[:2]))
        assert storage.wait_prefetch_status(task, 0).hits == 0
        assert controller.stats().counters.prefetch_cancels == 1
    check_nothing_leaked(controller)


def test_cancel_of_what_gained_nothing(cache: Cache) -> None:
    with StorageManager(cache, [MemoryStore()], store=None) as storage:
        task = storage.submit_prefetch_task(chain(3), SIZE)
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 0
        assert storage.cancel_prefetch(task).hits == 0
    check_nothing_leaked(cache)


def test_cancel_from_several_threads(cache: Cache) -> None:
    store = MemoryStore(chain(3))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        task = storage.submit_prefetch_task(chain(3), SIZE)
        other = storage.submit_prefetch_task([], SIZE)
        gate.reached()
        results: list[PrefetchResult] = []
        threads = [threading.Thread(target=lambda: results.append(storage.cancel_prefetch(task))) for _ in range(4)]
        threads += [threading.Thread(target=lambda: results.append(storage.wait_prefetch_status(task, TIMEOUT_S)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert results == [PrefetchResult(0, 0, 0, None)] * 5
        assert cache.stats().counters.prefetch_cancels == 1
        gate.open()
        assert storage.wait_prefetch_status(other, TIMEOUT_S).hits == 0
        eventually(lambda: cache.stats().writing == 0, "the load is back")
    check_nothing_leaked(cache)


def test_an_adapter_may_cancel_its_own_request(cache: Cache) -> None:
    store = MemoryStore(chain(2))
    known: list[Any] = []
    told = threading.Event()

    def fault(request: Request) -> Any:
        assert told.wait(TIMEOUT_S)
        assert storage.cancel_prefetch(known[0]).hits == 0
        return request.go_on()

    store.faults["lookup"] = fault
    with StorageManager(cache, [store], store=None) as storage:
        known.append(storage.submit_prefetch_task(chain(2), SIZE))
        told.set()
        assert storage.wait_prefetch_status(known[0], TIMEOUT_S).hits == 0
    check_nothing_leaked(cache)


# One consumer for all


@pytest.mark.parametrize("extra_count", [0, 1, 3])
def test_one_consumer_for_all_ranks(controller: Cache, ranks: list[Cache], extra_count: int) -> None:
    del ranks
    keys = chain(3)
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        assert prefetch(storage, keys, extra_count=extra_count).hits == 3
        with storage.read_prefetched_results(keys, extra_count) as batch:
            assert contents(batch) == list(map(data_of, keys))
            stats = controller.stats()
            assert (stats.reserved, stats.held) == (3 * (1 + extra_count), 3)
        check_idle(controller)
        with storage.read_prefetched_results(keys, extra_count) as batch:  # without a prefetch: a read
            assert batch.hits == 3
    check_nothing_leaked(controller)


@pytest.mark.parametrize("leaving", ["in peace", "by an error"])
def test_the_shares_of_other_requests_stay(controller: Cache, ranks: list[Cache], leaving: str) -> None:
    keys = chain(3)
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        for extra_count in (3, 1, 3):
            assert prefetch(storage, keys, extra_count=extra_count).hits == 3
        try:
            with storage.read_prefetched_results(keys[:2], 1) as batch:
                assert batch.hits == 2
                if leaving == "by an error":
                    raise KeyboardInterrupt  # noqa: TRY301 # as of a user
        except KeyboardInterrupt:
            pass
        assert shares(controller.name) == {0: (7, 0), 1: (7, 0), 2: (6, 0), 3: (6, 0)}
        assert controller.stats().held == 0
        for _ in range(2):
            consume(ranks[0], keys)
        assert controller.stats().reserved == 20
        controller.cancel_read(keys * 3, 3)
    check_nothing_leaked(controller)


@pytest.mark.parametrize("member", ["alone", "of a group"])
def test_the_shares_of_other_requests_stay_also_where_the_consumer_has_some(join: Join, member: str) -> None:
    cache = join() if member == "alone" else join("engine", 1, RANKS)
    extra_count = 0 if member == "alone" else 1
    with StorageManager(cache, [MemoryStore(chain(2))], store=None) as storage:
        for _ in range(3):
            assert prefetch(storage, chain(2), extra_count=extra_count).hits == 2
        with storage.read_prefetched_results(chain(2), extra_count) as batch:
            assert batch.hits == 2
            assert cache.stats().reserved == 6 * (1 + extra_count)
        assert cache.stats().reserved == 4 * (1 + extra_count)
        cache.cancel_read(chain(2) * 2, extra_count)
    check_nothing_leaked(cache)


def test_a_view_that_is_still_used_keeps_its_own_shares_only(controller: Cache, ranks: list[Cache]) -> None:
    del ranks
    keys = chain(2)
    with StorageManager(controller, [MemoryStore(keys)], store=None) as storage:
        assert prefetch(storage, keys, extra_count=3).hits == 2
        assert prefetch(storage, keys, extra_count=3).hits == 2
        with pytest.raises(shmcache.ViewInUseError), storage.read_prefetched_results(keys, 3) as batch:
            array = batch.arrays()[0]
        assert shares(controller.name) == dict.fromkeys(range(RANKS), (2, 0))
        assert controller.stats().held == 2
        assert bytes(array) == data_of(keys[0])
        del array
        batch.release()
        controller.cancel_read(keys, 3)
    check_nothing_leaked(controller)


def test_keys_that_are_not_there_are_no_matter(cache: Cache) -> None:
    keys = chain(4)
    with StorageManager(cache, [MemoryStore(keys[:2])], store=None) as storage:
        assert prefetch(storage, keys).hits == 2
        with storage.read_prefetched_results(keys) as batch:
            assert batch.status == [OK, OK, NOT_FOUND, NOT_FOUND]
    check_nothing_leaked(cache)


# The end


def test_after_close(cache: Cache) -> None:
    fill(cache, chain(1))
    storage = StorageManager(cache, [store := MemoryStore(chain(2))], store=None)
    task = storage.submit_prefetch_task(chain(2), SIZE)
    result = storage.wait_prefetch_status(task, TIMEOUT_S)
    storage.close()
    storage.close()
    assert store.closed
    with pytest.raises(shmcache.ClosedError, match="closed"):
        storage.submit_prefetch_task(chain(2), SIZE)
    with pytest.raises(shmcache.ClosedError):
        storage.cancel_prefetch(task)
    with pytest.raises(shmcache.ClosedError), storage.read_prefetched_results(chain(2)):
        pytest.fail("read after close")
    assert storage.query_prefetch_status(task) == result == storage.wait_prefetch_status(task, 0)
    assert cache.stats().reserved == 2  # what a finished prefetch granted stays
    consume(cache, chain(2))
    check_nothing_leaked(cache)


def test_close_cancels_what_runs_and_what_queues(cache: Cache) -> None:
    store = MemoryStore(chain(6))
    storage = StorageManager(cache, [store], store=None, max_in_flight=2)
    with Gate() as gate:
        store.faults["load"] = gate
        tasks = [storage.submit_prefetch_task([key], SIZE) for key in chain(4)]
        gate.reached(2)
        storage.close()
        for task in tasks:
            result = storage.wait_prefetch_status(task, 0)
            assert (result.hits, result.error) == (0, "the StorageManager was closed")
        stats = cache.stats()
        assert (stats.reserved, stats.gauges.prefetch_queued, stats.gauges.prefetch_in_flight) == (0, 0, 0)
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the loads are back")
    check_nothing_leaked(cache)


def test_a_submit_that_meets_a_close_is_refused(cache: Cache) -> None:
    """Another thread closes when submit has looked whether it is open already."""

    class Keys(Sequence[bytes]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            closer = threading.Thread(target=storage.close)
            closer.start()
            closer.join()
            return chain(1)[index]

    storage = StorageManager(cache, [MemoryStore(chain(1))], store=None)
    with pytest.raises(shmcache.ClosedError):
        storage.submit_prefetch_task(Keys(), SIZE)


def test_a_cache_that_is_closed_under_its_manager(join: Join) -> None:
    cache, other = join(), join()
    fill(cache, chain(1))
    store = MemoryStore(chain(3))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["lookup"] = gate
        task = storage.submit_prefetch_task(chain(3), SIZE)
        gate.reached()
        cache.close()
        gate.open()
        result = storage.wait_prefetch_status(task, TIMEOUT_S)
        assert result.error is not None
        assert "ClosedError" in result.error
        with pytest.raises(shmcache.ClosedError):
            storage.submit_prefetch_task(chain(1), SIZE)
        with pytest.raises(shmcache.ClosedError):
            storage.cancel_prefetch(task)
    check_nothing_leaked(other)


def test_a_cache_stays_open_while_its_memory_is_being_filled(join: Join) -> None:
    cache = join()
    store = MemoryStore(chain(1))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        store.faults["load"] = gate
        task = storage.submit_prefetch_task(chain(1), SIZE)
        gate.reached()
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()
        gate.open()
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 1
    cache.close()


def test_in_a_forked_child_everything_is_closed(cache: Cache) -> None:
    store = MemoryStore(chain(2))
    with Gate() as gate, StorageManager(cache, [store], store=None) as storage:
        finished = storage.submit_prefetch_task([], SIZE)
        storage.wait_prefetch_status(finished, TIMEOUT_S)
        store.faults["load"] = gate
        running = storage.submit_prefetch_task(chain(2), SIZE)
        gate.reached()
        child = os.fork()
        if child == 0:
            doors: tuple[Callable[[], object], ...] = (
                lambda: storage.submit_prefetch_task(chain(2), SIZE),
                lambda: storage.cancel_prefetch(running),
                lambda: storage.wait_prefetch_status(running, 10),
                lambda: storage.query_prefetch_status(running),
                lambda: storage.read_prefetched_results(chain(2)).__enter__(),
            )
            for code, door in enumerate(doors, 1):
                try:
                    door()
                    os._exit(code)
                except shmcache.ClosedError:
                    continue
                except BaseException:  # noqa: BLE001 # the parent is told
                    os._exit(100 + code)
            storage.close()
            os._exit(100 if store.closed else 0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        gate.open()
        assert storage.wait_prefetch_status(running, TIMEOUT_S).hits == 2
    consume(cache, chain(2))
    check_nothing_leaked(cache)


def test_a_manager_that_is_dropped_closes_and_warns(cache: Cache) -> None:
    storage = StorageManager(cache, [store := MemoryStore(chain(1))], store=None)
    prefetch(storage, chain(1))
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del storage
    eventually(lambda: store.closed, "it closes in the background")


def test_what_is_prefetched_is_not_stored_again(cache: Cache) -> None:
    near, far = MemoryStore(name="near"), MemoryStore(chain(3), name="far")
    with StorageManager(cache, [near, far]) as storage:
        assert prefetch(storage, chain(3)).hits == 3
        assert cache.put(b"own", b"data") is OK
        storage.flush(TIMEOUT_S)
        assert list(near.objects) == [b"own"]
        assert list(far.objects) == [*chain(3), b"own"]
    cache.cancel_read(chain(3))
    check_nothing_leaked(cache)


# What the statistics say


def test_statistics_tell_the_truth(controller: Cache, ranks: list[Cache]) -> None:
    del ranks
    keys = chain(6)
    fill(controller, keys[:2])
    before = controller.stats().counters
    with StorageManager(controller, [MemoryStore(keys[:5])], store=None) as storage:
        task = storage.submit_prefetch_task(keys, SIZE, 1)
        assert storage.wait_prefetch_status(task, TIMEOUT_S) == PrefetchResult(5, 2, 3, None)
        assert prefetch(storage, keys[5:]).hits == 0
        storage.cancel_prefetch(task)
    stats = controller.stats()
    counters = stats.counters
    expected = {
        "prefetch_requests": 2,
        "prefetch_keys": 7,
        "prefetch_l1_hits": 2,
        "prefetch_l2_hits": 3,
        "prefetch_cancels": 1,
        "prefetch_contended": 0,
        "prefetch_no_space": 0,
        "prefetch_errors": 0,
        "l2_lookups": 4 + 1,
        "l2_lookup_hits": 3,
        "l2_lookup_errors": 0,
        "l2_loads": 3,
        "l2_loaded_bytes": 3 * SIZE,
        "l2_load_misses": 0,
        "l2_load_errors": 0,
        "l2_timeouts": 0,
        "l2_stores": 0,
        "grants": 10,
        "reserved_returned": 10,
    }
    assert {name: getattr(counters, name) for name in expected} == expected
    assert counters.reservations - before.reservations == 3
    assert counters.publishes - before.publishes == 3
    assert counters.aborts == 0
    times = stats.histograms
    counted = {name: getattr(times, name).count for name in times.__slots__}
    assert counted == {
        "prefetch_queue": 2,
        "prefetch_first_key": 1,
        "prefetch_total": 2,
        "l2_lookup": 2,
        "l2_load": 1,
        "l2_store": 0,
    }
    assert 0 < times.prefetch_first_key.sum_s <= times.prefetch_total.sum_s < TIMEOUT_S
    assert controller.stats().counters.read_hits == 0  # nobody read
    check_nothing_leaked(controller)
