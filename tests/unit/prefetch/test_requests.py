"""Several adapters, several requests at once, query and wait, the order in which keys become readable, room."""

from __future__ import annotations

import threading

import pytest
from arena_support import TIMEOUT_S, Join, contents
from prefetch_support import IN_FLIGHT, OK, TINY, consume, prefetch
from storage_support import (
    BLOCK,
    SIZE,
    Gate,
    MemoryStore,
    alternate,
    chain,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    shares,
)

from shmcache import Cache
from shmcache.storage import PrefetchResult, StorageManager

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
