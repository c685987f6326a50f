"""Prefetch from an L2 that fails: it raises, hangs, answers nonsense, lies, keeps what is not its own.

Whatever it does costs the request what could not be served, and nobody else anything: no share, no slot, no block is
lost, the next request is served, and what went wrong is in the result and in the counters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents
from storage_support import (
    SIZE,
    Fault,
    Gate,
    MemoryStore,
    Request,
    alternate,
    answers,
    chain,
    check_idle,
    check_no_thread_stays,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    raises,
)

import shmcache
from shmcache import Cache, Status
from shmcache.storage import PrefetchResult, StorageManager

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT

KEYS = chain(4)
SHORT_S = 0.1  #: after which a call counts as hung


class MuteError(Exception):
    """One that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


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


class Endless(list[Any]):
    """A list that cannot be walked through."""

    def __iter__(self) -> Any:
        raise RuntimeError("no end")


def prefetch(storage: StorageManager, keys: Sequence[bytes] = KEYS) -> PrefetchResult:
    """Submits and waits."""
    return storage.wait_prefetch_status(storage.submit_prefetch_task(keys, SIZE), TIMEOUT_S)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does."""
    yield
    check_no_thread_stays()


ERRORS: list[tuple[BaseException, str]] = [
    (RuntimeError("broken"), "RuntimeError: broken"),
    (OSError(5, "Input/output error"), "Input/output error"),
    (MemoryError(), "MemoryError"),
    (shmcache.ClosedError("something else was closed"), "ClosedError"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (SystemExit(3), "SystemExit"),
    (GeneratorExit(), "GeneratorExit"),
    (StopIteration(), "StopIteration"),
    (MuteError(), "MuteError"),
]
LOOKUP_ANSWERS: dict[str, Callable[[list[Any]], Any]] = {
    "None": lambda _: None,
    "nothing": lambda _: [],
    "too few": lambda answer: answer[:-1],
    "too many": lambda answer: [*answer, True],
    "a number": lambda _: 4,
    "text": lambda _: "yes!",
    "a generator": iter,
    "a dict": lambda answer: dict(enumerate(answer)),
    "statuses": lambda answer: [OK] * len(answer),
    "Nones": lambda answer: [None] * len(answer),
    "ints": lambda answer: [1] * len(answer),
    "arrays": lambda answer: [np.ones(2, bool)] * len(answer),
    "contrary ones": lambda answer: [Contrary()] * len(answer),
    "what has no length": Short,
    "what has no end": Endless,
}
LOAD_ANSWERS: dict[str, Callable[[list[Any]], Any]] = {
    **{name: LOOKUP_ANSWERS[name] for name in LOOKUP_ANSWERS if name != "statuses"},
    "Trues": lambda answer: [True] * len(answer),
    "Falses": lambda answer: [False] * len(answer),  # equal to Status.OK
    "zeros": lambda answer: [0.0] * len(answer),
    "one that is none": lambda answer: [*answer[:-1], False],
}


@pytest.mark.parametrize("method", ["lookup", "load"])
@pytest.mark.parametrize(("error", "text"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_an_adapter_that_raises(cache: Cache, method: str, error: BaseException, text: str) -> None:
    fill(cache, KEYS[:1])
    store = MemoryStore(KEYS)
    with StorageManager(cache, [store], store=None, io_threads=1) as storage:
        for times in (1, 2, 3):  # with one thread, which must outlive it
            store.faults[method] = raises(error)
            result = prefetch(storage)
            assert (result.hits, result.l1_hits, result.l2_hits) == (1, 1, 0)
            assert result.error is not None
            assert text in result.error
            counters = cache.stats().counters
            assert (counters.l2_lookup_errors, counters.l2_load_errors) == (
                (times, 0) if method == "lookup" else (0, times)
            )
            assert counters.prefetch_errors == times
            cache.cancel_read(KEYS[:1])
            check_idle(cache)
        store.faults.clear()
        assert prefetch(storage) == PrefetchResult(4, 1, 3, None)
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


@pytest.mark.parametrize(
    ("method", "change"),
    [*(("lookup", name) for name in LOOKUP_ANSWERS), *(("load", name) for name in LOAD_ANSWERS)],
)
def test_an_adapter_that_answers_nonsense(cache: Cache, method: str, change: str) -> None:
    fill(cache, KEYS[:1])
    store = MemoryStore(KEYS)
    store.faults[method] = answers((LOOKUP_ANSWERS if method == "lookup" else LOAD_ANSWERS)[change])
    with StorageManager(cache, [store], store=None) as storage:
        result = prefetch(storage)
        assert (result.hits, result.l1_hits, result.l2_hits) == (1, 1, 0)
        assert result.error is not None
        assert "MemoryStore memory" in result.error
        counters = cache.stats().counters
        assert counters.l2_lookup_errors + counters.l2_load_errors == 1
        cache.cancel_read(KEYS[:1])
        check_idle(cache)
        store.faults.clear()
        assert prefetch(storage) == PrefetchResult(4, 1, 3, None)
        with cache.read(KEYS) as batch:
            assert contents(batch) == list(map(data_of, KEYS))
    check_nothing_leaked(cache)


def test_answers_in_a_tuple_and_of_numpy_are_fine(cache: Cache) -> None:
    store = MemoryStore(KEYS)
    store.faults["lookup"] = answers(lambda answer: tuple(np.array(answer)))
    store.faults["load"] = answers(tuple)
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage) == PrefetchResult(4, 0, 4, None)
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("fault", [raises(RuntimeError("broken")), answers(lambda _: None)])
def test_another_adapter_serves_where_one_fails(cache: Cache, fault: Fault) -> None:
    broken, sound = MemoryStore(KEYS, name="broken"), MemoryStore(KEYS, name="sound")
    broken.faults["lookup"] = fault
    with StorageManager(cache, [broken, sound], store=None) as storage:
        result = prefetch(storage)
    assert (result.hits, result.l2_hits) == (4, 4)
    assert result.error is not None  # it happened all the same
    assert "broken" in result.error
    assert broken.asked("load") == []
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("failing", range(4))
def test_a_load_that_fails_ends_the_prefix_there(cache: Cache, failing: int) -> None:
    stores = alternate(KEYS)

    def fault(request: Request) -> Any:
        if request.keys == [KEYS[failing]]:
            raise OSError("broken")
        return request.go_on()

    for store in stores:
        store.faults["load"] = fault
    with StorageManager(cache, stores, store=None) as storage:
        result = prefetch(storage)
        assert (result.hits, result.l2_hits) == (failing, failing)
        assert result.error is not None
        assert "OSError: broken" in result.error
        stats = cache.stats()
        assert (stats.objects, stats.writing, stats.reserved) == (failing, 0, failing)
    with cache.read(KEYS[:failing]) as batch:
        assert contents(batch) == list(map(data_of, KEYS[:failing]))
    check_nothing_leaked(cache)


def test_a_look_up_that_promises_too_much_is_no_error(cache: Cache) -> None:
    store = MemoryStore(KEYS[:2])
    store.faults["lookup"] = answers(lambda answer: [True] * len(answer))
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage) == PrefetchResult(2, 0, 2, None)
        counters = cache.stats().counters
        assert (counters.l2_lookup_hits, counters.l2_loads, counters.l2_load_misses) == (4, 2, 2)
        assert counters.l2_loaded_bytes == 2 * SIZE
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("status", [status for status in Status if status is not OK])
def test_every_status_but_ok_means_that_it_was_not_loaded(cache: Cache, status: Status) -> None:
    store = MemoryStore(KEYS)
    store.faults["load"] = answers(lambda answer: [OK, status, *answer[2:]])
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage).hits == 1
        assert cache.stats().objects == 1
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


# Hanging


def test_a_look_up_that_hangs_is_given_up(cache: Cache) -> None:
    fill(cache, KEYS[:1])
    store = MemoryStore(KEYS)
    with Gate() as gate, StorageManager(cache, [store], store=None, l2_timeout_s=SHORT_S, io_threads=2) as storage:
        store.faults["lookup"] = gate
        result = prefetch(storage)
        assert (result.hits, result.l1_hits) == (1, 1)
        assert result.error is not None
        assert "lookup: no answer within 0.1 s" in result.error
        stats = cache.stats()
        assert (stats.counters.l2_timeouts, stats.counters.prefetch_errors) == (1, 1)
        assert (stats.counters.prefetch_l1_hits, stats.histograms.prefetch_total.count) == (1, 1)
        gate.open()
        eventually(lambda: cache.stats().histograms.l2_lookup.count == 1, "the call is back")
        store.faults.clear()
        assert prefetch(storage) == PrefetchResult(4, 1, 3, None)
    cache.cancel_read(KEYS)
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_a_load_that_hangs_is_given_up_and_its_slot_is_aborted_when_it_is_back(cache: Cache, join: Join) -> None:
    other = join()
    even, odd = alternate(KEYS)
    with (
        Gate(KEYS[1]) as gate,
        StorageManager(cache, [even, odd], store=None, l2_timeout_s=SHORT_S, contend_s=SHORT_S) as storage,
    ):
        odd.faults["load"] = gate
        result = prefetch(storage)
        assert (result.hits, result.l2_hits) == (1, 1)
        assert result.error is not None
        assert "load: no answer within 0.1 s" in result.error
        stats = cache.stats()
        assert (stats.counters.l2_timeouts, stats.counters.prefetch_errors) == (1, 1)
        assert (stats.reserved, stats.writing, stats.gauges.prefetch_in_flight) == (1, 1, 0)
        assert stats.gauges.l2_loading == 1
        # The adapter may still write there, so nobody else may.
        assert other.reserve_write([KEYS[1]], SIZE).status == [IN_FLIGHT]
        assert prefetch(storage).hits == 1
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the slot is given back when its load is back")
        assert cache.status(KEYS) == [OK, *[NOT_FOUND] * 3]  # and is never published, though it is whole
        assert cache.stats().counters.publishes == 1
        odd.faults.clear()
        assert prefetch(storage) == PrefetchResult(4, 1, 3, None)
    cache.cancel_read([KEYS[0], *KEYS, KEYS[0]])
    check_nothing_leaked(cache)


@pytest.mark.parametrize("method", ["lookup", "load"])
def test_where_every_thread_hangs_nobody_waits_behind_them(cache: Cache, method: str) -> None:
    """The others are served by the next adapter; what that one lacks is not waited for."""
    hung, sound = MemoryStore(KEYS, name="hung"), MemoryStore(chain(4, "other"), name="sound")
    with (
        Gate() as gate,
        StorageManager(cache, [hung, sound], store=None, l2_timeout_s=SHORT_S, io_threads=2) as storage,
    ):
        hung.faults[method] = gate
        tasks = [storage.submit_prefetch_task([key], SIZE) for key in KEYS[:3]]
        for task in tasks:
            result = storage.wait_prefetch_status(task, TIMEOUT_S)
            assert result.hits == 0
            assert result.error is not None
        asked = len(hung.calls)
        result = prefetch(storage, [*chain(4, "other"), KEYS[3]])
        assert (result.hits, result.l2_hits) == (4, 4)
        assert result.error is not None
        assert "hung" in result.error
        assert len(hung.calls) == asked
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the loads are back")
        hung.faults.clear()
        eventually(lambda: prefetch(storage, [KEYS[3]]).hits == 1, "the adapter serves again")
    cache.cancel_read(KEYS)
    cache.cancel_read(chain(4, "other"))
    check_nothing_leaked(cache)


def test_an_adapter_that_hangs_is_not_blamed_where_nobody_needs_it(cache: Cache) -> None:
    sound, hung = MemoryStore(KEYS, name="sound"), MemoryStore(name="hung")
    with (
        Gate() as gate,
        StorageManager(cache, [sound, hung], store=None, l2_timeout_s=SHORT_S, io_threads=1) as storage,
    ):
        hung.faults["lookup"] = gate
        assert prefetch(storage, [b"nowhere"]).hits == 0
        assert prefetch(storage) == PrefetchResult(4, 0, 4, None)
        gate.open()
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_calls_that_wait_behind_a_hung_one_are_called_off(cache: Cache) -> None:
    store = MemoryStore(KEYS)
    with Gate() as gate, StorageManager(cache, [store], store=None, l2_timeout_s=SHORT_S, io_threads=1) as storage:
        store.faults["load"] = gate
        first = storage.submit_prefetch_task(KEYS[:1], SIZE)
        gate.reached()
        second = storage.submit_prefetch_task(KEYS[1:2], SIZE)
        assert storage.wait_prefetch_status(first, TIMEOUT_S).hits == 0
        assert storage.wait_prefetch_status(second, TIMEOUT_S).hits == 0
        assert cache.stats().writing == 1
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the load is back")
        store.faults.clear()
        eventually(lambda: prefetch(storage).hits == 4, "the adapter serves again")
    assert store.asked("lookup")[0] == KEYS[:1]
    assert KEYS[1:2] not in store.asked("lookup")  # called off
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_close_does_not_wait_for_a_load_that_hangs(join: Join) -> None:
    cache, other = join(), join()
    store = MemoryStore(KEYS)
    with Gate() as gate:
        store.faults["load"] = gate
        storage = StorageManager(cache, [store], store=None)
        task = storage.submit_prefetch_task(KEYS, SIZE)
        gate.reached()
        storage.close()
        assert store.closed
        assert storage.wait_prefetch_status(task, 0).hits == 0
        assert cache.stats().writing == 4
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()  # the adapter may still write there
        gate.open()
        eventually(lambda: cache.stats().writing == 0, "the slots are given back when the load is back")
        assert cache.stats().counters.publishes == 0
    eventually(lambda: closed(cache), "nothing uses the memory any more")
    check_nothing_leaked(other)


def closed(cache: Cache) -> bool:
    """Whether it can be closed by now."""
    try:
        cache.close()
    except shmcache.ViewInUseError:
        return False
    return True


def test_a_look_up_that_hangs_at_close(cache: Cache) -> None:
    store = MemoryStore(KEYS)
    fill(cache, KEYS[:2])
    with Gate() as gate:
        store.faults["lookup"] = gate
        storage = StorageManager(cache, [store], store=None)
        task = storage.submit_prefetch_task(KEYS, SIZE)
        gate.reached()
        storage.close()
        assert storage.wait_prefetch_status(task, 0).hits == 0
        check_nothing_leaked(cache)


# Keeping what is not its own


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("made", [lambda view: view[1:], np.frombuffer], ids=["a slice", "an array"])
def test_an_adapter_that_keeps_a_view(join: Join, made: Callable[[memoryview], Any], loaded: bool) -> None:
    cache, other = join(), join()
    kept: list[Any] = []
    store = MemoryStore(KEYS)

    def fault(request: Request) -> Any:
        answer = request.go_on()
        kept.extend(made(view) for view in request.views)
        return answer if loaded else [NOT_FOUND] * len(answer)

    store.faults["load"] = fault
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage).hits == (4 if loaded else 0)
        cache.cancel_read(KEYS)
        check_idle(cache)
        with pytest.raises(shmcache.ViewInUseError):
            cache.close()
        store.faults.clear()
        assert prefetch(storage).hits == 4
    kept.clear()
    cache.close()
    check_nothing_leaked(other)


def test_an_adapter_that_releases_the_views(cache: Cache) -> None:
    store = MemoryStore(KEYS)

    def fault(request: Request) -> Any:
        answer = request.go_on()
        for view in request.views:
            view.release()
        return answer

    store.faults["load"] = fault
    with StorageManager(cache, [store], store=None) as storage:
        assert prefetch(storage) == PrefetchResult(4, 0, 4, None)
        with cache.read(KEYS) as batch:
            assert contents(batch) == list(map(data_of, KEYS))
    check_nothing_leaked(cache)


class Grasping(MemoryStore):
    """One that empties the lists it is given."""

    def _serve(self, method: str, keys: Any, views: Any, go_on: Callable[[], Any]) -> Any:
        answer = super()._serve(method, keys, views, go_on)
        keys.clear()
        views.clear()
        return answer


def test_an_adapter_that_changes_the_lists_it_is_given(cache: Cache) -> None:
    with StorageManager(cache, [Grasping(KEYS), MemoryStore()], store=None) as storage:
        assert prefetch(storage) == PrefetchResult(4, 0, 4, None)
        with cache.read(KEYS) as batch:
            assert contents(batch) == list(map(data_of, KEYS))
    check_nothing_leaked(cache)


class Nameless(MemoryStore):
    """One that cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize("fault", [raises(RuntimeError("broken")), answers(lambda _: None)])
