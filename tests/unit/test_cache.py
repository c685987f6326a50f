"""A cache as a whole: waiting, statistics, close, threads and forks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S, Join, contents, descriptors, mappings, pattern, run_all, run_python, started

import shmcache
from shmcache import ArenaConfig, Cache, ClosedError, Status, ViewInUseError

OK, NOT_FOUND, IN_FLIGHT = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT

BLOCK = 4096

CALLS: dict[str, Callable[[Cache], object]] = {
    "reserve_write": lambda cache: cache.reserve_write([b"k"], 8),
    "finish_write": lambda cache: cache.finish_write([b"k"]),
    "finish_write_and_reserve_read": lambda cache: cache.finish_write_and_reserve_read([b"k"]),
    "abort_write": lambda cache: cache.abort_write([b"k"]),
    "put": lambda cache: cache.put(b"k", b"x"),
    "lookup": lambda cache: cache.lookup([b"k"]),
    "status": lambda cache: cache.status([b"k"]),
    "reserve_read": lambda cache: cache.reserve_read([b"k"]),
    "read": lambda cache: cache.read([b"k"]),
    "read and wait": lambda cache: cache.read([b"k"], wait_s=1),
    "finish_read": lambda cache: cache.finish_read([b"k"]),
    "cancel_read": lambda cache: cache.cancel_read([b"k"]),
    "touch": lambda cache: cache.touch([b"k"]),
    "delete": lambda cache: cache.delete([b"k"]),
    "evict": lambda cache: cache.evict(1),
    "clear": lambda cache: cache.clear(),
    "reap": lambda cache: cache.reap(),
    "verify": lambda cache: cache.verify(),
    "stats": lambda cache: cache.stats(),
    "add_region": lambda cache: cache.add_region("cuda:0", 8192),
    "open_region": lambda cache: cache.open_region(1),
    "remove_region": lambda cache: cache.remove_region(1),
    "pin": lambda cache: cache.pin(),
    "unpin": lambda cache: cache.unpin(),
    "read nothing": lambda cache: cache.read([]),
    "status of nothing": lambda cache: cache.status([]),
}


def test_every_public_method_is_called_here() -> None:
    public = {name for name in dir(Cache) if not name.startswith("_")}
    attributes = {"close", "closed"}
    assert public - attributes <= {name.split(" ", maxsplit=1)[0] for name in CALLS}


# Removing


def test_a_forced_delete_that_is_refused_takes_nothing(join: Join) -> None:
    first, second = join("engine", 0, 2), join("engine", 1, 2)
    for reader in (first, second):
        first.put(b"k", b"x")
        first.reserve_read([b"k"], 1)
        with reader.read([b"k"]):
            assert first.delete([b"k"], force=True) == [Status.LOCKED]
            assert first.stats().reserved == 1, "a share that was granted is still there"
        assert first.delete([b"k"], force=True) == [OK]


# Waiting


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Runs work in a thread a moment after the block has begun."""
    thread = threading.Timer(0.05, work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_read_waits_for_a_writer(join: Join) -> None:
    writer, reader = join(), join()
    batch = writer.reserve_write([b"a", b"b"], 100)
    for view, key in zip(batch.views, batch.keys, strict=True):
        assert view is not None
        view[:] = pattern(key, 100)
    with meanwhile(batch.publish), reader.read([b"a", b"zz", b"b"], wait_s=TIMEOUT_S) as found:
        assert found.status == [OK, NOT_FOUND, OK]
        assert contents(found) == [pattern(b"a", 100), None, pattern(b"b", 100)]
    counters = reader.stats().counters
    assert (counters.read_hits, counters.read_misses) == (2, 3), "found in flight first, then read"


def test_a_read_that_waits_learns_of_an_abort(join: Join) -> None:
    writer, reader = join(), join()
    batch = writer.reserve_write([b"a"], 100)
    with meanwhile(batch.abort):
        assert reader.read([b"a"], wait_s=TIMEOUT_S).status == [NOT_FOUND]


def test_a_read_waits_no_longer_than_it_was_told(join: Join) -> None:
    writer, reader = join(), join()
    with writer.reserve_write([b"a"], 100):
        began = time.monotonic()
        assert reader.read([b"a"], wait_s=0.1).status == [IN_FLIGHT]
        assert time.monotonic() - began >= 0.1
        assert reader.read([b"a"]).status == [IN_FLIGHT]
        assert reader.stats().held == 0


def test_a_read_does_not_wait_for_what_nobody_writes(cache: Cache) -> None:
    cache.put(b"a", b"x")
    began = time.monotonic()
    assert cache.read([b"a", b"zz"], wait_s=10 * TIMEOUT_S).status == [OK, NOT_FOUND]
    assert time.monotonic() - began < TIMEOUT_S


def test_a_prefix_waits_for_its_first_gap_only(join: Join) -> None:
    writer, reader = join(), join()
    first, second = writer.reserve_write([b"b"], 8), writer.reserve_write([b"d"], 8)
    for key in (b"a", b"c"):
        writer.put(key, b"x")
    with meanwhile(first.publish), reader.read([b"a", b"b", b"c", b"zz", b"d"], prefix=True, wait_s=TIMEOUT_S) as found:
        assert found.status == [OK, OK, OK, NOT_FOUND, NOT_FOUND]
        assert reader.stats().held == 3
    second.abort()


WRITER = """
import sys, time, shmcache
cache = shmcache.attach(sys.argv[1])
batch = cache.reserve_write([b"w"], 8)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_read_that_waits_notices_the_death_of_the_writer(arena: str, cache: Cache) -> None:
    with started(WRITER, arena) as writer, meanwhile(writer.kill):
        assert cache.read([b"w"], wait_s=10 * TIMEOUT_S).status == [NOT_FOUND]
    assert cache.stats().counters.reaped_writes == 1
    assert cache.verify() == []


# Statistics


def test_statistics_tell_what_happened(cache: Cache) -> None:
    assert cache.stats().hit_rate is None
    cache.put(b"a", bytes(5000))
    with cache.reserve_write([b"b", b"c"], 100) as batch:
        stats = cache.stats()
        assert (stats.objects, stats.writing, stats.used_bytes) == (1, 2, 4 * BLOCK)
        batch.abort()
    cache.lookup([b"a", b"zz", b"a"])
    cache.reserve_read([b"a"])
    with cache.read([b"a", b"a", b"zz"]):
        stats = cache.stats()
        assert (stats.held, stats.reserved, stats.lanes_alive, stats.lanes_dead) == (2, 0, 1, 0)
    cache.evict(1)
    cache.put(b"a", b"x")
    cache.delete([b"a", b"zz"])
    stats = cache.stats()
    assert stats.hit_rate == pytest.approx(2 / 3)
    assert (stats.objects, stats.held, stats.used_bytes, stats.slots) == (0, 0, 0, 256)
    assert (stats.capacity, stats.block_size) == (1 << 20, BLOCK)
    assert stats.counters == shmcache.Counters(
        lookup_hits=1,
        lookup_misses=1,
        read_hits=2,
        read_misses=1,
        claims=1,
        grants=1,
        releases=2,
        reservations=4,
        publishes=2,
        published_bytes=5001,
        aborts=2,
        deletes=1,
        evictions=1,
        evicted_bytes=5000,
    )


def test_counters_outlive_who_counted(join: Join) -> None:
    first = join()
    first.put(b"a", b"x")
    first.close()
    second = join()
    second.put(b"b", b"x")
    assert second.stats().counters.publishes == 2


# Close


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_cache_refuses(arena: str, join: Join, name: str) -> None:
    cache = join()
    cache.put(b"k", b"x")
    cache.close()
    with pytest.raises(ClosedError, match=arena):
        CALLS[name](cache)


def test_close_leaves_nothing(join: Join) -> None:
    before = descriptors()
    cache, other = join("engine", 0, 2), join("engine", 1, 2)
    for key in (b"a", b"b"):
        cache.put(key, b"x")
    cache.reserve_read([b"a", b"b"], 1)
    read, unread = cache.read([b"a"]), cache.read([b"b"])
    assert contents(read) == [b"x"]
    written = cache.reserve_write([b"w"], 8)
    read.release()
    assert not cache.closed
    for _ in range(2):
        cache.close()
        assert cache.closed
    assert "closed" in repr(cache)
    stats = other.stats()
    assert (stats.held, stats.reserved, stats.writing, stats.lanes_alive) == (0, 2, 0, 1), "rank 1's shares stay"
    assert other.status([b"a", b"w"]) == [OK, NOT_FOUND]
    unread.release()
    with pytest.raises(ClosedError):
        written.publish()
    other.close()
    assert descriptors() == before


def test_a_closed_cache_keeps_no_memory(arena: str, join: Join) -> None:
    """What is mapped keeps the whole segment's memory, also when its name is gone."""
    cache = join()
    cache.put(b"a", b"x")
    with cache.read([b"a"]) as batch:
        assert contents(batch) == [b"x"]
    assert mappings(arena)
    cache.close()
    assert mappings(arena) == []


@pytest.mark.parametrize("kept", ["views", "arrays", "tensors"])
@pytest.mark.parametrize("writing", [False, True])
def test_close_refuses_while_something_can_be_seen(join: Join, kept: str, writing: bool) -> None:
    cache = join()
    cache.put(b"a", b"x" * 100)
    batch = cache.reserve_write([b"w"], 100) if writing else cache.read([b"a"])
    seen = batch.views if kept == "views" else getattr(batch, kept)()
    with pytest.raises(ViewInUseError, match=cache.name):
        cache.close()
    assert not cache.closed
    stats = cache.stats()
    assert (stats.held, stats.writing) == ((0, 1) if writing else (1, 0)), "nothing was done"
    assert len(seen) == 1
    del seen
    if isinstance(batch, shmcache.WriteBatch):
        batch.publish()
    else:
        batch.release()
    cache.close()


def test_leaving_a_cache_closes_it(arena: str) -> None:
    with shmcache.attach(arena) as cache:
        cache.put(b"a", b"x")
    assert cache.closed
    assert shmcache.inspect(arena).stale


def test_an_exception_with_live_views_is_what_the_caller_of_a_cache_sees(arena: str) -> None:
    cache = shmcache.attach(arena)
    cache.put(b"a", b"x")
    batch = cache.read([b"a"])
    assert contents(batch) == [b"x"]
    with pytest.raises(KeyError), cache:
        raise KeyError
    assert not cache.closed
    batch.release()
    cache.close()


def test_a_dropped_cache_leaves_the_arena(arena: str) -> None:
    cache = shmcache.attach(arena)
    cache.put(b"a", b"x")
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del cache
    assert shmcache.inspect(arena).stale


def test_what_was_read_outlives_a_dropped_cache(arena: str) -> None:
    cache = shmcache.attach(arena)
    cache.put(b"a", b"x" * 100)
    array = cache.read([b"a"]).arrays()[0]
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del cache
    stats = shmcache.inspect(arena).stats
    assert stats is not None
    assert (stats.held, stats.lanes_alive) == (1, 1)
    assert bytes(array) == b"x" * 100
    del array
    stats = shmcache.inspect(arena).stats
    assert stats is not None
    assert stats.held == 0


# Threads

KEYS = [b"key%d" % i for i in range(24)]


def data_of(key: bytes, nbytes: int) -> bytes:
    return pattern(b"%s %d" % (key, nbytes), nbytes)


class Worker:
    """Does at random what can be done to a cache that others use, too."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.rng = random.Random(seed)
        self.done = 0

    def keys(self) -> list[bytes]:
        return self.rng.sample(KEYS, self.rng.randint(1, 6))

    def nbytes(self) -> int:
        return self.rng.choice([1, 100, BLOCK, 2 * BLOCK + 1, 4 * BLOCK])

    def run(self, steps: int) -> None:
        actions = [self.put, self.write, self.read, self.read, self.reserve, self.remove, self.look]
        for _ in range(steps):
            self.rng.choice(actions)()
            self.done += 1

    def put(self) -> None:
        key, nbytes = self.rng.choice(KEYS), self.nbytes()
        self.cache.put(key, data_of(key, nbytes))

    def write(self) -> None:
        with self.cache.reserve_write(self.keys(), self.nbytes(), temporary=self.rng.random() < 0.2) as batch:
            for key, view in zip(batch.keys, batch.views, strict=True):
                if view is not None:
                    view[:] = data_of(key, len(view))
            if self.rng.random() < 0.2:
                batch.abort()

    def read(self) -> None:
        with self.cache.read(self.keys(), prefix=self.rng.random() < 0.5) as batch:
            for _ in range(2):
                for key, seen in zip(batch.keys, contents(batch), strict=True):
                    assert seen is None or seen == data_of(key, len(seen))
                time.sleep(0)

    def reserve(self) -> None:
        keys = self.keys()
        granted = [key for key, status in zip(keys, self.cache.reserve_read(keys), strict=True) if status == OK]
        time.sleep(0)
        self.cache.finish_read(granted)

    def remove(self) -> None:
        if self.rng.random() < 0.5:
            self.cache.delete(self.keys())
        else:
            self.cache.evict(self.rng.randint(1, 4) * BLOCK)

    def look(self) -> None:
        self.cache.touch(self.keys())
        self.cache.lookup(self.keys())
        self.cache.stats()


@pytest.mark.usefixtures("hasty_switches")
@pytest.mark.parametrize("config", [ArenaConfig(32 * BLOCK, block_size=BLOCK, slots=20, lanes=4)])
def test_many_threads_on_one_cache(cache: Cache) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"{seed=}")
    workers = [Worker(cache, seed + i) for i in range(8)]
    run_all([lambda worker=worker: worker.run(600) for worker in workers])  # type: ignore[misc] # mypy: a default
    assert [worker.done for worker in workers] == [600] * 8
    assert cache.verify() == []
    stats = cache.stats()
    assert (stats.held, stats.reserved, stats.writing) == (0, 0, 0)
    assert stats.counters.evictions > 0
    assert stats.counters.read_hits > 0
    cache.clear()
    assert (cache.stats().objects, cache.stats().used_bytes) == (0, 0)


@pytest.mark.usefixtures("hasty_switches")
def test_a_batch_that_two_threads_release_gives_its_share_back_once(cache: Cache) -> None:
    cache.put(b"k", b"x")
    with cache.read([b"k"]):
        for i in range(300):
            batch = cache.read([b"k"])
            if i % 2:
                assert contents(batch) == [b"x"]
            together = threading.Barrier(4)

            def release() -> None:
                together.wait()  # noqa: B023 # the threads end before the next turn
                batch.release()  # noqa: B023

            run_all([release] * 4)
            assert cache.stats().held == 1


# Puts large objects in one thread while another closes the cache.
CLOSER = """
import sys, threading, time, shmcache
data = b"x" * (16 << 20)
def work(cache, started):
    started.set()
    try:
        for i in range(1000):
            cache.put(b"%d" % i, data)
            cache.delete([b"%d" % i])
    except shmcache.ClosedError:
        pass
for i in range(20):
    cache = shmcache.attach(sys.argv[1], create=shmcache.ArenaConfig("64MiB", block_size="64KiB", lanes=2))
    started = threading.Event()
    thread = threading.Thread(target=work, args=(cache, started))
    thread.start()
    started.wait()
    time.sleep(0.02)
    cache.close()
    thread.join()
with shmcache.attach(sys.argv[1]) as cache:
    print(cache.verify(), cache.stats().writing)
"""


def test_closing_while_another_thread_puts(arena_name: str) -> None:
    done = run_python(CLOSER, arena_name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 0\n", "")


@pytest.mark.usefixtures("hasty_switches")
def test_closing_while_other_threads_read(arena: str, join: Join) -> None:
    for _ in range(10):
        cache = join()
        cache.put(b"k", b"x" * 100)

        def read(cache: Cache = cache) -> None:
            with suppress(ClosedError):
                while True:
                    cache.read([b"k"]).release()

        def close(cache: Cache = cache) -> None:
            time.sleep(0.005)
            cache.close()

        run_all([read, read, read, close])
        stats = shmcache.inspect(arena).stats
        assert stats is not None
        assert (stats.held, stats.lanes_alive) == (0, 0)


# Forks

# Tries everything in a forked child, which ends as a Python program does, and then in the parent.
FORKS = """
import gc, os, sys, warnings, shmcache
from shmcache import ClosedError, Status
sys.path.insert(0, sys.argv[2])
from unit.test_cache import CALLS
warnings.simplefilter("error")

def refuses(call):
    try:
        call()
    except ClosedError as error:
        assert sys.argv[1] in str(error) or "batch" in str(error).lower(), error
        return
    raise AssertionError("a forked child was let in")

cache = shmcache.attach(sys.argv[1], group="engine", rank=0, world_size=1)
for key in (b"k", b"l"):
    cache.put(key, b"x" * 100)
looked_at, unread = cache.read([b"k"]), cache.read([b"l"])
views = looked_at.views
written, dropped = cache.reserve_write([b"w"], 8), cache.reserve_write([b"v"], 8)
kept = cache.reserve_write([b"u"], 8)
kept.views[0][:] = b"from the"
child = os.fork()
if child == 0:
    for name, call in CALLS.items():
        refuses(lambda: call(cache))
    for batch in (written, kept):
        for end in (batch.publish, batch.publish_and_reserve_read, batch.abort):
            refuses(end)
    refuses(lambda: unread.views)
    refuses(written.arrays)
    assert bytes(views[0]) == b"x" * 100, "what was mapped before the fork can be looked at"
    looked_at.release()
    unread.release()
    del dropped, written, views
    gc.collect()
    with shmcache.attach(sys.argv[1]) as own:
        assert own.stats().held == 2 and own.stats().writing == 3
        assert own.delete([b"k", b"l"], force=True) == [Status.LOCKED] * 2
        assert own.put(b"child", b"of its own") == Status.OK
        assert own.stats().lanes_alive == 2
    cache.close()
    assert cache.closed
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert bytes(views[0]) == b"x" * 100
assert (cache.stats().held, cache.stats().writing, cache.stats().lanes_alive) == (2, 3, 1)
assert cache.lookup([b"child", b"k"]) == 2
kept.views[0][4:] = b"fork"
assert written.publish() == dropped.publish() == kept.publish() == [Status.OK]
looked_at.release()
unread.release()
assert cache.verify() == []
with cache.read([b"u"]) as batch:
    assert bytes(batch.views[0]) == b"fromfork"
cache.close()
print("done")
"""


def test_a_forked_child_is_refused_and_its_parent_loses_nothing(arena: str) -> None:
    done = run_python(FORKS, arena, str(Path(__file__).resolve().parents[1]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# Forks a child that lives until its input ends.
PARENT = """
import os, sys, time, shmcache
cache = shmcache.attach(sys.argv[1])
cache.put(b"k", b"x")
batch = cache.read([b"k"])
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_forked_child_does_not_keep_its_parents_lane_alive(arena: str, cache: Cache) -> None:
    with started(PARENT, arena) as parent:
        assert cache.delete([b"k"]) == [Status.LOCKED]
        parent.kill()
        parent.wait()
        # The child lets go as soon as it runs, which a busy machine may put off.
        deadline = time.monotonic() + TIMEOUT_S
        while cache.stats().lanes_dead == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cache.stats().lanes_dead == 1
        assert cache.delete([b"k"]) == [OK]
    assert cache.reap() == shmcache.ReapReport()
