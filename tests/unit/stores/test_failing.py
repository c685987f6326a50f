"""What becomes of a store where an L2 fails or hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    Request,
    answers,
    chain,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    raises,
)
from store_support import (
    EXISTS,
    LOCKED,
    NO_SPACE,
    OK,
    SHORT_S,
    TRIES,
    by_publish,
    check_has,
    counted,
    once,
    stored,
)

from shmcache import Cache, Status
from shmcache.storage import StorageManager

# An L2 that fails


@pytest.mark.parametrize("method", ["lookup", "store"])
def test_what_fails_is_tried_again(cache: Cache, method: str) -> None:
    store, failures = MemoryStore(), [1, 2]

    def twice(request: Request) -> Any:
        if failures:
            raise OSError(f"failure {failures.pop()}")
        return request.go_on()

    with StorageManager(cache, [store]) as storage:
        store.faults[method] = twice
        by_publish(cache, chain(3))
        storage.flush(TIMEOUT_S)
    check_has(store, chain(3))
    assert store.asked(method) == [chain(3)] * 3
    assert len(store.asked("lookup" if method == "store" else "store")) == 1
    assert counted(cache, "stores", "store_retries", "store_errors") == (3, 6, 0)
    check_nothing_leaked(cache)


def test_what_fails_for_ever_is_given_up(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """And tried once only from then on, until it works again: who publishes is not held up by a dead L2."""
    caplog.set_level(logging.WARNING, "shmcache")
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        store.faults["store"] = raises(OSError("refused"))
        for key, tries in ((b"first", TRIES), (b"second", TRIES + 1), (b"third", TRIES + 2)):
            fill(cache, [key])
            storage.flush(TIMEOUT_S)
            assert len(stored(store)) == tries
        assert counted(cache, "stores", "store_retries", "store_errors") == (0, TRIES - 1, 3)
        store.faults.clear()
        fill(cache, [b"fourth"])
        storage.flush(TIMEOUT_S)
        check_has(store, [b"fourth"])
        store.faults["store"] = once(raises(OSError("again")))
        fill(cache, [b"fifth"])
        storage.flush(TIMEOUT_S)
    check_has(store, [b"fourth", b"fifth"])
    assert counted(cache, "stores", "store_retries", "store_errors") == (2, TRIES, 3)
    begins, works = (record.getMessage() for record in caplog.records)  # once each, however many fail
    assert begins == "1 objects are not stored to L2: <MemoryStore memory>: OSError: refused"
    assert works.startswith("stores to L2 work again: <MemoryStore memory>")
    check_nothing_leaked(cache)


def test_only_what_was_not_stored_is_tried_again(cache: Cache) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        store.faults["store"] = once(lambda request: [*request.go_on()[:-2], LOCKED, Status.LOST])
        by_publish(cache, chain(5))
        storage.flush(TIMEOUT_S)
    assert store.asked("store") == [chain(5), chain(5)[3:]]
    assert counted(cache, "stores", "stored_bytes", "store_retries", "store_errors") == (5, 5 * SIZE, 2, 0)
    check_nothing_leaked(cache)


class Contrary:
    """What raises wherever one looks at it."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __bool__(self) -> bool:
        raise RuntimeError("neither yes nor no")

    __hash__ = None  # type: ignore[assignment] # as it is with __eq__


class Short(list[Any]):
    """A list that cannot be counted."""

    def __len__(self) -> int:
        raise RuntimeError("no length")


NONSENSE: dict[str, Callable[[list[Any]], Any]] = {
    "None": lambda _: None,
    "nothing": lambda _: [],
    "too few": lambda answer: answer[:-1],
    "too many": lambda answer: [*answer, answer[0]],
    "text": lambda answer: "y" * len(answer),
    "a generator": iter,
    "Nones": lambda answer: [None] * len(answer),
    "ints": lambda answer: [0] * len(answer),
    "arrays": lambda answer: [np.ones(2, bool)] * len(answer),
    "contrary ones": lambda answer: [Contrary()] * len(answer),
    "what has no length": Short,
    "the other kind": lambda answer: [False if isinstance(answer[0], Status) else OK] * len(answer),
}


@pytest.mark.parametrize("method", ["lookup", "store"])
@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_is_a_failure(cache: Cache, method: str, change: str) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        store.faults[method] = once(answers(NONSENSE[change]))
        by_publish(cache, chain(3))
        storage.flush(TIMEOUT_S)
        assert store.asked(method) == [chain(3)] * 2
        assert counted(cache, "stores", "store_retries", "store_errors") == (3, 3, 0)
    check_has(store, chain(3))
    check_nothing_leaked(cache)


@pytest.mark.parametrize("method", ["lookup", "store"])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(), MemoryError()])
def test_whatever_is_raised_is_a_failure(cache: Cache, method: str, error: BaseException) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        store.faults[method] = once(raises(error))
        fill(cache, chain(1))
        storage.flush(TIMEOUT_S)
        check_has(store, chain(1))
    assert counted(cache, "stores", "store_retries", "store_errors") == (1, 1, 0)
    check_nothing_leaked(cache)


