"""What goes when room is needed, what stays, and what a lease ends: least worth first, never what is held."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from arena_support import Join, contents, pattern

from shmcache import ArenaConfig, Cache, ReadBatch, Status, WriteBatch

OK, NOT_FOUND, NO_SPACE, LOCKED = Status.OK, Status.NOT_FOUND, Status.NO_SPACE, Status.LOCKED
NOT_OWNER, NO_SHARE, IN_FLIGHT = Status.NOT_OWNER, Status.NO_SHARE, Status.IN_FLIGHT

BLOCK = 4096
BLOCKS = 16
LEASE_S = 0.05
PATIENCE_S = 30.0

SMALL = ArenaConfig(BLOCKS * BLOCK, block_size=BLOCK, slots=BLOCKS, lanes=8)
# More slots than a scan a victim is for: the arena keeps a list of victims.
LARGE = ArenaConfig(BLOCKS * BLOCK, block_size=BLOCK, slots=4096, lanes=8)
BOTH = pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "victim-list"])
# By time alone, for who writes the same keys again and again.
LRU = pytest.mark.parametrize(
    "config", [replace(config, eviction="lru") for config in (SMALL, LARGE)], ids=["small", "victim-list"]
)
SHORT_READ_LEASE = ArenaConfig(BLOCKS * BLOCK, block_size=BLOCK, lanes=8, read_lease_s=LEASE_S)
SHORT_WRITE_LEASE = ArenaConfig(BLOCKS * BLOCK, block_size=BLOCK, lanes=8, write_lease_s=LEASE_S)


def age() -> None:
    """Longer than recency is rounded to, so that what comes after is newer."""
    time.sleep(0.01)


def outlive_lease() -> None:
    time.sleep(2 * LEASE_S)


def name_of(number: int) -> bytes:
    return b"%d" % number


def fill(cache: Cache, blocks: int = 1) -> list[bytes]:
    """Objects of so many blocks each until the arena is full, the first the oldest."""
    keys = [name_of(i) for i in range(BLOCKS // blocks)]
    for key in keys:
        assert cache.put(key, pattern(key, blocks * BLOCK)) == OK
        age()
    return keys


def there(cache: Cache, keys: list[bytes]) -> list[bytes]:
    return [key for key, status in zip(keys, cache.status(keys), strict=True) if status == OK]


def evictions(cache: Cache) -> int:
    return cache.stats().counters.evictions


def put(cache: Cache, key: bytes, blocks: int = 1) -> Status:
    return cache.put(key, pattern(key, blocks * BLOCK))


# Which goes first


@BOTH
def test_the_oldest_goes_first(cache: Cache) -> None:
    keys = fill(cache)
    for n in range(1, 5):
        assert put(cache, b"new%d" % n) == OK
        assert there(cache, keys) == keys[n:]
    stats = cache.stats()
    assert (stats.counters.evictions, stats.counters.evicted_bytes) == (4, 4 * BLOCK)
    assert stats.used_bytes == stats.capacity


@BOTH
@pytest.mark.parametrize("how", ["read", "touch", "reserve_read"])
def test_what_was_used_is_newer(cache: Cache, how: str) -> None:
    keys = fill(cache)
    if how == "read":
        cache.read([keys[0], keys[2]]).release()
    elif how == "touch":
        assert cache.touch([keys[0], keys[2]]) == [OK, OK]
    else:
        cache.reserve_read([keys[0], keys[2]])
        cache.finish_read([keys[0], keys[2]])
    assert cache.evict(4 * BLOCK) == 4 * BLOCK
    assert there(cache, keys) == [keys[0], keys[2], *keys[6:]]


@pytest.mark.parametrize("how", ["lookup", "status"])
def test_what_was_only_looked_up_is_not_newer(cache: Cache, how: str) -> None:
    cache.put(b"old", b"x")
    age()
    cache.put(b"new", b"x")
    age()
    getattr(cache, how)([b"old"])
    cache.evict(1)
    assert there(cache, [b"old", b"new"]) == [b"new"]


def use(cache: Cache, keys: list[bytes], how: str) -> None:
    if how == "read":
        cache.read(keys).release()
    elif how == "touch":
        cache.touch(keys)
    elif how == "reserve_read":
        cache.reserve_read(keys)
        cache.finish_read(keys)


@pytest.mark.parametrize("how", ["write", "read", "touch", "reserve_read"])
@pytest.mark.parametrize("length", [2, 33, 200])
def test_of_a_chain_the_suffix_goes_first(cache: Cache, length: int, how: str) -> None:
    chain = [name_of(i) for i in range(length)]
    cache.reserve_write(chain, BLOCK).publish()
    age()
    use(cache, chain, how)
    for left in range(length - 1, -1, -max(1, length // 20)):
        cache.evict(cache.stats().used_bytes - left * BLOCK)
        assert there(cache, chain) == chain[:left]


@pytest.mark.parametrize("how", ["read", "touch", "reserve_read"])
@pytest.mark.parametrize("prefix", [1, 31, 40, 99])
def test_of_a_chain_whose_prefix_was_just_used_the_suffix_goes_first(cache: Cache, prefix: int, how: str) -> None:
    chain = [name_of(i) for i in range(100)]
    cache.reserve_write(chain, BLOCK).publish()
    age()
    use(cache, chain[:prefix], how)
    use(cache, chain, how)
    for left in range(95, -1, -5):
        cache.evict(cache.stats().used_bytes - left * BLOCK)
        assert there(cache, chain) == chain[:left]


@BOTH
def test_an_older_chain_goes_before_a_newer_one(cache: Cache) -> None:
    old, new = ([b"%s%d" % (chain, i) for i in range(BLOCKS // 2)] for chain in (b"old", b"new"))
    for chain in (old, new):
        cache.reserve_write(chain, BLOCK).publish()
        age()
    assert cache.evict(6 * BLOCK) == 6 * BLOCK
    assert len(there(cache, old)) == BLOCKS // 2 - 6
    assert there(cache, new) == new
    cache.read(old[:2]).release()
    assert cache.evict(6 * BLOCK) == 6 * BLOCK
    assert there(cache, old) == old[:2]


# What stays


@BOTH
@pytest.mark.parametrize("kept_by", ["held", "reserved", "written"])
def test_no_space_evicts_nothing(cache: Cache, kept_by: str) -> None:
    """Every run of three blocks has a block that stays, though eleven blocks of sixteen could go."""
    keys = [name_of(i) for i in range(BLOCKS)]
    kept = [*keys[2::3]]
    others = [key for key in keys if key not in kept]
    for key in keys:
        batch = cache.reserve_write([key], BLOCK)
        assert batch._refs[0].offset == keys.index(key) * BLOCK, "the test needs them in this order"
        assert batch.publish() == [OK]
    keep, undo = keepers(cache, kept)[kept_by]
    keep()
    before = evictions(cache)
    assert put(cache, b"wide", 3) == NO_SPACE
    assert cache.reserve_write([b"wide", b"wider"], [3 * BLOCK, 4 * BLOCK]).status == [NO_SPACE, NO_SPACE]
    assert evictions(cache) == before
    assert there(cache, others) == others
    assert cache.stats().counters.no_space == 3
    assert put(cache, b"narrow", 2) == OK
    assert evictions(cache) == before + 2
    undo()
    assert put(cache, b"wide", 3) == OK
    assert cache.verify() == []


def keepers(cache: Cache, keys: list[bytes]) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ways to keep objects from eviction, and to end that."""
    batches: list[WriteBatch] = []
    reads: list[ReadBatch] = []

    def write() -> None:
        assert cache.delete(keys) == [OK] * len(keys)
        batches.append(cache.reserve_write(keys, BLOCK))
        assert batches[-1].status == [OK] * len(keys)

    return {
        "held": (lambda: reads.append(cache.read(keys)), lambda: reads.pop().release()),
        "reserved": (lambda: cache.reserve_read(keys), lambda: cache.finish_read(keys)),
        "written": (write, lambda: batches.pop().abort()),
    }


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size=BLOCK, slots=3, lanes=2)])
def test_no_space_for_want_of_slots(cache: Cache) -> None:
    for key in (b"a", b"b", b"c"):
        put(cache, key)
        age()
    with cache.read([b"a", b"b"]):
        assert put(cache, b"d") == OK
        assert there(cache, [b"a", b"b", b"c", b"d"]) == [b"a", b"b", b"d"]
        with cache.read([b"d"]):
            assert put(cache, b"e") == NO_SPACE
        assert evictions(cache) == 1
        assert put(cache, b"e") == OK
    assert there(cache, [b"a", b"b", b"d", b"e"]) == [b"a", b"b", b"e"]


