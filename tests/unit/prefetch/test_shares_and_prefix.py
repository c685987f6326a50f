"""What may be passed to a prefetch, one share a rank, the longest prefix, layouts and temporary objects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents
from prefetch_support import NOT_FOUND, OK, RANKS, consume, prefetch
from storage_support import (
    SIZE,
    MemoryStore,
    alternate,
    chain,
    check_idle,
    check_nothing_leaked,
    data_of,
    fill,
    shares,
)

from shmcache import Cache, Layout, Status
from shmcache.storage import PrefetchResult, StorageManager

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