@pytest.mark.parametrize("method", ["lookup", "load"])
def test_an_adapter_that_cannot_be_printed(cache: Cache, method: str, fault: Fault) -> None:
    store = Nameless(KEYS)
    store.faults[method] = fault
    with StorageManager(cache, [store], store=None, io_threads=1) as storage:
        for _ in range(2):
            result = prefetch(storage)
            assert result.hits == 0
            assert result.error is not None
        store.faults.clear()
        assert prefetch(storage).hits == 4
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_where_no_thread_can_be_started(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, KEYS[:1])
    store = MemoryStore(KEYS)
    with StorageManager(cache, [store], store=None) as storage:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "shmcache-l2":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            result = prefetch(storage)
            assert result.hits == 1
            assert result.error is not None
            assert "can't start new thread" in result.error
        monkeypatch.undo()
        cache.cancel_read(KEYS[:1])
        assert prefetch(storage) == PrefetchResult(4, 1, 3, None)
    cache.cancel_read(KEYS)
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_where_no_further_thread_can_be_started(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not begun must not be begun later, when its slot is somebody else's."""
    store = MemoryStore(KEYS)
    with StorageManager(cache, [store], store=None) as storage, Gate() as gate:
        store.faults["load"] = gate
        first = storage.submit_prefetch_task(KEYS[:1], SIZE)
        gate.reached()
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "shmcache-l2":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        second = storage.submit_prefetch_task(KEYS[1:], SIZE)
        gate.open()
        assert storage.wait_prefetch_status(first, TIMEOUT_S).hits == 1
        result = storage.wait_prefetch_status(second, TIMEOUT_S)
        assert result.hits == 3 or result.error is not None  # served by the thread there is, or refused
        monkeypatch.undo()
        assert prefetch(storage).hits == 4
    cache.cancel_read(KEYS * 3)
    check_nothing_leaked(cache)


def test_an_adapter_whose_close_raises_leaves_the_others_closed(cache: Cache) -> None:
    class Stubborn(MemoryStore):
        def close(self) -> None:
            super().close()
            raise OSError("will not")

    stores = [Stubborn(KEYS), MemoryStore(KEYS)]
    with StorageManager(cache, stores, store=None) as storage:
        assert prefetch(storage).hits == 4
    assert all(store.closed for store in stores)
    cache.cancel_read(KEYS)
    check_nothing_leaked(cache)


def test_many_failures_leave_nothing(cache: Cache) -> None:
    """A quarter of all calls fails, each time in another way."""
    store = MemoryStore(KEYS)
    ways: list[Fault] = [
        *(raises(error) for error, _ in ERRORS),
        *(answers(change) for change in LOAD_ANSWERS.values()),
    ]
    calls = 0

    def fault(request: Request) -> Any:
        nonlocal calls
        calls += 1
        return ways[calls // 4 % len(ways)](request) if calls % 4 == 0 else request.go_on()

    store.faults = {"lookup": fault, "load": fault}
    with StorageManager(cache, [store], store=None, io_threads=1) as storage:
        for _ in range(100):
            task = storage.submit_prefetch_task(KEYS, SIZE)
            result = storage.wait_prefetch_status(task, TIMEOUT_S)
            with cache.read(KEYS[: result.hits]) as batch:
                assert contents(batch) == list(map(data_of, KEYS[: result.hits]))
            check_idle(cache)
            cache.clear()
    assert calls > 4 * len(ways)
    check_nothing_leaked(cache)
