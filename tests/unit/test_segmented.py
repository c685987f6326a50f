"""Eviction by how many requests used an object, also before it was evicted: ``ArenaConfig(eviction="segmented")``."""

from __future__ import annotations

import random
import time

import pytest
from arena_support import TIMEOUT_S, Join

import shmcache
from shmcache import ArenaConfig, Cache, Status
from shmcache.storage import StorageManager

OK = Status.OK
BLOCK = 4096
SLOTS = 16
WINDOW_S = 0.5
RECENCY_S = 0.005  # a little more than what a reader's time is rounded to

SEGMENTED = ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=SLOTS, lanes=8)
SHORT = ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=SLOTS, lanes=8, eviction_window_s=WINDOW_S)
LRU = ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=SLOTS, lanes=8, eviction="lru")
# More slots than a scan a victim is for.
LISTED = ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=2048, lanes=8)
# For batches of more than one part.
WIDE = ArenaConfig(64 * BLOCK, block_size=BLOCK, slots=64, lanes=8)


@pytest.fixture
def config() -> ArenaConfig:
    return SEGMENTED


def put(cache: Cache, *keys: bytes) -> None:
    for key in keys:
        assert cache.put(key, key) == OK


def there(cache: Cache, keys: list[bytes]) -> list[bytes]:
    return [key for key, status in zip(keys, cache.status(keys), strict=True) if status == OK]


def evicted_in_order(cache: Cache, keys: list[bytes]) -> list[bytes]:
    """Evicts all of them, one after the other."""
    order = []
    while left := there(cache, keys):
        assert cache.evict(1) == BLOCK
        gone = set(left) - set(there(cache, keys))
        assert len(gone) == 1
        order += gone
    return order


def use(cache: Cache, key: bytes, how: str) -> None:
    if how == "read":
        cache.read([key]).release()
    elif how == "touch":
        assert cache.touch([key]) == [OK]
    else:
        assert cache.reserve_read([key]) == [OK]
        assert cache.finish_read([key]) == [OK]


USES = pytest.mark.parametrize("how", ["read", "touch", "reserve_read"])


@pytest.mark.parametrize("config", [SEGMENTED, LISTED], ids=["small", "victim-list"])
@USES
def test_what_two_requests_used_outlives_what_is_newer(cache: Cache, how: str) -> None:
    put(cache, b"a", b"b")
    use(cache, b"a", how)
    put(cache, b"c", b"d")
    assert evicted_in_order(cache, [b"a", b"b", b"c", b"d"]) == [b"b", b"c", b"d", b"a"]


@USES
def test_the_third_request_is_the_last_that_counts(cache: Cache, how: str) -> None:
    put(cache, b"twice", b"thrice", b"often")
    for key, requests in ((b"often", 4), (b"thrice", 2), (b"twice", 1)):
        for _ in range(requests):
            use(cache, key, how)
            time.sleep(RECENCY_S)
    assert evicted_in_order(cache, [b"twice", b"thrice", b"often"]) == [b"twice", b"often", b"thrice"]


@pytest.mark.parametrize("config", [SHORT])
def test_a_request_is_worth_the_window_and_no_more(cache: Cache) -> None:
    put(cache, b"a", b"b")
    cache.touch([b"a"])
    put(cache, b"c")
    time.sleep(2 * WINDOW_S)
    put(cache, b"d")
    assert evicted_in_order(cache, [b"a", b"b", b"c", b"d"]) == [b"b", b"c", b"a", b"d"]


@pytest.mark.parametrize("config", [LRU])
def test_with_lru_requests_do_not_count(cache: Cache) -> None:
    put(cache, b"a", b"b")
    for _ in range(3):
        cache.touch([b"a"])
        time.sleep(RECENCY_S)
    put(cache, b"c")
    assert evicted_in_order(cache, [b"a", b"b", b"c"]) == [b"b", b"a", b"c"]
    put(cache, b"a", b"new")  # nobody remembers it
    assert evicted_in_order(cache, [b"a", b"new"]) == [b"a", b"new"]