@pytest.mark.parametrize(("status", "counter"), [(NO_SPACE, "store_no_space"), (EXISTS, "store_skips")])
def test_no_space_and_exists_are_final(cache: Cache, status: Status, counter: str) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        store.faults["store"] = answers(lambda answer: [status, *answer[1:]])
        by_publish(cache, chain(3))
        storage.flush(TIMEOUT_S)
    assert store.asked("store") == [chain(3)]
    assert counted(cache, "stores", counter, "store_retries", "store_errors") == (2, 1, 0, 0)
    check_nothing_leaked(cache)


def test_one_that_fails_costs_the_others_nothing(cache: Cache) -> None:
    bad, good = MemoryStore(name="bad"), MemoryStore(name="good")
    bad.faults["store"] = raises(OSError("refused"))
    with StorageManager(cache, [bad, good]) as storage:
        by_publish(cache, chain(3))
        storage.flush(TIMEOUT_S)
    check_has(good, chain(3))
    assert counted(cache, "stores", "store_errors") == (3, 3)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("made", [lambda view: view[:10], np.asarray], ids=["slice", "array"])
def test_an_adapter_that_keeps_a_view_keeps_its_share(
    join: Join, caplog: pytest.LogCaptureFixture, made: Callable[[memoryview], Any]
) -> None:
    cache, store, kept = join(), MemoryStore(), []

    def keep(request: Request) -> Any:
        kept.append(made(request.views[0]))
        return request.go_on()

    with StorageManager(cache, [store]) as storage:
        store.faults["store"] = keep
        fill(cache, chain(1))
        storage.flush(TIMEOUT_S)
        assert "an L2 adapter kept a view after store()" in caplog.text
        assert cache.delete(chain(1), force=True) == [LOCKED]
        assert bytes(kept[0])[:10] == data_of(b"k0")[:10]
        store.faults.clear()
        fill(cache, [b"next"])
        storage.flush(TIMEOUT_S)
        kept.clear()
        eventually(lambda: cache.stats().held == 0, "the share is back when the view is gone")
    check_has(store, [b"k0", b"next"])
    check_nothing_leaked(cache)


def test_an_adapter_that_releases_the_views_costs_the_others_nothing(cache: Cache) -> None:
    def release(request: Request) -> Any:
        answer = request.go_on()
        for view in request.views:
            view.release()
        return answer

    tidy, other = MemoryStore(name="tidy"), MemoryStore(name="other")
    with Gate() as gate, StorageManager(cache, [tidy, other]) as storage:
        tidy.faults["store"] = release
        other.faults["lookup"] = gate  # so that it comes second
        by_publish(cache, chain(3))
        eventually(lambda: len(tidy.objects) == 3, "the first has them")
        gate.open()
        storage.flush(TIMEOUT_S)
    check_has(tidy, chain(3))
    check_has(other, chain(3))
    assert counted(cache, "stores", "stored_bytes", "store_errors") == (6, 6 * SIZE, 0)
    check_nothing_leaked(cache)


