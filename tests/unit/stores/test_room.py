"""Back-pressure, and several threads that publish."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import Any

import pytest
from arena_support import TIMEOUT_S, run_all
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    Request,
    chain,
    check_idle,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    raises,
)
from store_support import (
    JOB_KEYS,
    OK,
    SHORT_S,
    WIDE,
    by_finish_write,
    by_publish,
    by_put,
    check_has,
    counted,
    quietly,
    stored,
    write,
)

from shmcache import Cache
from shmcache.storage import StorageManager

# Room


def test_the_backlog_has_a_limit(cache: Cache) -> None:
    store, keys, most = MemoryStore(), chain(60), []

    def look(request: Request) -> Any:
        most.append(cache.stats().gauges.l2_backlog_bytes)
        return request.go_on()

    store.faults["store"] = look
    with StorageManager(cache, [store], backlog=3 * SIZE) as storage:
        run_all([partial(fill, cache, keys[part::4]) for part in range(4)])
        storage.flush(TIMEOUT_S)
    check_has(store, keys)
    assert SIZE <= max(most) <= 3 * SIZE
    assert counted(cache, "store_drops") == (0,)
    check_nothing_leaked(cache)


def test_who_publishes_beyond_the_backlog_waits(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store], backlog=SIZE, l2_timeout_s=TIMEOUT_S) as storage:
        store.faults["store"] = gate
        fill(cache, [b"k0"])
        gate.reached()
        publisher = threading.Thread(target=fill, args=(cache, [b"k1"]))
        publisher.start()
        eventually(lambda: cache.stats().held == 2, "it has published, and holds")
        assert publisher.is_alive()
        assert cache.lookup(chain(2)) == 2  # others read it already
        assert len(store.asked("lookup")) == 1
        gate.open()
        publisher.join()
        storage.flush(TIMEOUT_S)
    check_has(store, chain(2))
    check_nothing_leaked(cache)


@pytest.mark.parametrize("backlog", [1, SIZE - 1])
def test_what_is_larger_than_the_backlog_is_stored_alone(cache: Cache, backlog: int) -> None:
    store, keys, held = MemoryStore(), chain(40), []

    def look(request: Request) -> Any:
        held.append(cache.stats().gauges.l2_backlog_bytes)
        return request.go_on()

    store.faults["store"] = look
    with StorageManager(cache, [store], backlog=backlog) as storage:
        fill(cache, keys[:5])
        by_publish(cache, keys[5:])
        storage.flush(TIMEOUT_S)
    check_has(store, keys)
    assert held == [nkeys * SIZE for nkeys in map(len, store.asked("store"))]  # one job at a time
    assert counted(cache, "store_drops") == (0,)
    check_nothing_leaked(cache)


def test_the_default_backlog_is_an_eighth_of_the_arena(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store], l2_timeout_s=TIMEOUT_S) as storage:
        store.faults["lookup"] = gate
        fill(cache, chain(2), 1 << 16)  # of 1 MiB
        gate.reached()
        publisher = threading.Thread(target=fill, args=(cache, [b"beyond"]))
        publisher.start()
        eventually(lambda: cache.stats().held == 3, "it has published, and holds")
        assert cache.stats().gauges.l2_backlog_bytes == 1 << 17
        gate.open()
        publisher.join()
        storage.flush(TIMEOUT_S)
    assert sorted(store.objects) == [b"beyond", *chain(2)]
    check_nothing_leaked(cache)


def test_a_dead_l2_makes_nobody_wait_for_room(cache: Cache) -> None:
    store, keys = MemoryStore(), chain(100)
    store.faults["lookup"] = raises(OSError("refused"))
    with StorageManager(cache, [store], backlog=2 * SIZE, l2_timeout_s=1e6) as storage:
        for key in keys:
            fill(cache, [key])
        storage.flush(TIMEOUT_S)
        drops, errors = counted(cache, "store_drops", "store_errors")
        assert drops + errors == 100
        check_idle(cache)
        store.faults.clear()
        storage.store(keys[:1])
        storage.flush(TIMEOUT_S)
    check_has(store, keys[:1])
    check_nothing_leaked(cache)


def test_what_was_dropped_can_be_stored_later(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store], backlog=SIZE, l2_timeout_s=SHORT_S) as storage:
        store.faults["store"] = gate
        fill(cache, chain(2))
        assert counted(cache, "store_drops") == (1,)
        gate.open()
        eventually(lambda: cache.stats().held == 0, "the call is back")
        storage.store(chain(2))
        storage.flush(TIMEOUT_S)
    check_has(store, chain(2))
    assert stored(store) == chain(2)


# Several threads


def test_what_is_published_while_a_store_of_it_waits_for_room_is_stored(cache: Cache) -> None:
    store = MemoryStore()
    with Gate(b"first") as gate, StorageManager(cache, [store], backlog=SIZE, l2_timeout_s=TIMEOUT_S) as storage:
        store.faults["store"] = gate
        fill(cache, [b"first"])
        gate.reached()
        late = write(cache, [b"late"])
        quietly(cache, storage, [b"there"])
        names_both = threading.Thread(target=storage.store, args=([b"there", b"late"],))
        names_both.start()
        eventually(lambda: cache.stats().held == 2, "it holds what is there, and waits for room")
        publishes = threading.Thread(target=late.publish)
        publishes.start()
        eventually(lambda: cache.status([b"late"]) == [OK], "it is published")
        gate.open()
        names_both.join()
        publishes.join()
        storage.flush(TIMEOUT_S)
    check_has(store, [b"first", b"there", b"late"])
    check_nothing_leaked(cache)


def test_a_store_of_what_is_just_published_loses_nothing(cache: Cache, hasty_switches: None) -> None:
    del hasty_switches
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        for key in chain(300):
            batch = write(cache, [key], 64)
            run_all([partial(storage.store, [key]), batch.publish])
            storage.flush(TIMEOUT_S)
            assert stored(store)[-1:] == [key], "lost"
            assert len(store.asked("store")) == 1, "doubled"
            assert cache.delete([key]) == [OK]
            store.calls.clear()
    check_has(store, chain(300), 64)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [WIDE])
@pytest.mark.parametrize("backlog", ["64KiB", "4MiB"])
def test_many_publishers_lose_nothing_and_double_nothing(cache: Cache, hasty_switches: None, backlog: str) -> None:
    del hasty_switches
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    stores = [MemoryStore(), MemoryStore()]
    keys = [chain(100, f"{thread}.") for thread in range(6)]

    with StorageManager(cache, stores, backlog=backlog, l2_timeout_s=TIMEOUT_S) as storage:

        def publish(thread: int) -> None:
            rng, mine = random.Random(seed + thread), keys[thread]
            at = 0
            while at < len(mine):
                n = rng.randint(1, 25)
                rng.choice([by_put, by_publish, by_finish_write])(cache, mine[at : at + n])
                at += n
                storage.store(rng.sample(rng.choice(keys), 5))
                if rng.random() < 0.1:
                    storage.flush(TIMEOUT_S)

        run_all([partial(publish, thread) for thread in range(6)])
        storage.flush(TIMEOUT_S)
        check_idle(cache)
    everything = [key for part in keys for key in part]
    for store in stores:
        check_has(store, everything)
        assert stored(store) == sorted(everything)
        assert max(map(len, store.asked("store"))) <= JOB_KEYS
    assert counted(cache, "stores", "stored_bytes", "store_drops") == (1200, 1200 * SIZE, 0)
    check_nothing_leaked(cache)


def test_objects_that_are_evicted_meanwhile_are_right_or_not_stored(cache: Cache, hasty_switches: None) -> None:
    """The arena has room for a tenth; who publishes and who evicts race with who holds."""
    del hasty_switches
    store, keys = MemoryStore(), chain(1000)
    with StorageManager(cache, [store], backlog="128KiB", l2_timeout_s=TIMEOUT_S) as storage:

        def publish(part: int) -> None:
            for key in keys[part::4]:
                if cache.put(key, data_of(key)) is OK:
                    cache.evict(SIZE)

        run_all([partial(publish, part) for part in range(4)])
        storage.flush(TIMEOUT_S)
        check_idle(cache)
    check_has(store, sorted(store.objects))
    assert len(store.objects) > 100
    assert stored(store) == sorted(store.objects)
    check_nothing_leaked(cache)
