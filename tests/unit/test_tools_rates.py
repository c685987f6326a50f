"""What happened between two looks, from ``ArenaInfo`` made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from seen_support import arena, lane, unreadable

from shmcache.stats import ArenaInfo, Counters
from shmcache_tools.rates import rates_between


def _arena(counters: Counters, *lanes: Counters) -> ArenaInfo:
    """An arena whose counters are these, and its lanes."""
    made = arena("kv", lanes=[lane(index, counters=each) for index, each in enumerate(lanes)])
    assert made.stats is not None
    return replace(made, stats=replace(made.stats, counters=counters))


def test_growth_a_second() -> None:
    rates = rates_between(_arena(Counters(publishes=10)), _arena(Counters(publishes=40, evictions=6)), 2.0)
    assert rates is not None
    assert rates.seconds == 2.0
    assert rates.count("publishes") == 30
    assert (rates.per_s("publishes"), rates.per_s("evictions"), rates.per_s("deletes")) == (15.0, 3.0, 0.0)
    assert rates.per_s("publishes", "evictions") == 18.0


def test_hit_rate_is_of_that_time_alone() -> None:
    before = _arena(Counters(read_hits=0, read_misses=100))
    assert (rates := rates_between(before, _arena(Counters(read_hits=3, read_misses=101)), 1.0)) is not None
    assert rates.hit_rate == 0.75
    assert (rates := rates_between(before, before, 1.0)) is not None
    assert rates.hit_rate is None


def test_counters_torn_between_lanes_never_run_backwards() -> None:
    rates = rates_between(_arena(Counters(publishes=10)), _arena(Counters(publishes=9)), 1.0)
    assert rates is not None
    assert rates.per_s("publishes") == 0.0


def test_lanes_have_rates_of_their_own() -> None:
    before = _arena(Counters(), Counters(read_hits=1), Counters(read_hits=5))
    rates = rates_between(before, _arena(Counters(), Counters(read_hits=1), Counters(read_hits=9)), 2.0)
    assert rates is not None
    assert {index: each.per_s("read_hits") for index, each in rates.lanes.items()} == {0: 0.0, 1: 2.0}


def test_a_lane_that_was_not_seen_before_has_none() -> None:
    rates = rates_between(_arena(Counters()), _arena(Counters(), Counters(read_hits=9)), 1.0)
    assert rates is not None
    assert not rates.lanes


@pytest.mark.parametrize("changed", [{"inode": 8}, {"created": 1.0}])
def test_an_arena_made_anew_is_another_one(changed: dict[str, float]) -> None:
    after = _arena(Counters(publishes=5))
    assert rates_between(replace(after, **changed), after, 1.0) is None  # type: ignore[arg-type]


def test_nothing_to_compare() -> None:
    there = _arena(Counters())
    assert rates_between(None, there, 1.0) is None
    assert rates_between(there, unreadable("kv", "damaged"), 1.0) is None
    assert rates_between(unreadable("kv", "damaged"), there, 1.0) is None
    assert rates_between(there, there, 0.0) is None