@BOTH
def test_what_is_wider_than_the_arena_evicts_nothing(cache: Cache) -> None:
    keys = fill(cache, 4)
    assert cache.reserve_write([b"w"], BLOCKS * BLOCK + 1).status == [NO_SPACE]
    assert cache.reserve_write([b"w"], 2**48).status == [NO_SPACE]
    assert there(cache, keys) == keys
    assert evictions(cache) == 0


@BOTH
def test_the_whole_arena_can_be_one_object(cache: Cache) -> None:
    keys = fill(cache)
    assert put(cache, b"w", BLOCKS) == OK
    assert there(cache, [*keys, b"w"]) == [b"w"]
    with cache.read([b"w"]) as batch:
        assert contents(batch) == [pattern(b"w", BLOCKS * BLOCK)]


# Which run goes


def cost(run: range, runs: dict[bytes, range], order: list[bytes], kept: set[bytes]) -> float:
    """What a run costs: as much as the newest object in it; what stays cannot be paid for."""
    hit = [key for key, blocks in runs.items() if set(blocks) & set(run)]
    return float("inf") if kept & set(hit) else max((1 + order.index(key) for key in hit), default=0)


def all_runs(blocks: int) -> list[range]:
    return [range(first, first + blocks) for first in range(BLOCKS - blocks + 1)]


