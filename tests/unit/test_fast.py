"""The ways of a read through the extension module: each gives every share back once, and leaves no object behind.

Throughout another batch holds a share of each object: a share that is given back twice is one of that batch's.
"""

from __future__ import annotations

import copy
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from arena_support import pattern, run_all, run_python

from shmcache import Cache, ClosedError, ReadBatch, Status, ViewInUseError, WriteBatch, _fast
from shmcache.views import managed_buffer

ROUNDS = 5
KEYS = [bytes([i]) * 32 for i in range(20)]
MISSING = b"m" * 32


class InterruptError(Exception):
    """What a test's signal handler raises."""


@pytest.fixture
def stored(cache: Cache) -> Iterator[Cache]:
    """A cache with an object a key, and a batch that holds a share of each."""
    for key in KEYS:
        assert cache.put(key, pattern(key, 100)) == Status.OK
    with cache.read(KEYS):
        yield cache
        gc.collect()
        assert cache.stats().held == len(KEYS)
        assert cache.delete(KEYS) == [Status.LOCKED] * len(KEYS)
    assert cache.stats().held == 0
    assert cache.verify() == []


def with_read(cache: Cache, keys: Any) -> None:
    with cache.read(keys):
        pass


def release_twice(cache: Cache, keys: Any) -> None:
    batch = cache.read(keys)
    batch.release()
    batch.release()
    with batch:
        pass


def drop(cache: Cache, keys: Any) -> None:
    cache.read(keys)


def with_views(cache: Cache, keys: Any) -> None:
    with cache.read(keys) as batch:
        assert [view is None for view in batch.views] == [status != 0 for status in batch.status]


def keep_views(cache: Cache, keys: Any) -> None:
    with cache.read(keys) as batch:
        views = batch.views
    with pytest.raises(ValueError, match="released"):
        bytes(views[0])  # type: ignore[arg-type] # the first one is OK


def drop_views(cache: Cache, keys: Any) -> None:
    views = cache.read(keys).views
    assert views[0] == pattern(KEYS[0], 100)


def refuse_and_release(cache: Cache, keys: Any) -> None:
    batch = cache.read(keys)
    view = batch.views[0]
    part = view[:5]  # type: ignore[index] # the first one is OK
    with pytest.raises(ViewInUseError), batch:
        pass
    assert bytes(part) == bytes(view)[:5], "what was refused is as usable as before"  # type: ignore[arg-type]
    part.release()
    batch.release()


def read_and_fail(cache: Cache, keys: Any) -> None:
    with cache.read(keys) as batch:
        part = batch.views[0][:5]  # type: ignore[index] # the first one is OK
        raise InterruptError(part.nbytes)


def leave_by_exception(cache: Cache, keys: Any) -> None:
    with pytest.raises(InterruptError):
        read_and_fail(cache, keys)


def arrays(cache: Cache, keys: Any) -> None:
    with cache.read(keys) as batch:
        assert batch.views[0] == batch.arrays()[0]


def drop_array(cache: Cache, keys: Any) -> None:
    array = cache.read(keys).arrays()[0]
    assert array.tobytes() == pattern(KEYS[0], 100)


def in_a_cycle(cache: Cache, keys: Any) -> None:
    cycle: list[Any] = [cache.read(keys)]
    cycle.append(cycle)


def in_a_cycle_of_its_own(cache: Cache, keys: Any) -> None:
    batch = cache.read(keys)
    views: list[Any] = batch.views
    views.append(batch)


def prefix(cache: Cache, keys: Any) -> None:
    with cache.read(keys, prefix=True) as batch:
        assert batch.hits == len([status for status in batch.status if not status])


def closed_views(cache: Cache, keys: Any) -> None:
    batch = cache.read(keys)
    batch.release()
    with pytest.raises(ClosedError):
        _ = batch.views
    with pytest.raises(ClosedError):
        batch.arrays()


def no_mapping(cache: Cache, keys: Any) -> None:
    """As in a child: the mapping is not to be had."""
    batch = cache.read(keys)
    cache._attachment.forked = True
    try:
        with pytest.raises(ClosedError):
            _ = batch.views
    finally:
        cache._attachment.forked = False
    with batch:
        assert batch.views[0] == pattern(KEYS[0], 100)


def without_reading(cache: Cache, keys: Any) -> None:
    assert cache.reserve_read(keys)[0] == Status.OK
    assert cache.finish_read(keys)[0] == Status.OK
    assert cache.status(keys)[0] == Status.OK
    assert cache.touch(keys)[0] == Status.OK
    assert cache.lookup(keys) > 0
    assert cache.cancel_read(keys)[0] == Status.NO_SHARE


def wrong_keys(cache: Cache, keys: Any) -> None:
    for wrong in ([KEYS[0], None], [b""], [KEYS[0], b""], [b"x" * 65], "key", [KEYS[0], 7], None):
        for call in (cache.read, cache.lookup, cache.finish_read):
            with pytest.raises((TypeError, ValueError), match="keys"):
                call(wrong)  # type: ignore[operator] # that is the point
    assert len(keys)