class ListEater(MemoryStore):
    """Takes its work off the lists that it is given."""

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        assert isinstance(keys, list)
        answer = super().lookup(keys)
        keys.clear()
        return answer

    def store(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        assert isinstance(keys, list)
        assert isinstance(views, list)
        answer = super().store(keys, views)
        keys.clear()
        views.clear()
        return answer


def test_an_adapter_may_change_the_lists_it_is_given(cache: Cache) -> None:
    stores = [ListEater(), ListEater()]
    with StorageManager(cache, stores) as storage:
        by_publish(cache, chain(3))
        storage.flush(TIMEOUT_S)
    for store in stores:
        check_has(store, chain(3))
    assert counted(cache, "stores", "stored_bytes", "store_retries", "store_errors") == (6, 6 * SIZE, 0, 0)
    check_nothing_leaked(cache)


def test_an_adapter_may_publish(cache: Cache) -> None:
    """What it publishes is stored, too."""
    store = MemoryStore()

    def publish(request: Request) -> Any:
        if request.keys == [b"k0"]:
            fill(cache, [b"more"])
        return request.go_on()

    store.faults["store"] = publish
    with StorageManager(cache, [store]) as storage:
        fill(cache, chain(1))
        storage.flush(TIMEOUT_S)
    check_has(store, [b"k0", b"more"])
    check_nothing_leaked(cache)


def test_where_no_thread_can_be_started(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published stays published, nothing is held for ever, and the next is stored."""
    store = MemoryStore()
    with StorageManager(cache, [store], l2_timeout_s=SHORT_S) as storage:
        with monkeypatch.context() as patch:

            def refuse(thread: threading.Thread) -> None:
                del thread
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refuse)
            try:
                status = cache.put(b"k0", data_of(b"k0"))
            except RuntimeError:  # its frames would hold the object
                status = None
        assert status is OK
        storage.flush(TIMEOUT_S)
        assert cache.stats().held == 0
        assert counted(cache, "store_drops") == (1,)
        storage.store(chain(1))
        fill(cache, [b"k1"])
        storage.flush(TIMEOUT_S)
    check_has(store, chain(2))
    check_nothing_leaked(cache)


# An L2 that hangs


def test_who_publishes_does_not_wait_for_one_that_hangs(cache: Cache) -> None:
    store, keys = MemoryStore(), chain(40)
    with Gate() as gate, StorageManager(cache, [store], l2_timeout_s=SHORT_S, backlog=4 * SIZE) as storage:
        store.faults["store"] = gate
        fill(cache, keys)
        stats = cache.stats()
        assert (stats.held, stats.gauges.l2_backlog_bytes) == (1, SIZE)  # what it is at; no more
        assert counted(cache, "store_drops") == (39,)
        gate.open()
        eventually(lambda: cache.stats().held == 0, "the call is back")
        store.faults.clear()
        check_has(store, keys[:1])
        storage.store(keys)
        storage.flush(TIMEOUT_S)
    check_has(store, keys)
    assert counted(cache, "stores", "store_errors") == (40, 0)
    check_nothing_leaked(cache)


def test_one_that_hangs_does_not_starve_the_others(cache: Cache) -> None:
    hung, sound, keys = MemoryStore(name="hung"), MemoryStore(name="sound"), chain(100)
    with Gate() as gate, StorageManager(cache, [hung, sound], l2_timeout_s=SHORT_S, backlog=8 * SIZE):
        hung.faults["store"] = gate
        for key in keys:
            fill(cache, [key])
        eventually(lambda: len(sound.objects) == 100, "the sound one gets all")
        gate.open()
        eventually(lambda: cache.stats().held == 0, "the call is back")
    check_has(sound, keys)
    assert counted(cache, "stores", "store_errors") == (100 + len(hung.objects), 0)
    check_nothing_leaked(cache)


def test_what_one_that_hangs_does_not_get_is_counted(cache: Cache) -> None:
    hung, sound, keys = MemoryStore(name="hung"), MemoryStore(name="sound"), chain(30)
    with Gate() as gate, StorageManager(cache, [hung, sound], l2_timeout_s=SHORT_S, backlog=8 * SIZE):
        hung.faults["store"] = gate
        for key in keys:
            fill(cache, [key])
        gate.open()
        eventually(lambda: cache.stats().held == 0, "the call is back")
    stores, drops = counted(cache, "stores", "store_drops")
    assert stores + drops == 60


def test_one_that_fails_does_not_starve_a_slow_one(cache: Cache) -> None:
    failing, slow, keys = MemoryStore(name="failing"), MemoryStore(name="slow"), chain(60)
    with StorageManager(cache, [failing, slow], l2_timeout_s=TIMEOUT_S, backlog=4 * SIZE) as storage:
        failing.faults["store"] = raises(OSError("refused"))
        slow.faults["store"] = lambda request: (threading.Event().wait(0.005), request.go_on())[1]
        for key in keys:
            fill(cache, [key])
        storage.flush(TIMEOUT_S)
    check_has(slow, keys)
    assert counted(cache, "store_drops", "store_errors") == (0, 60)
    check_nothing_leaked(cache)


def test_a_slow_one_that_makes_headway_is_not_given_up(cache: Cache) -> None:
    """All of it takes longer than l2_timeout_s, but no call of the adapter does."""
    store, keys = MemoryStore(), chain(100)
    storage = StorageManager(cache, [store], store=None, l2_timeout_s=0.5)
    fill(cache, keys)
    store.faults["store"] = lambda request: (threading.Event().wait(0.15), request.go_on())[1]
    storage.store(keys)
    storage.close()
    check_has(store, keys)
    check_nothing_leaked(cache)


def test_flush_gives_up_what_hangs(cache: Cache) -> None:
    hung, sound = MemoryStore(name="hung"), MemoryStore(name="sound")
    with Gate() as gate, StorageManager(cache, [hung, sound], l2_timeout_s=SHORT_S) as storage:
        hung.faults["store"] = gate
        fill(cache, chain(3))
        gate.reached()
        storage.flush(TIMEOUT_S)
        check_has(sound, chain(3))
        assert cache.stats().held == 1  # what it is at
        gate.open()
    check_nothing_leaked(cache)


def test_what_waits_behind_one_that_hangs_is_given_up_though_nobody_publishes(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store], l2_timeout_s=SHORT_S) as storage:
        store.faults["lookup"] = gate
        fill(cache, chain(4))
        gate.reached()
        storage.flush(TIMEOUT_S)
        assert cache.stats().held == 1
        assert cache.delete(chain(4)) == [LOCKED, OK, OK, OK]
        assert counted(cache, "store_drops") == (3,)
        gate.open()
    check_nothing_leaked(cache)