def test_claims_of_one_request_count_once(join: Join) -> None:
    ranks = [join("engine", rank, 4) for rank in range(4)]
    put(ranks[0], b"two requests", b"one")
    for _ in range(2):
        assert ranks[0].reserve_read([b"two requests"]) == [OK]
    assert ranks[0].reserve_read([b"one"], extra_count=3) == [OK]
    time.sleep(RECENCY_S)
    for rank in ranks:
        rank.read([b"one"]).release()
    ranks[0].read([b"two requests"]).release()
    ranks[0].finish_read([b"two requests"])
    assert evicted_in_order(ranks[0], [b"two requests", b"one"]) == [b"one", b"two requests"]


def test_what_publishes_and_grants_is_one_request(join: Join) -> None:
    ranks = [join("engine", rank, 2) for rank in range(2)]
    put(ranks[0], b"older")
    ranks[0].touch([b"older"])
    ranks[0].reserve_write([b"once"], BLOCK).publish_and_reserve_read(1)
    time.sleep(RECENCY_S)
    for rank in ranks:
        rank.read([b"once"]).release()
    assert evicted_in_order(ranks[0], [b"older", b"once"]) == [b"once", b"older"]


def test_a_prefetch_and_its_read_are_one_request(cache: Cache) -> None:
    put(cache, b"twice", b"thrice")
    for _ in range(2):
        cache.touch([b"thrice"])
    time.sleep(RECENCY_S)
    with StorageManager(cache) as storage:
        task = storage.submit_prefetch_task([b"twice"], BLOCK)
        assert storage.wait_prefetch_status(task, TIMEOUT_S).hits == 1
        with storage.read_prefetched_results([b"twice"]) as batch:
            assert batch.status == [OK]
    assert evicted_in_order(cache, [b"twice", b"thrice"]) == [b"twice", b"thrice"]


@pytest.mark.parametrize("config", [WIDE])
def test_each_key_of_a_batch_counts_by_itself(cache: Cache) -> None:
    """Of a batch of two parts all have two requests: the granted ones with the grant, and the others with the read."""
    keys = [b"%d" % i for i in range(50)]
    put(cache, *keys)
    assert cache.reserve_read(keys[10:40:3]) == [OK] * 10
    time.sleep(RECENCY_S)
    with cache.read(keys) as batch:
        assert batch.status == [OK] * 50
    put(cache, b"once", b"twice")
    cache.touch([b"twice"])
    order = [b"once", *reversed(keys), b"twice"]
    assert evicted_in_order(cache, order) == order


@pytest.mark.parametrize("config", [WIDE])
def test_the_later_part_of_a_chain_never_looks_the_younger(cache: Cache) -> None:
    """Also where the first part was used a moment ago, and is not written again."""
    chain = [b"%d" % i for i in range(40)]
    put(cache, *chain)
    for _ in range(2):
        cache.touch(chain)
    time.sleep(2 * RECENCY_S)
    cache.touch(chain[:32])
    cache.touch(chain)
    assert evicted_in_order(cache, chain) == chain[::-1]


@pytest.mark.parametrize("config", [SHORT])
def test_what_counts_no_more_is_renewed(cache: Cache) -> None:
    put(cache, b"a", b"b")
    for key in (b"a", b"a", b"b", b"b"):
        cache.touch([key])
    time.sleep(2 * RECENCY_S)
    cache.touch([b"a"])
    assert evicted_in_order(cache, [b"a", b"b"]) == [b"b", b"a"]


def test_a_place_far_back_in_a_batch_is_no_merit(cache: Cache) -> None:
    put(cache, b"a", b"b")
    cache.touch([*[b"nothing"] * 70_000, b"a"])
    time.sleep(RECENCY_S)
    cache.touch([b"b"])
    assert evicted_in_order(cache, [b"a", b"b"]) == [b"a", b"b"]