WAYS: list[Callable[[Cache, Any], None]] = [
    with_read,
    release_twice,
    drop,
    with_views,
    keep_views,
    drop_views,
    refuse_and_release,
    leave_by_exception,
    arrays,
    drop_array,
    in_a_cycle,
    in_a_cycle_of_its_own,
    prefix,
    closed_views,
    no_mapping,
    without_reading,
    wrong_keys,
]
SHAPES: dict[str, Any] = {
    "one": [KEYS[0]],
    "few": tuple(KEYS[:4]),
    "many": list(KEYS),
    "some missing": [*KEYS[:3], MISSING, MISSING],
    "of two lengths": [KEYS[0], b"other"],
    "a matrix": np.frombuffer(b"".join(KEYS[:6]), np.uint8).reshape(6, 32),
}


def counted(cache: Cache) -> list[int]:
    """References to what every batch refers to, or a view of one: the payload's mapping."""
    gc.collect()
    shared = [cache._core, cache._attachment, cache._handle, managed_buffer(cache._attachment.payload(writable=False))]
    return [sys.getrefcount(each) for each in (*shared, *KEYS, ReadBatch)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_leaves_nothing(stored: Cache, way: Callable[[Cache, Any], None], shape: str) -> None:
    way(stored, SHAPES[shape])
    before = counted(stored)
    for _ in range(ROUNDS):
        way(stored, SHAPES[shape])
    assert counted(stored) == before


class Alarm:
    """Raises InterruptError wherever the program is, while it is armed."""

    def __init__(self) -> None:
        self.armed = False

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            raise InterruptError

    def after(self, delay_s: float) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, delay_s)


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.interrupt)
    yield alarm
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("way", [with_read, drop, with_views])
@pytest.mark.parametrize("shape", ["one", "many"])
def test_an_interrupt_at_any_point_leaks_no_share(
    stored: Cache, alarm: Alarm, way: Callable[..., None], shape: str
) -> None:
    interrupted = 0
    for i in range(100):
        end = time.monotonic() + 1.0  # a signal that another thread gets comes late
        try:
            alarm.after(0.0002 + i * 0.00001)
            while time.monotonic() < end:
                way(stored, SHAPES[shape])
            alarm.armed = False
        except InterruptError:
            interrupted += 1
    assert interrupted > 50
    gc.collect()
    assert stored.stats().held == len(KEYS)


@pytest.mark.usefixtures("hasty_switches")
@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize("shape", ["one", "many"])
def test_threads_that_release_one_batch_give_its_shares_back_once(stored: Cache, shape: str, looked_at: bool) -> None:
    for _ in range(100):
        batch = stored.read(SHAPES[shape])
        if looked_at:
            assert batch.views[0] is not None
        together = threading.Barrier(2)

        def release(batch: ReadBatch = batch, together: threading.Barrier = together) -> None:
            together.wait()
            batch.release()

        run_all([release, release])
        assert stored.stats().held == len(KEYS)


def test_what_a_view_list_holds_may_come_back_to_its_batch(stored: Cache) -> None:
    """To forget the views may run anything, here a second release of the same batch."""

    class Again:
        def __init__(self, batch: ReadBatch) -> None:
            self.batch = batch

        def __del__(self) -> None:
            self.batch.release()

    for _ in range(20):
        batch = stored.read(KEYS[:3])
        views: list[Any] = batch.views
        views.append(Again(batch))
        del views
        batch.release()
    assert stored.stats().held == len(KEYS)


def test_a_temporary_object_goes_with_its_last_share(cache: Cache) -> None:
    for looked_at in (False, True):
        with cache.reserve_write([b"t"], 8, temporary=True):
            pass
        with cache.read([b"t"]) as batch:
            assert not looked_at or batch.views[0] is not None
        assert cache.status([b"t"]) == [Status.NOT_FOUND]


def test_batches_are_made_by_caches_only() -> None:
    for kind in (ReadBatch, WriteBatch, _fast.Batch):
        with pytest.raises(TypeError, match="cannot create"):
            kind()


def test_a_batch_cannot_be_copied(stored: Cache) -> None:
    with stored.read([KEYS[0]]) as batch, pytest.raises(TypeError):
        copy.copy(batch)


def test_weak_references_end_with_the_batch(stored: Cache) -> None:
    batch = stored.read([KEYS[0]])
    seen = weakref.ref(batch)
    part = batch.views[0][:3]  # type: ignore[index] # OK
    del batch
    assert seen() is None
    assert part == pattern(KEYS[0], 100)[:3]


def test_a_batch_is_as_long_as_its_keys(stored: Cache) -> None:
    for keys in SHAPES.values():
        with stored.read(keys) as batch:
            assert len(batch) == len(keys)
            assert batch.keys == [bytes(key) for key in keys]


# Ends with batches, a view and a slice that only the end of the process takes apart.
FORGETFUL = """
import sys, shmcache
cache = shmcache.attach(sys.argv[1])
cache.put(b"a", b"x" * 100)
batches = [cache.read([b"a"]) for _ in range(5)]
kept = batches[0].views[0][:5], batches[1].views, batches[2].arrays()
cache.itself = cache
print("read")
"""


def test_a_process_that_ends_with_batches_says_nothing(arena: str) -> None:
    done = run_python(FORGETFUL, arena)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
