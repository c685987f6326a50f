"""The simulated caches of ``tools/replay --policy``: small cases by hand, bounds, and the arena itself beside them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
import pytest

from shmcache_tools.chunks import keys_of
from shmcache_tools.replay.policies import (
    SIMULATED,
    Arc,
    Lru,
    Optimum,
    Policy,
    Request,
    S3Fifo,
    Segmented,
    Sieve,
    hit_rate,
)
from shmcache_tools.replay.policy_arena import tried_arena
from shmcache_tools.trace import best_hit_rate, distinct_chunks, make_conversations

_SECOND_MS = 1000
_LONG_S = 1e5  #: longer than any test: an arena's count decides, and time only among equals
_SEEDS = range(6)


def _timed(chains: Iterable[Sequence[int]]) -> list[Request]:
    return [(number * _SECOND_MS, chain) for number, chain in enumerate(chains)]


def _hits(policy: Policy, *chains: Sequence[int]) -> list[int]:
    """A request a second."""
    return [policy.serve(*request) for request in _timed(chains)]


def _there(policy: Policy, chunks: Iterable[int]) -> set[int]:
    return {chunk for chunk in chunks if chunk in policy}


def _one_by_one(policy: Policy, *chunks: int) -> None:
    _hits(policy, *([chunk] for chunk in chunks))


def _conversations(seed: int, requests: int = 150) -> list[Request]:
    return [(one.timestamp_ms, one.hash_ids.tolist()) for one in make_conversations(seed, requests)]


# Prefix hits


@pytest.mark.parametrize("name", SIMULATED)
def test_a_hit_is_a_chunk_whose_prefix_is_there(name: str) -> None:
    chains = [[1, 2, 3], [1, 2, 3, 4], [5, 2, 3], [1, 9, 3]]
    policy = SIMULATED[name](10, _timed(chains))
    assert _hits(policy, *chains) == [0, 3, 0, 1]


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("seed", _SEEDS)
def test_a_cache_for_all_hits_all_that_was_there(name: str, seed: int) -> None:
    trace = make_conversations(seed, 150)
    requests = _conversations(seed)
    policy = SIMULATED[name](distinct_chunks(trace), requests)
    assert hit_rate(policy, requests) == pytest.approx(best_hit_rate(trace))


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("slots", [1, 2, 3, 10, 64])
def test_no_cache_holds_more_than_its_slots(name: str, slots: int) -> None:
    requests = _conversations(slots, 60)
    chunks = {chunk for _, chain in requests for chunk in chain}
    policy = SIMULATED[name](slots, requests)
    fullest = 0
    for request in requests:
        policy.serve(*request)
        fullest = max(fullest, len(_there(policy, chunks)))
    assert fullest == slots


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("slots", [5, 50, 200])
def test_nothing_beats_the_optimum(seed: int, slots: int) -> None:
    requests = _conversations(seed)
    rates = {name: hit_rate(make(slots, requests), requests) for name, make in SIMULATED.items()}
    assert rates["optimum"] == max(rates.values())
    assert rates["optimum"] > rates["lru"]


# The offline optimum


def _best_by_trying(requests: Sequence[Request], slots: int) -> int:
    """The most hits that any choice of what to keep gives: all are tried."""
    best = {frozenset[int](): 0}
    for _, chain in requests:
        after: dict[frozenset[int], int] = {}
        for there, hits in best.items():
            got = hits + next((depth for depth, chunk in enumerate(chain) if chunk not in there), len(chain))
            known = there | set(chain)
            for kept in combinations(sorted(known), min(slots, len(known))):
                after[frozenset(kept)] = max(got, after.get(frozenset(kept), 0))
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_the_best_of_all_choices(seed: int) -> None:
    chance = random.Random(seed)
    tree = [[1, 2, 3], [1, 2, 4], [1, 5], [6, 7], [6, 8], [9]]
    requests = _timed([chance.choice(tree)[: chance.randint(1, 3)] for _ in range(12)])
    for slots in (1, 2, 3):
        policy = Optimum(slots, requests)
        assert sum(policy.serve(*one) for one in requests) == _best_by_trying(requests, slots)


def test_the_optimum_does_not_store_what_comes_too_late() -> None:
    chains = [[1], [2], [1], [2]]
    assert _hits(Optimum(1, _timed(chains)), *chains) == [0, 0, 1, 0]


# The arena's policies


def test_lru_evicts_the_later_chunk_of_a_chain_first() -> None:
    assert _hits(Lru(3), [1, 2, 3], [4], [1, 2, 3]) == [0, 0, 2]


def test_lru_evicts_what_was_not_used() -> None:
    policy = Lru(3)
    assert _hits(policy, [1], [2], [3], [1], [4]) == [0, 0, 0, 1, 0]
    assert _there(policy, range(9)) == {1, 3, 4}


@pytest.mark.parametrize("make", [Lru, Segmented])
def test_a_chain_longer_than_the_cache_keeps_its_beginning(make: Callable[[int], Policy]) -> None:
    assert _hits(make(2), [1, 2, 3], [1, 2, 3]) == [0, 2]


def test_segmented_keeps_what_more_requests_used() -> None:
    policy = Segmented(2)
    _one_by_one(policy, 1, 1, 2, 3)
    assert _there(policy, range(9)) == {1, 3}


@pytest.mark.parametrize(("window_s", "there"), [(1.9, {2, 3}), (2.1, {1, 3})])
def test_a_request_is_worth_the_window(window_s: float, there: set[int]) -> None:
    policy = Segmented(2, window_s)
    for second, chunk in ((0, 1), (1, 1), (3, 2), (4, 3)):
        policy.serve(second * _SECOND_MS, [chunk])
    assert _there(policy, range(9)) == there


def test_a_fourth_request_is_worth_no_more() -> None:
    policy = Segmented(2, _LONG_S)
    _one_by_one(policy, 1, 1, 1, 1, 2, 2, 2, 3)
    assert _there(policy, range(9)) == {2, 3}


@pytest.mark.parametrize(("ghosts", "there"), [(0, {4, 5}), (1, {1, 5})])
def test_a_ghost_remembers_the_requests(ghosts: int, there: set[int]) -> None:
    policy = Segmented(2, _LONG_S, ghosts)
    _one_by_one(policy, 1, 2, 3, 1, 4, 5)
    assert _there(policy, range(9)) == there


def test_so_many_ghosts_are_remembered() -> None:
    policy = Segmented(1, _LONG_S, ghosts=2)
    _one_by_one(policy, 1, 2, 3, 4, 2, 5)  # the ghosts: 2 and 3, then 4 too and so no 2
    assert _there(policy, range(9)) == {5}


# As published


def test_sieve_spares_what_was_visited() -> None:
    policy = Sieve(3)
    _one_by_one(policy, 1, 2, 3, 1, 4)
    assert _there(policy, range(9)) == {1, 3, 4}
    _one_by_one(policy, 5)  # the hand goes on where it was, though 1 is the oldest and is not visited any more
    assert _there(policy, range(9)) == {1, 4, 5}


def test_the_hand_of_sieve_begins_anew_before_what_is_new() -> None:
    policy = Sieve(2)
    _one_by_one(policy, 1, 2, 1, 2, 3)
    assert _there(policy, range(9)) == {2, 3}
    _one_by_one(policy, 2, 4, 5)  # 3 was the newest: after it the hand is at 2
    assert _there(policy, range(9)) == {4, 5}


def test_s3_fifo_moves_what_is_used_twice_and_takes_back_ghosts() -> None:
    policy = S3Fifo(10)
    _one_by_one(policy, *range(1, 11), 2, 2, 3)
    _one_by_one(policy, 11, 12)
    assert _there(policy, range(1, 13)) == {2, *range(4, 13)}  # 2 was used twice; 3 once, which is not enough
    _one_by_one(policy, 1, *range(20, 28))
    assert _there(policy, range(30)) == {1, 2, *range(20, 28)}  # 1 came back in time
    _one_by_one(policy, 4)
    assert _there(policy, range(30)) == {1, 2, 4, *range(21, 28)}


def test_the_main_queue_of_s3_fifo_gives_a_second_chance() -> None:
    policy = S3Fifo(4)  # 1 and 3
    _one_by_one(policy, 1, 2, 3, 4)
    _one_by_one(policy, 1, 1, 2, 2, 3, 3, 4, 4)  # all four want to go to the main queue, which holds three
    _one_by_one(policy, 5)
    assert _there(policy, range(9)) == {2, 3, 4, 5}
    _one_by_one(policy, 2, 6, 7)
    assert _there(policy, range(9)) == {2, 3, 4, 7}
    _one_by_one(policy, 7, 7, 8, 8, 8)  # 7 goes to the main queue for 3, as 2 has its second chance
    assert _there(policy, range(9)) == {2, 4, 7, 8}
    _one_by_one(policy, 9, 9, 9, 10)  # and no third: 8 for 4, 9 for 2
    assert _there(policy, range(11)) == {7, 8, 9, 10}


def test_arc_learns_from_its_ghosts() -> None:
    policy = Arc(2)
    _one_by_one(policy, 1, 2, 1, 3)
    assert _there(policy, range(9)) == {1, 3}  # 1 was used twice
    _one_by_one(policy, 2)
    assert _there(policy, range(9)) == {2, 3}  # 2 came back: what was used once should have had more room
    _one_by_one(policy, 1)
    assert _there(policy, range(9)) == {1, 2}  # and so what was used twice


def test_arc_takes_room_from_what_was_used_once() -> None:
    policy = Arc(4)
    _one_by_one(policy, 1, 2, 3, 4, 1, 2, 5, 3, 1, 6, 7, 2, 4, 8, 1, 5)
    assert _there(policy, range(9)) == {1, 4, 5, 8}
    _one_by_one(policy, 9, 10)  # one slot is left for what was used once
    assert _there(policy, range(11)) == {1, 5, 9, 10}


def test_arc_evicts_what_was_used_once_for_what_comes_back() -> None:
    policy = Arc(4)
    _one_by_one(policy, 1, 2, 3, 4, 1, 2, 5, 3, 4)
    assert _there(policy, range(9)) == {2, 3, 4, 5}
    _one_by_one(policy, 1)  # 5 has the one slot that it should have, and yet it goes
    assert _there(policy, range(9)) == {1, 2, 3, 4}


# The real arena


def _in_arena(requests: Sequence[Request], slots: int, eviction: str) -> list[int]:
    with tried_arena(slots, eviction, _LONG_S) as arena:
        hits = []
        for _, chain in requests:
            hits.append(arena.serve(keys_of(np.array(chain, dtype=np.uint64))))
            time.sleep(0.006)  # longer than recency is rounded to
        assert arena.faults() == []
        assert arena.hit_rate == sum(hits) / sum(len(chain) for _, chain in requests)
        return hits


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize(
    ("eviction", "make"),
    [("lru", lambda slots: Lru(slots, lag_us=1)), ("segmented", lambda slots: Segmented(slots, _LONG_S))],
)
def test_the_arena_does_what_its_simulation_does(seed: int, eviction: str, make: Callable[[int], Policy]) -> None:
    chance = random.Random(seed)
    tree = [
        [100 * family + 10 * min(depth, 1) * child + depth for depth in range(12)]
        for family in range(4)
        for child in range(5)
    ]
    requests = _timed([chance.choice(tree)[: chance.randint(1, 12)] for _ in range(60)])
    slots = 40
    hits = _in_arena(requests, slots, eviction)
    assert hits == _hits(make(slots), *(chain for _, chain in requests))
