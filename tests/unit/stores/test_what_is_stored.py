"""What is sent to L2, once, and under which shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents, run_all
from storage_support import (
    SIZE,
    Gate,
    MemoryStore,
    chain,
    check_idle,
    check_nothing_leaked,
    data_of,
    eventually,
    fill,
    shares,
)
from store_support import (
    EXISTS,
    IN_FLIGHT,
    LOCKED,
    NOT_FOUND,
    OK,
    PUBLISHERS,
    by_publish,
    by_publish_and_reserve_read,
    check_has,
    counted,
    stored,
    write,
)

from shmcache import Cache, Layout, Status
from shmcache.storage import StorageManager

# What is stored


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