@pytest.mark.parametrize("config", [LISTED])
def test_what_is_worth_less_than_what_is_listed_goes_first(cache: Cache) -> None:
    put(cache, b"a", b"first", b"second")
    cache.touch([b"a"])
    assert cache.evict(1) == BLOCK
    assert cache.evict(1) == BLOCK
    assert there(cache, [b"a", b"first", b"second"]) == [b"a"]  # and is listed as the next
    put(cache, b"c")
    time.sleep(2 * RECENCY_S)
    assert evicted_in_order(cache, [b"a", b"c"]) == [b"c", b"a"]


@pytest.mark.parametrize("config", [ArenaConfig(SLOTS * BLOCK, block_size=BLOCK, slots=65536, lanes=2)])
def test_what_is_used_after_it_was_listed_stays(cache: Cache) -> None:
    put(cache, b"first", b"second", b"a", b"b")
    assert cache.evict(1) == BLOCK
    assert cache.evict(1) == BLOCK  # and a is listed as the next
    cache.touch([b"a"])
    assert evicted_in_order(cache, [b"a", b"b"]) == [b"b", b"a"]


# Ghosts


def test_what_comes_back_is_known(cache: Cache) -> None:
    put(cache, b"back", b"other")
    assert cache.evict(1) == BLOCK
    assert there(cache, [b"back", b"other"]) == [b"other"]
    put(cache, b"back")  # its second request
    put(cache, b"newer")
    assert evicted_in_order(cache, [b"back", b"other", b"newer"]) == [b"other", b"newer", b"back"]


def test_counts_go_on_over_evictions(cache: Cache) -> None:
    put(cache, b"often")
    for _ in range(2):
        assert cache.evict(1) == BLOCK
        put(cache, b"often")
    put(cache, b"twice")
    cache.touch([b"twice"])
    assert evicted_in_order(cache, [b"often", b"twice"]) == [b"twice", b"often"]


def test_what_made_room_for_a_wider_one_is_remembered(cache: Cache) -> None:
    keys = [b"%d" % i for i in range(SLOTS)]
    put(cache, *keys)
    assert cache.put(b"wide", bytes(2 * BLOCK)) == OK
    assert there(cache, keys) == keys[2:]
    assert cache.delete([b"wide"]) == [OK]
    assert cache.clear() == SLOTS - 2
    put(cache, *keys[:2], b"newer")
    assert evicted_in_order(cache, [*keys[:2], b"newer"]) == [b"newer", *keys[:2]]


def test_a_fourth_request_after_evictions_is_as_the_third(cache: Cache) -> None:
    for _ in range(4):
        put(cache, b"often")
        assert cache.evict(1) == BLOCK
    put(cache, b"often", b"thrice")
    for _ in range(2):
        cache.touch([b"thrice"])
    assert evicted_in_order(cache, [b"often", b"thrice"]) == [b"often", b"thrice"]


@pytest.mark.parametrize("how", ["delete", "clear", "abort"])
def test_what_was_not_evicted_is_not_remembered(cache: Cache, how: str) -> None:
    if how == "abort":
        cache.reserve_write([b"back"], BLOCK).abort()
    else:
        put(cache, b"back")
        assert cache.delete([b"back"]) == [OK] if how == "delete" else cache.clear() == 1
    put(cache, b"back", b"newer")
    assert evicted_in_order(cache, [b"back", b"newer"]) == [b"back", b"newer"]


@pytest.mark.parametrize(("epochs", "known"), [(0, True), (8, True), (9, False), (18, False), (34, False)])
def test_a_ghost_lives_for_eight_times_the_slots(cache: Cache, epochs: int, known: bool) -> None:
    put(cache, b"back")
    assert cache.evict(1) == BLOCK
    for number in range(epochs * SLOTS):
        put(cache, b"passing by %d" % number)
        assert cache.evict(1) == BLOCK
    put(cache, b"back", b"newer")
    order = [b"newer", b"back"] if known else [b"back", b"newer"]
    assert evicted_in_order(cache, [b"back", b"newer"]) == order


