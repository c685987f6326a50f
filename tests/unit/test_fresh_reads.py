"""Reads for the storage layer: under fresh shares, which leave this lane's reserved ones where they are; and for a copy
to L2, which besides takes no temporary object, counts as no read, and makes no object newer."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from arena_support import TIMEOUT_S, Join, contents, pattern, run_all, run_python
from storage_support import SIZE, check_nothing_leaked, data_of, fill, shares

import shmcache
from shmcache import ArenaConfig, Cache, Layout, ReadBatch, Status
from shmcache.storage.l1 import L1

OK, NOT_FOUND, IN_FLIGHT, LOCKED, NO_SHARE = (
    Status.OK,
    Status.NOT_FOUND,
    Status.IN_FLIGHT,
    Status.LOCKED,
    Status.NO_SHARE,
)
MOST = 65_535  #: reserved shares of an object that a lane can have
MOST_HELD = 16_383  #: held ones
BLOCK = 4096
SMALL = ArenaConfig(16 * BLOCK, block_size=BLOCK, slots=16, lanes=8)
LARGE = ArenaConfig(16 * BLOCK, block_size=BLOCK, slots=4096, lanes=8)  # keeps a list of victims

Read = Callable[[Cache, list[bytes]], ReadBatch]


def fresh(cache: Cache, keys: list[bytes]) -> ReadBatch:
    return L1(cache).read(keys)


def to_store(cache: Cache, keys: list[bytes]) -> ReadBatch:
    return L1(cache).hold(keys)


BOTH = pytest.mark.parametrize("read", [fresh, to_store])


def have(cache: Cache) -> tuple[int, int, int]:
    """Reserved and held shares of all, and claims so far."""
    stats = cache.stats()
    return stats.reserved, stats.held, stats.counters.claims


@BOTH
def test_reserved_shares_stay_reserved(cache: Cache, read: Read) -> None:
    fill(cache, [b"a", b"b"])
    assert cache.reserve_read([b"a"]) == cache.reserve_read([b"a"]) == [OK]
    batch = read(cache, [b"a", b"b"])
    assert (batch.status, batch.hits) == ([OK, OK], 2)
    assert have(cache) == (2, 2, 0)
    assert contents(batch) == [data_of(b"a"), data_of(b"b")]
    with cache.read([b"a"]):
        assert have(cache) == (1, 3, 1)  # that is what a plain read does
        read(cache, [b"a"]).release()
        assert have(cache) == (1, 3, 1)
    batch.release()
    assert have(cache) == (1, 0, 1)
    assert cache.delete([b"a", b"b"]) == [LOCKED, OK]
    assert cache.finish_read([b"a"]) == [OK]
    check_nothing_leaked(cache)


@BOTH
def test_a_share_that_is_granted_meanwhile_stays_too(cache: Cache, read: Read) -> None:
    fill(cache, [b"a"])
    with read(cache, [b"a"]):
        assert cache.reserve_read([b"a"]) == [OK]
        assert have(cache) == (1, 1, 0)
    assert have(cache) == (1, 0, 0)
    with cache.read([b"a"]):
        assert have(cache) == (0, 1, 1)
    check_nothing_leaked(cache)


@BOTH
def test_the_shares_of_all_ranks_stay(arena: str, join: Join, read: Read) -> None:
    ranks = [join("engine", rank, 3) for rank in range(3)]
    fill(ranks[0], [b"a"])
    assert ranks[0].reserve_read([b"a"], 2) == [OK]
    batch = read(ranks[1], [b"a"])
    assert shares(arena) == {0: (1, 0), 1: (1, 1), 2: (1, 0)}
    assert ranks[0].cancel_read([b"a"], 2) == [OK]
    assert shares(arena) == {0: (0, 0), 1: (0, 1), 2: (0, 0)}
    assert ranks[2].delete([b"a"], force=True) == [LOCKED]
    batch.release()
    assert ranks[2].delete([b"a"]) == [OK]
    check_nothing_leaked(ranks[0])


@BOTH
def test_what_is_held_cannot_go(cache: Cache, join: Join, read: Read) -> None:
    other = join()
    fill(cache, [b"a"])
    with read(cache, [b"a"]) as batch:
        for anybody in (cache, other):
            assert anybody.delete([b"a"], force=True) == [LOCKED]
            assert (anybody.evict(1 << 20), anybody.clear()) == (0, 0)
        assert contents(batch) == [data_of(b"a")]
    assert cache.evict(1 << 20) == 2 * BLOCK
    check_nothing_leaked(cache)


@BOTH
def test_what_is_not_there_is_told(cache: Cache, read: Read) -> None:
    fill(cache, [b"a", b"c"])
    unfinished = cache.reserve_write([b"w"], SIZE)
    keys = [b"a", b"none", b"w", b"c", b"a"]
    with read(cache, keys) as batch:
        assert batch.status == [OK, NOT_FOUND, IN_FLIGHT, OK, OK]
        assert (batch.keys, batch.hits) == (keys, 1)
        assert contents(batch) == [data_of(b"a"), None, None, data_of(b"c"), data_of(b"a")]
        assert have(cache) == (0, 3, 0)
    unfinished.abort()
    with read(cache, []) as empty:
        assert (empty.status, empty.hits) == ([], 0)
    check_nothing_leaked(cache)


@pytest.mark.parametrize("config", [ArenaConfig("8MiB", block_size="4KiB", lanes=8)])
@BOTH
def test_many_keys(cache: Cache, read: Read) -> None:
    keys = [b"%d" % i for i in range(1000)]
    there = set(random.Random(4).sample(keys, 600))
    for key in there:
        cache.put(key, pattern(key, 64))
    cache.reserve_read(keys)
    with read(cache, keys) as batch:
        assert batch.status == [OK if key in there else NOT_FOUND for key in keys]
        assert contents(batch) == [pattern(key, 64) if key in there else None for key in keys]
        assert have(cache) == (600, 600, 0)
    cache.cancel_read(keys)
    check_nothing_leaked(cache)


@BOTH
def test_a_lane_that_holds_the_most_gets_no_more(cache: Cache, read: Read) -> None:
    fill(cache, [b"a"])
    assert cache.reserve_read([b"a"]) == [OK]
    with read(cache, [b"a"] * MOST_HELD) as batch:
        assert batch.hits == MOST_HELD
        assert read(cache, [b"a"]).status == [NO_SHARE]
        assert have(cache) == (1, MOST_HELD, 0)
    assert have(cache) == (1, 0, 0)
    cache.finish_read([b"a"])
    check_nothing_leaked(cache)


@BOTH
def test_a_lane_with_the_most_reserved_shares_can_still_hold(cache: Cache, read: Read) -> None:
    fill(cache, [b"a"])
    assert set(cache.reserve_read([b"a"] * MOST)) == {OK}
    with read(cache, [b"a"]) as batch:
        assert batch.status == [OK]
        assert have(cache) == (MOST, 1, 0)
    cache.cancel_read([b"a"] * MOST)
    check_nothing_leaked(cache)


@BOTH
def test_layouts_come_with_it(cache: Cache, read: Read) -> None:
    layout = Layout([((2, 3), "bfloat16"), ((5,), "int64")])
    cache.reserve_write([b"a"], layout).publish()
    cache.put(b"bytes", b"x" * 10)
    with read(cache, [b"a", b"none", b"bytes"]) as batch:
        assert L1(cache).layouts_of(batch) == [layout, None, Layout((10,), "uint8")]
        assert [array.shape for array in batch.arrays()[0]] == [(2, 3), (5,)]


@BOTH
def test_views_are_read_only_and_keep_their_share(cache: Cache, read: Read) -> None:
    fill(cache, [b"a"])
    batch = read(cache, [b"a"])
    view = batch.views[0]
    assert view is not None
    assert view.readonly
    part = view[:3]
    with pytest.raises(shmcache.ViewInUseError):
        batch.release()
    assert have(cache) == (0, 1, 0)
    part.release()
    batch.release()
    assert have(cache) == (0, 0, 0)


@BOTH
def test_a_batch_that_is_dropped_gives_its_shares_back(cache: Cache, read: Read) -> None:
    fill(cache, [b"a"])
    batch = read(cache, [b"a"])
    assert have(cache) == (0, 1, 0)
    del batch
    assert have(cache) == (0, 0, 0)


CYCLE = """
import gc, sys, warnings
import shmcache
from shmcache.storage.l1 import L1
warnings.simplefilter("ignore")
for _ in range(8):
    cache = shmcache.attach(sys.argv[1])
    cache.put(b"a", b"x" * 100)
    batch = {"fresh": L1(cache).read, "to_store": L1(cache).hold, "plain": cache.read}[sys.argv[2]]([b"a"])
    if sys.argv[3] == "views":
        batch.views
    cycle = [cache, batch]
    cycle.append(cycle)
    del cache, batch, cycle
    gc.collect()
    assert shmcache.inspect(sys.argv[1]).stats.held == 0
