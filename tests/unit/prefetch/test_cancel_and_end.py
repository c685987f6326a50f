"""Cancel at every stage, one consumer for all, the end of a manager, what the statistics say."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, contents
from prefetch_support import IN_FLIGHT, NOT_FOUND, OK, RANKS, consume, prefetch
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    Request,
    alternate,
    chain,
    check_idle,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    shares,
)

import shmcache
from shmcache import Cache
from shmcache.storage import PrefetchResult, StorageManager

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