@pytest.mark.parametrize("config", [ArenaConfig(1024 * BLOCK, block_size=BLOCK, lanes=2)])
def test_no_ghost_is_lost_before_its_time(cache: Cache) -> None:
    """A chain is worth its prefix, so one that is lost before its neighbours costs more than its own object."""
    keys = [b"chain %d" % i for i in range(6 * 1024)]
    for start in range(0, len(keys), 1024):
        with cache.reserve_write(keys[start : start + 1024], BLOCK):
            pass
        assert cache.evict(1024 * BLOCK) == 1024 * BLOCK
    lost = 0
    for number, key in enumerate(keys[::6]):
        put(cache, key, b"newer %d" % number)
        assert cache.evict(1) == BLOCK
        lost += there(cache, [key]) == []
        cache.clear()
    assert lost == 0


@pytest.mark.parametrize("config", [ArenaConfig(1024 * BLOCK, block_size=BLOCK, lanes=2)])
def test_what_was_never_there_has_no_ghost(cache: Cache) -> None:
    mistaken = 0
    for number in range(12):
        keys = [b"%d of %d" % (i, number) for i in range(1024)]
        with cache.reserve_write(keys, BLOCK):
            pass
        assert cache.evict(1000 * BLOCK) == 1000 * BLOCK
        mistaken += len(set(there(cache, keys)) - set(keys[:24]))
        assert cache.evict(1024 * BLOCK) == 24 * BLOCK
    assert mistaken <= 1, "one in four million may be"


# Leases end together, so that a batch of grants seldom has to store one


@pytest.mark.parametrize("lease_s", [1e-6, 1.0, 1e9])
def test_a_lease_is_not_shorter_than_asked_nor_much_longer(arena_name: str, lease_s: float) -> None:
    with shmcache.attach(arena_name, create=ArenaConfig("1MiB", block_size=BLOCK, read_lease_s=lease_s)) as cache:
        cache.put(b"a", b"a")
        before = time.time()
        cache.reserve_read([b"a"])
        after = time.time()
        time.sleep(0.02)
        (share,) = shmcache.inspect(arena_name, shares=True).shares or ()
        # A lease that was rounded up makes the share look younger, a stop of who looks makes it look older.
        assert before - 60 <= share.since <= after + 0.002 + lease_s / 500


# The whole of it


class Model:
    """What is there with its count and last use, and the counts that are remembered."""

    def __init__(self) -> None:
        self.objects: dict[bytes, tuple[int, int, int]] = {}  # count, last use, minus depth
        self.ghosts: dict[bytes, int] = {}
        self.clock = 0

    def evict(self, gone: set[bytes]) -> None:
        """Of several that are worth least, the one that is gone."""
        least = min(self.objects.values())
        (key,) = gone & {key for key, worth in self.objects.items() if worth == least}
        self.ghosts[key] = self.objects.pop(key)[0]

    def put(self, key: bytes, found: set[bytes]) -> None:
        self.clock += 1
        if key in self.objects:
            return
        if len(self.objects) == SLOTS:
            self.evict(set(self.objects) - found)
        self.objects[key] = (min(3, self.ghosts.get(key, 0) + 1), self.clock, 0)

    def use(self, keys: list[bytes]) -> None:
        self.clock += 1
        for depth, key in enumerate(keys):
            if key in self.objects:
                count, _, known = self.objects[key]
                self.objects[key] = (min(3, count + 1), self.clock, min(known, -depth))


def test_as_the_model_does(cache: Cache) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"{seed=}")
    rng = random.Random(seed)
    keys = [b"key %d" % i for i in range(3 * SLOTS)]
    model = Model()
    for _ in range(250):
        some = rng.sample(keys, rng.randint(1, 4))
        time.sleep(RECENCY_S)
        if rng.random() < 0.5:
            cache.put(some[0], b"x")
            model.put(some[0], set(there(cache, keys)))
        else:
            model.use(some)
            cache.touch(some)
        assert set(there(cache, keys)) == set(model.objects)
    assert cache.verify() == []