"""


@pytest.mark.parametrize("what", ["plain", "views"])
@pytest.mark.parametrize("how", ["plain", "fresh", "to_store"])
def test_a_cache_and_a_batch_in_a_cycle_are_collected(arena: str, how: str, what: str) -> None:
    done = run_python(CYCLE, arena, how, what)
    assert done.returncode == 0, done.stderr


@BOTH
def test_after_close(join: Join, read: Read) -> None:
    cache = join()
    fill(cache, [b"a"])
    cache.close()
    with pytest.raises(shmcache.ClosedError):
        read(cache, [b"a"])


# Temporary objects


def test_a_fresh_read_takes_temporary_objects(cache: Cache) -> None:
    """And frees them, where its share is the last."""
    cache.reserve_write([b"t", b"granted"], SIZE, temporary=True).publish()
    cache.reserve_read([b"granted"])
    with fresh(cache, [b"t", b"granted"]) as batch:
        assert batch.status == [OK, OK]
    assert cache.status([b"t", b"granted"]) == [NOT_FOUND, OK]
    assert cache.finish_read([b"granted"]) == [OK]
    assert cache.status([b"granted"]) == [NOT_FOUND]
    check_nothing_leaked(cache)


def test_a_read_to_store_leaves_temporary_objects_alone(cache: Cache) -> None:
    cache.reserve_write([b"t", b"granted"], SIZE, temporary=True).publish()
    cache.reserve_read([b"granted"])
    fill(cache, [b"a"])
    with to_store(cache, [b"t", b"a", b"granted"]) as batch:
        assert batch.status == [NOT_FOUND, OK, NOT_FOUND]
        assert have(cache) == (1, 1, 0)
    assert have(cache) == (1, 0, 0)
    assert cache.status([b"t", b"granted"]) == [OK, OK]
    assert cache.finish_read([b"granted"]) == [OK]
    check_nothing_leaked(cache)


# What it counts as


def test_a_fresh_read_counts_as_a_read(cache: Cache) -> None:
    fill(cache, [b"a"])
    cache.reserve_read([b"a"])
    fresh(cache, [b"a", b"none"]).release()
    counters = cache.stats().counters
    assert (counters.read_hits, counters.read_misses, counters.claims) == (1, 1, 0)


def test_a_read_to_store_does_not(cache: Cache) -> None:
    fill(cache, [b"a"])
    before = cache.stats().counters
    to_store(cache, [b"a", b"none", b"a"]).release()
    after = cache.stats().counters
    assert (after.read_hits, after.read_misses, after.claims) == (0, 0, 0)
    assert after.lookup_hits == before.lookup_hits
    assert cache.stats().hit_rate is None


def aged(cache: Cache) -> list[bytes]:
    """Fills the arena, each object newer than the one before."""
    keys = [b"%d" % i for i in range(16)]
    for key in keys:
        assert cache.put(key, pattern(key, BLOCK)) is OK
        time.sleep(0.006)  # recency is rounded to some milliseconds
    return keys


def evicted(cache: Cache, keys: list[bytes], n: int) -> list[bytes]:
    """Which go where ``n`` must."""
    assert cache.evict(n * BLOCK) == n * BLOCK
    return [key for key, status in zip(keys, cache.status(keys), strict=True) if status is NOT_FOUND]


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "victim-list"])
def test_a_read_to_store_makes_nothing_newer(cache: Cache) -> None:
    keys = aged(cache)
    to_store(cache, [keys[0], keys[2], *keys[::-1]]).release()
    assert evicted(cache, keys, 3) == keys[:3]


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "victim-list"])
def test_a_fresh_read_makes_newer(cache: Cache) -> None:
    keys = aged(cache)
    fresh(cache, [keys[0], keys[2]]).release()
    assert evicted(cache, keys, 3) == [keys[1], keys[3], keys[4]]


# At once


def test_what_is_read_while_objects_come_and_go_is_right(join: Join) -> None:
    """Each thread of several caches puts, deletes, evicts and reads; contents tell a wrong object at once."""
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    caches = [join() for _ in range(3)]
    keys = [b"%d" % i for i in range(40)]
    numbers = itertools.count(seed)
    until = time.monotonic() + 1.0

    def churn(cache: Cache) -> None:
        rng = random.Random(next(numbers))
        while time.monotonic() < until:
            key, what = rng.choice(keys), rng.randrange(4)
            if what == 0:
                cache.delete([key])
            elif what == 1:
                cache.evict(rng.randint(1, 20) * BLOCK)
            else:
                cache.put(key, pattern(key, SIZE))

    def read(cache: Cache, how: Read) -> None:
        rng = random.Random(next(numbers))
        while time.monotonic() < until:
            chosen = rng.sample(keys, 8)
            with how(cache, chosen) as batch:
                for key, data in zip(chosen, contents(batch), strict=True):
                    assert data is None or data == pattern(key, SIZE)

    jobs: list[Callable[[], object]] = [partial(churn, cache) for cache in caches[:2]]
    jobs += [partial(read, cache, how) for cache in caches[1:] for how in (fresh, to_store)]
    run_all(jobs)
    check_nothing_leaked(caches[0])


def test_grants_and_claims_beside_fresh_reads_add_up(cache: Cache, hasty_switches: None) -> None:
    """All of one lane's share word is changed at once."""
    del hasty_switches
    fill(cache, [b"a"])
    rounds = 3000
    over = threading.Event()

    def grant() -> None:
        for _ in range(rounds):
            assert cache.reserve_read([b"a"]) == [OK]

    def claim() -> None:
        for _ in range(rounds):
            cache.read([b"a"]).release()

    def take(how: Read) -> None:
        while not over.is_set():
            batch = how(cache, [b"a"])
            assert batch.status == [OK]
            batch.release()

    takers = [threading.Thread(target=take, args=(how,)) for how in (fresh, to_store)]
    for taker in takers:
        taker.start()
    try:
        run_all([grant, claim])
    finally:
        over.set()
        for taker in takers:
            taker.join(TIMEOUT_S)
    reserved, held, claims = have(cache)
    assert (reserved + claims, held) == (rounds, 0)
    assert cache.cancel_read([b"a"] * reserved) == [OK] * reserved
    check_nothing_leaked(cache)


def test_keys_may_be_rows(cache: Cache) -> None:
    fill(cache, [b"aa", b"bb"])
    with cache._take(np.frombuffer(b"aaccbb", np.uint8).reshape(3, 2), 4) as batch:
        assert batch.status == [OK, NOT_FOUND, OK]
