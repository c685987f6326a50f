"""Keys that another writer has in hand."""

from __future__ import annotations

import threading

import pytest
from arena_support import TIMEOUT_S, Join, started
from prefetch_support import OK, consume, prefetch
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    alternate,
    chain,
    check_nothing_leaked,
    data_of,
    eventually,
)

from shmcache import ArenaConfig, Cache, Status
from shmcache.storage import PrefetchResult, StorageManager

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
