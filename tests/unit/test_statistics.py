"""The statistics of a lane: the core and Python name the same ones, and times go to the right bucket."""

from __future__ import annotations

import math

import pytest

from shmcache import Cache, snapshot
from shmcache.stats import BUCKETS_S, Counters, Gauges, Histograms
from shmcache.storage.l1 import L1, Notes


def test_the_core_and_python_agree_on_names() -> None:
    assert tuple(Counters.__slots__) == snapshot.COUNTERS
    assert tuple(Gauges.__slots__) == snapshot.GAUGES
    assert tuple(Histograms.__slots__) == snapshot.HISTOGRAMS


@pytest.mark.parametrize("bucket", range(len(BUCKETS_S)))
def test_a_time_is_counted_in_the_bucket_that_ends_at_it_or_above(cache: Cache, bucket: int) -> None:
    bound = BUCKETS_S[bucket]
    longest = bound if math.isfinite(bound) else BUCKETS_S[-2] * 10
    shortest = BUCKETS_S[bucket - 1] + 1e-6 if bucket else 0.0
    notes = Notes(L1(cache))
    for seconds in (longest, shortest):
        notes.time("l2_load", seconds + 1e-9)  # whole microseconds, whatever the division gave
    assert cache.stats().histograms.l2_load.count == 0
    notes.flush()
    found = cache.stats().histograms.l2_load
    assert [i for i, n in enumerate(found.buckets) if n] == [bucket]
    assert found.count == 2
    assert found.sum_s == pytest.approx(longest + shortest)
    assert found.quantile_s(0.5) == bound


def test_gauges_go_up_and_down_and_end_with_their_process(cache: Cache, join) -> None:
    other = join()
    for lane, change in ((cache, 5), (other, 3), (cache, -4)):
        notes = Notes(L1(lane))
        notes.gauge("l2_loading", change)
        notes.flush()
    assert cache.stats().gauges.l2_loading == 4
    other.close()
    assert cache.stats().gauges.l2_loading == 1
    join()  # takes the lane that became free
    assert cache.stats().gauges.l2_loading == 1


def test_unknown_names_are_refused(cache: Cache) -> None:
    with pytest.raises(KeyError):
        L1(cache).count("no such counter")


def test_a_closed_cache_counts_nothing(join) -> None:
    cache, other = join(), join()
    cache.close()
    L1(cache).count("l2_loads", 3)
    assert other.stats().counters.l2_loads == 0