def random_objects(cache: Cache, rng: random.Random) -> tuple[dict[bytes, range], list[bytes]]:
    """Objects of mixed sizes with gaps between them: their blocks, and their keys from the oldest on."""
    runs: dict[bytes, range] = {}
    for i in range(BLOCKS):
        key, blocks = name_of(i), rng.randint(1, 4)
        if min(cost(run, runs, list(runs), set()) for run in all_runs(blocks)) > 0:
            break
        batch = cache.reserve_write([key], blocks * BLOCK)
        first = batch._refs[0].offset // BLOCK
        runs[key] = range(first, first + blocks)
        batch.publish()
        time.sleep(1e-5)
    order = list(runs)
    for key in rng.sample(order, len(order) // 3):
        cache.touch([key])
        order.append(order.pop(order.index(key)))
        time.sleep(1e-5)
    for key in rng.sample(order, len(order) // 5):
        cache.delete([key])
        order.remove(key)
        del runs[key]
    return runs, order


@LRU
def test_the_run_that_is_worth_least_goes(cache: Cache) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"{seed=}")
    rng = random.Random(seed)
    for _ in range(150):
        runs, order = random_objects(cache, rng)
        kept = set(rng.sample(order, rng.randint(0, len(order) // 2)))
        wanted = rng.randint(1, 8)
        least = min(cost(run, runs, order, kept) for run in all_runs(wanted))
        with cache.read(sorted(kept)):
            batch = cache.reserve_write([b"new"], wanted * BLOCK)
            if least == float("inf"):
                assert batch.status == [NO_SPACE]
                assert sorted(there(cache, order)) == sorted(order)
            else:
                assert batch.status == [OK]
                first = batch._refs[0].offset // BLOCK
                assert cost(range(first, first + wanted), runs, order, kept) == least
                stay = {key for key in order if set(runs[key]).isdisjoint(range(first, first + wanted))}
                assert set(there(cache, order)) == stay
            batch.abort()
            assert cache.verify() == []
        cache.clear()


@pytest.mark.parametrize("config", [ArenaConfig(4000 * BLOCK, block_size=BLOCK, lanes=2)])
def test_a_list_of_victims_is_kept_up_with_what_happens_meanwhile(cache: Cache) -> None:
    keys = [name_of(i) for i in range(3000)]
    for key in keys:
        assert cache.put(key, key) == OK
    assert cache.evict(700 * BLOCK) == 700 * BLOCK, "more than one list is long"
    assert there(cache, keys) == keys[700:]
    age()
    cache.touch(keys[700:800])
    with cache.read(keys[800:810]):
        cache.delete(keys[810:820])
        assert cache.evict(100 * BLOCK) == 100 * BLOCK
        assert there(cache, keys) == [*keys[700:810], *keys[920:]]
    for key in keys[:300]:
        assert cache.put(key, b"again") == OK
    assert cache.evict(2080 * BLOCK) == 2080 * BLOCK
    assert cache.verify() == []
    assert there(cache, keys[920:]) == []
    assert set(keys[:300]) <= set(there(cache, keys))


# Evicting and clearing on demand


@BOTH
def test_evict_frees_as_much_as_was_asked_for(cache: Cache) -> None:
    keys = fill(cache, 2)
    assert cache.evict(0) == 0
    assert there(cache, keys) == keys
    assert cache.evict(1) == 2 * BLOCK
    assert cache.evict(2 * BLOCK + 1) == 4 * BLOCK
    assert there(cache, keys) == keys[3:]
    with cache.read([keys[3]]):
        assert cache.evict(2**62) == (len(keys) - 4) * 2 * BLOCK
        assert there(cache, keys) == [keys[3]]
        assert cache.evict(1) == 0
    assert cache.evict(1) == 2 * BLOCK
    stats = cache.stats()
    assert (stats.used_bytes, stats.objects, stats.counters.evictions) == (0, 0, len(keys))


def test_clear_deletes_what_is_not_locked(join: Join) -> None:
    cache, other = join(), join()
    keys = [name_of(i) for i in range(10)]
    for key in keys:
        put(cache, key)
    other.reserve_read(keys[1:2])
    with other.read(keys[:1]), cache.reserve_write([b"w"], 10) as batch:
        assert cache.clear() == 8
        assert there(cache, keys) == keys[:2]
        assert cache.clear() == 0
        assert cache.status([b"w"]) == [IN_FLIGHT]
        batch.abort()
    assert other.finish_read(keys[1:2]) == [OK]
    assert cache.clear() == 2
    stats = cache.stats()
    assert (stats.used_bytes, stats.counters.deletes, stats.counters.evictions) == (0, 10, 0)


# Temporary objects


def publish_temporary(cache: Cache, keys: list[bytes], extra_count: int | None = None) -> None:
    batch = cache.reserve_write(keys, 100, temporary=True)
    assert (batch.publish() if extra_count is None else batch.publish_and_reserve_read(extra_count)) == [OK] * len(keys)


def test_a_temporary_object_goes_with_its_last_share(join: Join) -> None:
    ranks = [join("engine", rank, 2) for rank in (0, 1)]
    publish_temporary(ranks[0], [b"t"], 1)
    first = ranks[0].read([b"t"])
    second = ranks[0].read([b"t"])
    first.release()
    assert ranks[0].status([b"t"]) == [OK], "another share is held, and one reserved"
    second.release()
    assert ranks[0].status([b"t"]) == [OK], "one is reserved"
    with ranks[1].read([b"t"]) as batch:
        assert batch.status == [OK]
    assert ranks[0].status([b"t"]) == [NOT_FOUND]
    assert ranks[0].stats().used_bytes == 0
    assert ranks[0].stats().counters.claims == 2


@pytest.mark.parametrize("how", ["finish_read", "cancel_read", "close", "forced delete"])
def test_a_temporary_object_that_nobody_read_goes_with_its_last_share(join: Join, how: str) -> None:
    controller, ranks = join("engine", None, 2), [join("engine", rank, 2) for rank in (0, 1)]
    publish_temporary(controller, [b"t"], 1)
    assert ranks[0].finish_read([b"t"]) == [OK]
    assert controller.status([b"t"]) == [OK]
    if how == "finish_read":
        assert ranks[1].finish_read([b"t"]) == [OK]
    elif how == "cancel_read":
        assert controller.cancel_read([b"t"], 1) == [OK]
    elif how == "close":
        ranks[1].close()
    else:
        assert controller.delete([b"t"], force=True) == [OK]
    assert controller.status([b"t"]) == [NOT_FOUND]
    assert controller.stats().used_bytes == 0


def test_a_temporary_object_without_shares_waits_for_a_reader(cache: Cache) -> None:
    publish_temporary(cache, [b"t", b"u"])
    assert cache.status([b"t", b"u"]) == [OK, OK]
    with cache.read([b"t", b"u", b"t"]):
        assert cache.stats().held == 3
    assert cache.status([b"t", b"u"]) == [NOT_FOUND] * 2
    cache.put(b"t", b"x")
    cache.read([b"t"]).release()
    assert cache.status([b"t"]) == [OK], "another object of that key is not temporary"


# Read leases


@pytest.mark.parametrize("config", [SHORT_READ_LEASE])
def test_eviction_revokes_reserved_shares_after_their_lease(join: Join) -> None:
    controller, rank = join("engine", None, 2), join("engine", 0, 2)
    put(controller, b"a", BLOCKS)
    controller.reserve_read([b"a"], 1)
    controller.reserve_read([b"a"])
    outlive_lease()
    assert rank.finish_read([b"a"]) == [OK], "time alone takes nothing"
    assert controller.stats().counters.leases_revoked == 0
    assert put(controller, b"b", BLOCKS) == OK
    assert controller.stats().counters.leases_revoked == 2
    assert controller.stats().reserved == 0
    assert rank.finish_read([b"a", b"b"]) == [NOT_FOUND, NO_SHARE]
    assert controller.verify() == []


@pytest.mark.parametrize("config", [SHORT_READ_LEASE])
def test_a_new_grant_renews_the_lease(cache: Cache) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        put(cache, b"a", BLOCKS)
        cache.reserve_read([b"a"])
        outlive_lease()
        granted = time.monotonic()
        cache.reserve_read([b"a"])
        freed = cache.evict(1)
        if time.monotonic() - granted < LEASE_S:
            break  # or this process was not run for so long that the new lease is over, too
    assert freed == 0
    outlive_lease()
    assert cache.evict(1) == BLOCKS * BLOCK


def test_an_unexpired_lease_keeps_what_is_reserved(cache: Cache) -> None:
    put(cache, b"a")
    cache.reserve_read([b"a"])
    outlive_lease()
    assert cache.evict(1) == 0
    assert cache.delete([b"a"]) == [LOCKED]
    assert cache.read([b"a"]).status == [OK]
    assert cache.stats().counters.claims == 1


@pytest.mark.parametrize("config", [SHORT_READ_LEASE])
def test_time_never_takes_a_held_share(join: Join) -> None:
    first, second = join("engine", 0, 2), join("engine", 1, 2)
    put(first, b"a", BLOCKS)
    first.reserve_read([b"a"], 1)
    with first.read([b"a"]) as batch:
        outlive_lease()
        assert second.evict(1) == 0
        assert put(second, b"b") == NO_SPACE
        assert second.delete([b"a"], force=True) == [LOCKED]
        assert second.clear() == 0
        assert contents(batch) == [pattern(b"a", BLOCKS * BLOCK)]
        assert first.stats().reserved == 1, "the other share is not revoked for nothing"
    assert first.stats().counters.leases_revoked == 0
    assert second.evict(1) == BLOCKS * BLOCK


# Write leases


@pytest.fixture
def writers(join: Join) -> tuple[Cache, Cache]:
    return join("engine", 0, 2), join("engine", 1, 2)


def test_a_writer_within_its_lease_keeps_the_key(writers: tuple[Cache, Cache]) -> None:
    first, second = writers
    batch = first.reserve_write([b"k"], 100)
    outlive_lease()
    assert second.reserve_write([b"k"], 100).status == [IN_FLIGHT]
    assert second.put(b"k", b"x") == IN_FLIGHT
    assert batch.publish() == [OK]
    assert first.stats().counters.writes_detached == 0


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
def test_a_lease_that_nobody_wants_to_end_goes_on(cache: Cache) -> None:
    batch = cache.reserve_write([b"k", b"l"], 100)
    outlive_lease()
    assert cache.finish_write([b"l"]) == [OK]
    assert batch.publish() == [OK, Status.EXISTS]


def finish(cache: Cache, batch: WriteBatch, how: str) -> list[Status]:
    """Ends the write of k in one of the ways that there are."""
    if how.startswith("batch."):
        ended: list[Status] = getattr(batch, how.removeprefix("batch."))()
    else:
        ended = getattr(cache, how)([b"k"])
    return ended


ENDS = [
    "batch.publish",
    "batch.publish_and_reserve_read",
    "batch.abort",
    "finish_write",
    "finish_write_and_reserve_read",
    "abort_write",
]


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_a_writer_beyond_its_lease_loses_the_key_not_the_memory(
    writers: tuple[Cache, Cache], how: str, published: bool
) -> None:
    first, second = writers
    slow = first.reserve_write([b"k"], 3 * BLOCK)
    outlive_lease()
    quick = second.reserve_write([b"k"], BLOCK)
    assert quick.status == [OK]
    assert first.stats().counters.writes_detached == 1
    assert first.stats().used_bytes == 4 * BLOCK, "the memory is still the slow writer's"
    assert quick.views[0] is not None
    assert slow.views[0] is not None
    quick.views[0][:] = pattern(b"quick", BLOCK)
    slow.views[0][:] = pattern(b"slow", 3 * BLOCK)
    if published:
        assert quick.publish() == [OK]
    assert finish(first, slow, how) == [NOT_OWNER]
    assert first.stats().used_bytes == BLOCK
    assert first.stats().reserved == 0
    if not published:
        assert quick.publish() == [OK]
    with first.read([b"k"]) as found:
        assert contents(found) == [pattern(b"quick", BLOCK)]
    assert first.verify() == []
    if not how.startswith("batch."):
        assert slow.publish() == [NOT_FOUND]


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
def test_closing_gives_back_what_a_lease_ended(writers: tuple[Cache, Cache]) -> None:
    first, second = writers
    slow = first.reserve_write([b"k"], 3 * BLOCK)
    outlive_lease()
    assert second.put(b"k", b"x") == OK
    assert slow.status == [OK]
    first.close()
    stats = second.stats()
    assert (stats.used_bytes, stats.writing) == (BLOCK, 0)
    assert second.verify() == []


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
def test_a_lane_can_take_the_key_from_itself(cache: Cache) -> None:
    slow = cache.reserve_write([b"k"], 3 * BLOCK)
    outlive_lease()
    quick = cache.reserve_write([b"k"], BLOCK)
    assert quick.status == [OK]
    assert cache.stats().writing == 2
    assert slow.publish() == [NOT_OWNER]
    assert quick.publish() == [OK]
    assert cache.stats().used_bytes == BLOCK
    assert cache.verify() == []
