"""Flush, and the end."""

from __future__ import annotations

import gc
import logging
import os
import threading
from functools import partial
from typing import Any

import pytest
from arena_support import TIMEOUT_S, Join, run_all
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    Request,
    chain,
    check_idle,
    check_nothing_leaked,
    eventually,
    fill,
    raises,
)
from store_support import (
    SHORT_S,
    check_has,
    counted,
    once,
    stored,
    write,
)

import shmcache
from shmcache import Cache
from shmcache.storage import StorageManager

# Flush


def test_flush_says_what_is_not_finished_in_time(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store]) as storage:
        storage.flush()
        storage.flush(0)
        store.faults["store"] = gate
        fill(cache, chain(3))
        for timeout_s in (0, 0.01):
            with pytest.raises(TimeoutError, match=f"3 stores to L2 are not finished after {timeout_s:g} s"):
                storage.flush(timeout_s)
        gate.open()
        storage.flush()
        check_has(store, chain(3))


@pytest.mark.parametrize(
    ("timeout_s", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_flush_checks_its_timeout(cache: Cache, timeout_s: Any, error: type[Exception]) -> None:
    with StorageManager(cache, [MemoryStore()]) as storage, pytest.raises(error, match="timeout_s: expected"):
        storage.flush(timeout_s)


def test_flush_from_several_threads(cache: Cache) -> None:
    store, late = MemoryStore(), []
    with Gate() as gate, StorageManager(cache, [store], backlog="1MiB") as storage:
        store.faults["store"] = gate
        fill(cache, chain(10))

        def flush() -> None:
            storage.flush(TIMEOUT_S)
            late.append(len(store.objects))

        def give_up() -> None:
            with pytest.raises(TimeoutError):
                storage.flush(0.02)
            gate.open()

        run_all([flush, flush, give_up, flush, flush])
    assert late == [10] * 4
    check_nothing_leaked(cache)


# The end


def test_close_finishes_what_waits(cache: Cache) -> None:
    store = MemoryStore()
    storage = StorageManager(cache, [store], backlog="1MiB")
    with Gate() as gate:
        store.faults["store"] = gate
        fill(cache, chain(50))
        gate.reached()
        closer = threading.Thread(target=storage.close)
        closer.start()
        eventually(lambda: "closed" in repr(storage), "it begins to close")
        fill(cache, [b"late"])
        closed_early = store.closed
        gate.open()
        closer.join()
    assert (closed_early, store.closed) == (False, True)
    store.objects.pop(b"late", None)  # told or not: it came when the manager was closing
    check_has(store, chain(50))
    check_nothing_leaked(cache)


def test_close_tries_again_what_fails(cache: Cache) -> None:
    store = MemoryStore()
    store.faults["store"] = once(raises(OSError("a moment please")))
    storage = StorageManager(cache, [store])
    fill(cache, chain(1))
    storage.close()
    check_has(store, chain(1))
    check_nothing_leaked(cache)


def test_close_again_and_after_it(cache: Cache) -> None:
    storage = StorageManager(cache, [store := MemoryStore()])
    storage.close()
    storage.close()
    for door in (partial(storage.store, chain(1)), storage.flush):
        with pytest.raises(shmcache.ClosedError, match="closed"):
            door()
    fill(cache, chain(1))
    assert store.calls == []
    check_nothing_leaked(cache)


def test_after_the_cache_is_closed(join: Join) -> None:
    cache, store = join(), MemoryStore()
    with StorageManager(cache, [store]) as storage:
        fill(cache, chain(1))
        storage.flush(TIMEOUT_S)
        cache.close()
        for door in (partial(storage.store, chain(1)), storage.flush):
            with pytest.raises(shmcache.ClosedError):
                door()


def test_the_cache_stays_open_while_something_is_on_its_way(join: Join) -> None:
    cache, store = join(), MemoryStore()
    with Gate() as gate, StorageManager(cache, [store]):
        store.faults["store"] = gate
        fill(cache, chain(1))
        gate.reached()
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()
        gate.open()
    cache.close()
    check_has(store, chain(1))


def test_close_does_not_wait_for_one_that_hangs(join: Join) -> None:
    cache, store = join(), MemoryStore()
    with Gate() as gate:
        store.faults["store"] = gate
        storage = StorageManager(cache, [store], l2_timeout_s=SHORT_S)
        fill(cache, chain(5))
        gate.reached()
        storage.close()
        assert store.closed
        assert cache.stats().held == 1
        assert counted(cache, "store_drops") == (4,)
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()
        gate.open()
        eventually(lambda: cache.stats().held == 0, "it is back, and so is the share")
    check_idle(cache)
    assert [len(store.asked(method)) for method in ("lookup", "store")] == [1, 1]
    cache.close()


def test_a_look_up_that_hangs_beyond_the_close_is_the_last_call(cache: Cache) -> None:
    """Its adapter is closed already when it comes back."""
    store = MemoryStore()
    with Gate() as gate:
        store.faults["lookup"] = gate
        storage = StorageManager(cache, [store], l2_timeout_s=SHORT_S)
        fill(cache, chain(1))
        gate.reached()
        storage.close()
        gate.open()
        eventually(lambda: cache.stats().held == 0, "it is back, and so is the share")
    assert stored(store) == []
    check_idle(cache)


def test_close_finishes_the_others_where_one_hangs(cache: Cache) -> None:
    hung, sound = MemoryStore(name="hung"), MemoryStore(name="sound")

    def slowly(request: Request) -> Any:
        assert not sound.closed
        threading.Event().wait(0.05)
        return request.go_on()

    with Gate() as gate:
        hung.faults["store"] = gate
        sound.faults["store"] = slowly
        storage = StorageManager(cache, [hung, sound], l2_timeout_s=SHORT_S, backlog="1MiB")
        for key in chain(20):
            fill(cache, [key])
        storage.close()
        check_has(sound, chain(20))
        assert (hung.closed, sound.closed) == (True, True)
        assert cache.stats().held == 1
        gate.open()
        eventually(lambda: cache.stats().held == 0, "it is back, and so is the share")
    check_has(hung, chain(1))
    check_nothing_leaked(cache)


def test_close_lets_go_who_waits_for_room(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate:
        store.faults["store"] = gate
        storage = StorageManager(cache, [store], backlog=SIZE, l2_timeout_s=TIMEOUT_S)
        fill(cache, chain(1))
        gate.reached()
        publisher = threading.Thread(target=fill, args=(cache, [b"waits"]))
        publisher.start()
        eventually(lambda: cache.stats().held == 2, "it waits for room")
        closer = threading.Thread(target=storage.close)
        closer.start()
        publisher.join()  # before the store is over
        assert counted(cache, "store_drops") == (1,)
        gate.open()
        closer.join()
    check_has(store, chain(1))
    check_nothing_leaked(cache)


def test_close_from_several_threads(cache: Cache) -> None:
    store = MemoryStore()
    storage = StorageManager(cache, [store], backlog="1MiB")
    fill(cache, chain(50))
    run_all([storage.close] * 4)
    eventually(lambda: store.closed, "one of them closes")
    check_has(store, chain(50))
    check_nothing_leaked(cache)


def test_close_while_others_publish(cache: Cache, hasty_switches: None) -> None:
    del hasty_switches
    for round_ in range(20):
        keys, store = chain(40, f"{round_}."), MemoryStore()
        storage = StorageManager(cache, [store], backlog="256KiB")
        run_all([storage.close, *(partial(fill, cache, keys[part::4], 64) for part in range(4))])
        check_idle(cache)
        check_has(store, sorted(store.objects), 64)
        assert stored(store) == sorted(store.objects)
        cache.clear()


def test_in_a_forked_child_close_does_nothing(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store]) as storage:
        store.faults["store"] = gate
        fill(cache, chain(2))
        gate.reached()
        batch = write(cache, [b"unfinished"])
        child = os.fork()
        if child == 0:
            doors = (
                lambda: storage.store(chain(1)),
                lambda: storage.flush(10),
                lambda: cache.put(b"child", b"x"),
                batch.publish,
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
            del storage, batch
            gc.collect()
            os._exit(100 if store.closed else 0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert cache.stats().held == 2
        batch.publish()
        gate.open()
        storage.flush(TIMEOUT_S)
    check_has(store, [*chain(2), b"unfinished"])
    check_nothing_leaked(cache)


def test_one_that_is_dropped_finishes_and_warns(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate:
        store.faults["store"] = gate
        storage = StorageManager(cache, [store])
        fill(cache, chain(3))
        gate.reached()
        with pytest.warns(ResourceWarning, match="dropped without close"):
            del storage
        assert not store.closed
        gate.open()
        eventually(lambda: store.closed, "it closes in the background")
    check_has(store, chain(3))
    assert not cache._attachment.listeners
    check_nothing_leaked(cache)


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
def test_one_in_a_cycle_may_be_collected_in_a_thread_that_stores(cache: Cache) -> None:
    """There nobody may wait for its end: that thread is what the end waits for."""
    store = MemoryStore()
    cycle: list[object] = []
    gc.disable()
    try:
        with Gate(then=lambda request: (gc.collect(), request.go_on())[1]) as gate:
            storage = StorageManager(cache, [store], l2_timeout_s=TIMEOUT_S)
            store.faults["store"] = gate
            fill(cache, chain(1))
            gate.reached()
            cycle += [storage, cycle]
            del storage, cycle
            gate.open()
            eventually(lambda: store.closed, "it closes")
    finally:
        gc.enable()
    check_has(store, chain(1))
    assert counted(cache, "stores", "store_errors") == (1, 0)
    check_nothing_leaked(cache)


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
def test_one_in_a_cycle_may_be_collected_by_its_prefetch_loop(cache: Cache) -> None:
    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            del record
            where.append(threading.current_thread().name)
            gc.collect()

    where: list[str] = []
    logger, handler = logging.getLogger("shmcache.storage"), Collects()
    store = MemoryStore()
    cycle: list[object] = []
    gc.disable()
    try:
        logger.addHandler(handler)
        with Gate(then=raises(OSError("refused"))) as gate:  # the loop logs it
            storage = StorageManager(cache, [store])
            store.faults["lookup"] = gate
            task = storage.submit_prefetch_task(chain(1), SIZE)
            gate.reached()
            cycle += [storage, cycle]
            del storage, cycle
            gate.open()
            assert task.over.wait(TIMEOUT_S)
            eventually(lambda: store.closed, "it closes")
        assert where == ["shmcache-prefetch"]
    finally:
        logger.removeHandler(handler)
        gc.enable()
    check_nothing_leaked(cache)


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
def test_one_in_a_cycle_may_be_collected_by_who_has_the_queues_lock(cache: Cache) -> None:
    """Anything that allocates may collect: here the look at what is published."""
    store = MemoryStore()
    cycle: list[object] = []
    storage = StorageManager(cache, [store], l2_timeout_s=TIMEOUT_S)
    queue = storage._stores
    gc.disable()
    try:
        with queue._changed:
            cycle += [storage, cycle]
            del storage, cycle
            fill(cache, chain(1))
            gc.collect()
        eventually(lambda: store.closed, "it closes")
    finally:
        gc.enable()
    check_has(store, chain(1))
    check_nothing_leaked(cache)


def test_an_adapter_whose_close_raises_is_its_own_matter(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryStore):
        def close(self) -> None:
            super().close()
            raise OSError("connection reset")

    stores = [Broken(), MemoryStore()]
    with StorageManager(cache, stores):
        fill(cache, chain(1))
    assert [store.closed for store in stores] == [True, True]
    assert "an L2 could not be closed" in caplog.text
    check_nothing_leaked(cache)


def test_where_one_adapter_cannot_be_bound_none_stays_open(cache: Cache) -> None:
    class Unbound(MemoryStore):
        def bind(self, payload: memoryview, count: Any) -> None:  # noqa: ARG002 # the protocol's
            raise RuntimeError("no memory can be registered")

    stores = [MemoryStore(), Unbound(), MemoryStore()]
    with pytest.raises(RuntimeError, match="no memory can be registered"):
        StorageManager(cache, stores)
    assert [store.closed for store in stores] == [True, True, False]  # the last was not touched
