"""Stores to L2: what is sent, once; under which shares; what becomes of it where an L2 fails, hangs or is slow; and the
end."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents, run_all
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    Request,
    answers,
    chain,
    check_idle,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    raises,
    shares,
)

import shmcache
from shmcache import ArenaConfig, Cache, Layout, Status
from shmcache.storage import StorageManager
from shmcache.storage.l1 import L1

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NO_SPACE, LOCKED = Status.NO_SPACE, Status.LOCKED

JOB_KEYS = 16  #: stored by one call
TRIES = 4  #: of one job
SHORT_S = 0.2  #: after which a call counts as hung
WIDE = ArenaConfig("8MiB", block_size="4KiB", lanes=16)


def write(cache: Cache, keys: Sequence[bytes], nbytes: int = SIZE, *, temporary: bool = False) -> shmcache.WriteBatch:
    """Reserves objects and fills them with the right bytes."""
    batch = cache.reserve_write(keys, nbytes, temporary=temporary)
    assert batch.status == [OK] * len(keys)
    for key, view in zip(keys, batch.views, strict=True):
        assert view is not None
        view[:] = data_of(key, nbytes)
    return batch


def stored(store: MemoryStore) -> list[bytes]:
    """Every key that it was asked to store, as often as it was asked."""
    return sorted(key for keys in store.asked("store") for key in keys)


def check_has(store: MemoryStore, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """It has the right bytes of these and of nothing else."""
    assert sorted(store.objects) == sorted(keys)
    assert all(store.objects[key] == data_of(key, nbytes) for key in keys)


def counted(cache: Cache, *names: str) -> tuple[int, ...]:
    """Counters, each named without its ``l2_``."""
    counters = cache.stats().counters
    return tuple(getattr(counters, "l2_" + name) for name in names)


def quietly(cache: Cache, storage: StorageManager, keys: Sequence[bytes], nbytes: int = SIZE) -> None:
    """Puts objects that the manager is not told of."""
    L1(cache).ignore(storage._listener)
    fill(cache, keys, nbytes)
    L1(cache).listen(storage._listener)


def once(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """A fault at the first call only."""
    left = [answer]
    return lambda request: left.pop()(request) if left else request.go_on()


# What is stored


def by_put(cache: Cache, keys: list[bytes]) -> None:
    fill(cache, keys)


def by_finish_write(cache: Cache, keys: list[bytes]) -> None:
    batch = write(cache, keys)
    assert cache.finish_write(keys) == [OK] * len(keys)
    assert batch.abort() == [EXISTS] * len(keys)


def by_finish_write_and_reserve_read(cache: Cache, keys: list[bytes]) -> None:
    batch = write(cache, keys)
    assert cache.finish_write_and_reserve_read(keys) == [OK] * len(keys)
    assert batch.abort() == [EXISTS] * len(keys)


def by_publish(cache: Cache, keys: list[bytes]) -> None:
    assert write(cache, keys).publish() == [OK] * len(keys)


def by_publish_and_reserve_read(cache: Cache, keys: list[bytes]) -> None:
    assert write(cache, keys).publish_and_reserve_read() == [OK] * len(keys)


def by_leaving_a_batch(cache: Cache, keys: list[bytes]) -> None:
    with write(cache, keys):
        pass


PUBLISHERS = [
    by_put,
    by_finish_write,
    by_finish_write_and_reserve_read,
    by_publish,
    by_publish_and_reserve_read,
    by_leaving_a_batch,
]


@pytest.mark.parametrize("publish", PUBLISHERS)
def test_what_is_published_is_stored_once(cache: Cache, publish: Callable[[Cache, list[bytes]], None]) -> None:
    keys, store = chain(20), MemoryStore()
    granting = "reserve_read" in publish.__name__
    with StorageManager(cache, [store]) as storage:
        publish(cache, keys)
        storage.flush(TIMEOUT_S)
        check_has(store, keys)
        assert stored(store) == sorted(keys)
        stats = cache.stats()
        assert (stats.held, stats.reserved) == (0, 20 if granting else 0)
        assert stats.counters.claims == 0
        assert counted(cache, "stores", "stored_bytes", "store_skips") == (20, 20 * SIZE, 0)
        storage.flush(TIMEOUT_S)
    assert stored(store) == sorted(keys)  # not again at the end
    assert cache.finish_read(keys) == [OK if granting else Status.NO_SHARE] * 20
    check_nothing_leaked(cache)


def test_a_finished_write_that_published_nothing_is_not_stored(cache: Cache, join: Join) -> None:
    store, other = MemoryStore(), join()
    with StorageManager(cache, [store]) as storage:
        fill(other, [b"other"])
        assert cache.put(b"other", b"late") is EXISTS
        theirs = write(other, [b"theirs"])
        assert cache.put(b"theirs", b"late") is IN_FLIGHT
        assert cache.finish_write([b"other", b"theirs", b"none"]) == [EXISTS, Status.NOT_OWNER, NOT_FOUND]
        write(cache, [b"aborted"]).abort()
        assert write(cache, [b"twice"]).publish() == [OK]
        assert cache.finish_write([b"twice"]) == [EXISTS]
        theirs.publish()
        storage.flush(TIMEOUT_S)
    assert stored(store) == [b"twice"]
    check_nothing_leaked(cache)


def test_one_call_stores_so_many_keys_at_most(cache: Cache) -> None:
    keys, store = chain(50), MemoryStore()
    with StorageManager(cache, [store], backlog="1MiB") as storage:
        by_publish(cache, keys)
        storage.flush(TIMEOUT_S)
    for method in ("lookup", "store"):
        assert [len(asked) for asked in store.asked(method)] == [16, 16, 16, 2]
    assert [key for asked in store.asked("store") for key in asked] == keys
    assert cache.stats().histograms.l2_store.count == 4


def test_what_an_l2_has_is_not_stored_again(cache: Cache) -> None:
    keys, store = chain(6), MemoryStore(chain(3))
    with StorageManager(cache, [store]) as storage:
        by_publish(cache, keys)
        storage.flush(TIMEOUT_S)
        assert stored(store) == keys[3:]
        assert counted(cache, "stores", "store_skips") == (3, 3)
        storage.store(keys)
        storage.flush(TIMEOUT_S)
    assert stored(store) == keys[3:]
    assert counted(cache, "stores", "store_skips") == (3, 9)
    check_nothing_leaked(cache)


def test_what_is_loaded_is_not_stored(cache: Cache) -> None:
    near, far = MemoryStore(name="near"), MemoryStore(chain(8), name="far")
    with StorageManager(cache, [near, far]) as storage:
        task = storage.submit_prefetch_task(chain(10), SIZE)  # the last two end in a piece that is cut
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 8
        storage.flush(TIMEOUT_S)
    assert (stored(near), stored(far)) == ([], [])
    assert cache.finish_read(chain(8)) == [OK] * 8
    check_nothing_leaked(cache)


@pytest.mark.parametrize("granted", [False, True])
def test_temporary_objects_are_not_stored_and_stay(cache: Cache, granted: bool) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        batch = write(cache, [b"t"], temporary=True)
        assert (batch.publish_and_reserve_read() if granted else batch.publish()) == [OK]
        storage.store([b"t"])
        storage.flush(TIMEOUT_S)
        assert store.calls == []
        assert cache.status([b"t"]) == [OK]  # no share was taken, so none was the last
        assert cache.stats().reserved == int(granted)
        with cache.read([b"t"]) as read:
            assert contents(read) == [data_of(b"t")]
        assert cache.status([b"t"]) == [NOT_FOUND]
    check_nothing_leaked(cache)


def test_what_others_publish_is_not_stored_unless_named(cache: Cache, join: Join) -> None:
    store, other = MemoryStore(), join()
    with StorageManager(cache, [store]) as storage:
        fill(other, [b"theirs", b"named"])
        fill(cache, [b"own"])
        storage.store([b"named"])
        storage.flush(TIMEOUT_S)
    check_has(store, [b"own", b"named"])
    check_nothing_leaked(cache)


def test_without_write_through_only_what_is_named_is_stored(cache: Cache) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store], store=None) as storage:
        fill(cache, chain(4))
        storage.flush(TIMEOUT_S)
        assert store.calls == []
        storage.store(chain(4)[1:3])
        storage.flush(TIMEOUT_S)
    check_has(store, chain(4)[1:3])
    check_nothing_leaked(cache)


def test_store_takes_what_is_readable(cache: Cache) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store], store=None) as storage:
        storage.store([])
        storage.store([b"none"])
        fill(cache, [b"there"])
        unfinished = write(cache, [b"unfinished"])
        storage.store([b"none", b"there", b"unfinished", b"there"])
        storage.flush(TIMEOUT_S)
        check_has(store, [b"there"])
        assert stored(store) == [b"there"]
        assert counted(cache, "stores", "store_errors", "store_drops") == (1, 0, 0)
        unfinished.abort()
    check_nothing_leaked(cache)


def test_store_takes_keys_as_the_cache_does(cache: Cache) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store], store=None) as storage:
        fill(cache, [b"aa", b"bb", b"cc"])
        storage.store(np.frombuffer(b"aabb", np.uint8).reshape(2, 2))
        storage.store([memoryview(b"cc")])
        storage.flush(TIMEOUT_S)
        for keys, error in (("ab", TypeError), ([b""], ValueError), ([b"x" * 65], ValueError), (None, TypeError)):
            with pytest.raises(error, match="key"):
                storage.store(keys)  # type: ignore[arg-type] # that is what is tested
    check_has(store, [b"aa", b"bb", b"cc"])


def test_keys_of_any_kind_of_bytes_are_stored_under_their_bytes(cache: Cache) -> None:
    store = MemoryStore()
    with StorageManager(cache, [store]) as storage:
        assert cache.put(memoryview(b"view"), data_of(b"view")) is OK
        assert cache.put(bytearray(b"array"), data_of(b"array")) is OK
        batch = cache.reserve_write(np.frombuffer(b"rows", np.uint8).reshape(1, 4), SIZE)
        batch.views[0][:] = data_of(b"rows")  # type: ignore[index] # it is there
        batch.publish()
        storage.flush(TIMEOUT_S)
    check_has(store, [b"view", b"array", b"rows"])


def test_only_what_is_published_meanwhile_is_stored(cache: Cache) -> None:
    store = MemoryStore()
    fill(cache, [b"before"])
    with StorageManager(cache, [store]):
        fill(cache, [b"meanwhile"])
    fill(cache, [b"after"])
    check_has(store, [b"meanwhile"])
    check_nothing_leaked(cache)


def test_two_managers_of_one_cache_store_what_it_publishes(cache: Cache) -> None:
    one, two = MemoryStore(), MemoryStore()
    with StorageManager(cache, [one]) as first:
        with StorageManager(cache, [two]) as second:
            fill(cache, [b"both"])
            second.flush(TIMEOUT_S)
        fill(cache, [b"one"])
        first.flush(TIMEOUT_S)
    check_has(one, [b"both", b"one"])
    check_has(two, [b"both"])
    check_nothing_leaked(cache)


def test_managers_that_come_and_go_at_once_leave_no_listener(cache: Cache, hasty_switches: None) -> None:
    del hasty_switches

    def come_and_go() -> None:
        for _ in range(30):
            StorageManager(cache, [MemoryStore()]).close()

    with StorageManager(cache, [store := MemoryStore()]) as storage:
        run_all([come_and_go] * 4)
        assert cache._attachment.listeners == (storage._listener,)
        fill(cache, chain(1))
        storage.flush(TIMEOUT_S)
    check_has(store, chain(1))
    assert not cache._attachment.listeners


def test_every_adapter_gets_what_it_does_not_have(cache: Cache) -> None:
    keys = chain(6)
    stores = [MemoryStore(), MemoryStore(keys[:2]), MemoryStore(keys)]
    with StorageManager(cache, stores) as storage:
        by_publish(cache, keys)
        storage.flush(TIMEOUT_S)
    assert [stored(store) for store in stores] == [keys, keys[2:], []]
    for store in stores:
        check_has(store, keys)
    assert counted(cache, "stores", "stored_bytes", "store_skips") == (10, 10 * SIZE, 8)
    check_nothing_leaked(cache)


class LayoutStore(MemoryStore):
    """One that is told layouts."""

    keeps_layouts = True

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[bytes, Any] = {}

    def store(
        self, keys: Sequence[bytes], views: Sequence[memoryview], layouts: Sequence[Layout | None] | None = None
    ) -> list[Status]:
        assert layouts is not None
        self.layouts.update(zip(keys, layouts, strict=True))
        return super().store(keys, views)


def test_layouts_reach_who_keeps_them(cache: Cache) -> None:
    tensors = [Layout((4, 8), "bfloat16"), Layout([((3,), "float32"), ((2, 2), "int8")])]
    keeps, plain = LayoutStore(), MemoryStore()
    keeps.objects[b"has"] = b"x"
    with StorageManager(cache, [keeps, plain]) as storage:
        cache.put(b"bytes", b"x" * 100)
        cache.reserve_write([b"a", b"has", b"b"], [tensors[0], 7, tensors[1]]).publish()
        storage.flush(TIMEOUT_S)
    assert keeps.layouts == {b"bytes": Layout((100,), "uint8"), b"a": tensors[0], b"b": tensors[1]}
    assert counted(cache, "store_errors", "store_retries") == (0, 0)
    assert sorted(plain.objects) == [b"a", b"b", b"bytes", b"has"]


# Under which shares


def test_an_object_stays_while_it_is_being_stored(cache: Cache, join: Join) -> None:
    store, other = MemoryStore(), join()
    with Gate() as gate, StorageManager(cache, [store]) as storage:
        store.faults["store"] = gate
        fill(cache, chain(1))
        gate.reached()
        for anybody in (cache, other):
            assert anybody.delete(chain(1)) == anybody.delete(chain(1), force=True) == [LOCKED]
            assert anybody.evict(1 << 20) == 0
            assert anybody.clear() == 0
        stats = cache.stats()
        assert (stats.held, stats.reserved) == (1, 0)
        assert (stats.gauges.l2_storing, stats.gauges.l2_backlog_bytes) == (1, SIZE)
        gate.open()
        storage.flush(TIMEOUT_S)
        check_idle(cache)
        assert cache.delete(chain(1)) == [OK]
    check_has(store, chain(1))
    check_nothing_leaked(cache)


def test_what_waits_is_held_too(cache: Cache) -> None:
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store], backlog="1MiB") as storage:
        store.faults["lookup"] = gate
        fill(cache, chain(5))
        gate.reached()
        assert cache.evict(1 << 20) == 0
        assert cache.stats().held == 5
        assert cache.stats().gauges.l2_backlog_bytes == 5 * SIZE
        gate.open()
        storage.flush(TIMEOUT_S)
    check_has(store, chain(5))
    check_nothing_leaked(cache)


def test_an_object_stays_until_the_last_adapter_has_it(cache: Cache) -> None:
    fast, slow = MemoryStore(), MemoryStore()
    with Gate() as gate, StorageManager(cache, [fast, slow]) as storage:
        slow.faults["store"] = gate
        fill(cache, chain(1))
        gate.reached()
        eventually(lambda: fast.objects != {}, "the fast one does not wait for the slow one")
        assert cache.delete(chain(1), force=True) == [LOCKED]
        gate.open()
        storage.flush(TIMEOUT_S)
    check_has(slow, chain(1))
    check_nothing_leaked(cache)


def test_the_publishers_own_shares_stay_its_own(cache: Cache) -> None:
    """A cache without a group is rank 0 itself: what it grants lies in the same word as what the store holds."""
    store = MemoryStore()
    with Gate() as gate, StorageManager(cache, [store]) as storage:
        store.faults["store"] = gate
        by_publish_and_reserve_read(cache, chain(1))
        gate.reached()
        stats = cache.stats()
        assert (stats.reserved, stats.held, stats.counters.claims) == (1, 1, 0)
        with cache.read(chain(1)) as batch:
            assert contents(batch) == [data_of(b"k0")]
            stats = cache.stats()
            assert (stats.reserved, stats.held, stats.counters.claims) == (0, 2, 1)
        assert cache.reserve_read(chain(1)) == [OK]
        gate.open()
        storage.flush(TIMEOUT_S)
        stats = cache.stats()
        assert (stats.reserved, stats.held) == (1, 0)
        assert cache.finish_read(chain(1)) == [OK]
    check_nothing_leaked(cache)


def test_the_ranks_shares_stay_theirs(arena: str, join: Join) -> None:
    controller, ranks = join("engine", None, 3), [join("engine", rank, 3) for rank in range(3)]
    store = MemoryStore()
    with StorageManager(controller, [store]) as storage:
        assert write(controller, chain(2)).publish_and_reserve_read(1) == [OK] * 2
        storage.flush(TIMEOUT_S)
        assert shares(arena) == {0: (2, 0), 1: (2, 0), 2: (0, 0)}
        with StorageManager(ranks[0], [rank_store := MemoryStore()], store=None) as of_rank:
            of_rank.store(chain(2))
            of_rank.flush(TIMEOUT_S)
        assert shares(arena) == {0: (2, 0), 1: (2, 0), 2: (0, 0)}
    for rank in ranks[:2]:
        with rank.read(chain(2)) as batch:
            assert contents(batch) == [data_of(key) for key in chain(2)]
    assert controller.stats().counters.claims == 4
    check_has(store, chain(2))
    check_has(rank_store, chain(2))
    check_nothing_leaked(controller)


def test_a_store_counts_as_no_read(cache: Cache) -> None:
    with StorageManager(cache, [MemoryStore()]) as storage:
        fill(cache, chain(2))
        storage.store([*chain(2), b"none"])
        storage.flush(TIMEOUT_S)
    counters = cache.stats().counters
    assert (counters.read_hits, counters.read_misses, counters.claims) == (0, 0, 0)


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
