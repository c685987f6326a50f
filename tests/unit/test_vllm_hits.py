"""What a request is told that it can load: granted to every rank, once, until it loads it or is over."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import vllm_support
from vllm_support import IDENTITY, PART, TOKENS, Request, Sides, check_idle, prompt, shares

import shmcache
from shmcache import Status
from shmcache.integrations.vllm import hits as hits_module

Make = Callable[..., Sides]
BLOCKS = list(range(10, 30))


@pytest.fixture
def make(arena_name: str) -> Iterator[Make]:
    with vllm_support.engines(arena_name) as found:
        yield found


@pytest.fixture
def sides(make: Make) -> Sides:
    """An engine that has stored five blocks."""
    found = make()
    found.save(Request("first", prompt(5)), [0, 1, 2, 3, 4])
    return found


def granted(sides: Sides, keys: list[bytes]) -> None:
    """Every rank has one share of each of these, and of nothing else."""
    found = shares(sides.arena)
    expected = {("vllm", rank): Counter(keys) for rank in range(sides.shape.ranks)} if keys else {}
    assert found == expected


def outsider(sides: Sides) -> shmcache.Cache:
    return shmcache.attach(sides.arena)


# What is told


def test_what_is_stored_is_found(sides: Sides) -> None:
    asked = Request("a", prompt(5, more=1))
    assert sides.match(asked) == (20, False)
    granted(sides, asked.keys())


def test_what_is_not_stored_is_not_found(sides: Sides) -> None:
    assert sides.match(Request("a", prompt(5, seed=1))) == (0, False)
    granted(sides, [])


def test_a_longer_prompt_finds_its_begin(sides: Sides) -> None:
    asked = Request("a", prompt(9))
    assert sides.match(asked) == (20, False)
    granted(sides, asked.keys(0, 5))


@pytest.mark.parametrize("more", range(TOKENS))
def test_at_least_one_token_is_left(sides: Sides, more: int) -> None:
    asked = Request("a", prompt(4, more=more))
    assert sides.match(asked) == (min(16, 15 + more), False)
    granted(sides, asked.keys(0, 4))


def test_one_block(sides: Sides) -> None:
    asked = Request("a", prompt(1))
    assert sides.match(asked) == (3, False)


@pytest.mark.parametrize("tokens", range(1, TOKENS))
def test_a_prompt_shorter_than_a_block(sides: Sides, tokens: int) -> None:
    assert sides.match(Request("a", prompt(0, more=tokens))) == (0, False)
    granted(sides, [])


def test_vllm_has_all_itself(sides: Sides) -> None:
    asked = Request("a", prompt(5))
    assert sides.match(asked, 5) == (0, False)
    assert sides.match(asked, 4) == (3, False)
    granted(sides, asked.keys(4, 5))


def test_a_gap_ends_it(sides: Sides) -> None:
    asked = Request("a", prompt(5))
    with outsider(sides) as cache:
        assert cache.delete(asked.keys(2, 3)) == [Status.OK]
    assert sides.match(asked) == (8, False)
    granted(sides, asked.keys(0, 2))
    assert sides.match(asked, 3) == (7, False)
    granted(sides, asked.keys(3, 5))


def test_who_must_compute_it_all_is_told_nothing(sides: Sides) -> None:
    asked = Request("a", prompt(5))
    asked.skip_reading_prefix_cache = True
    assert sides.match(asked) == (0, False)
    granted(sides, [])


def test_an_engine_that_only_stores(sides: Sides, make: Make) -> None:
    assert make(group="other", loads=False).match(Request("a", prompt(5))) == (0, False)
    granted(sides, [])


def test_another_identity_is_another_key(make: Make) -> None:
    """As that of an adapter."""
    sides = make(identity_of=lambda request: request.request_id[:1].encode() * 16)
    sides.save(Request("a1", prompt(3)), [0, 1, 2])
    assert sides.match(Request("b1", prompt(3))) == (0, False)
    asked = Request("a2", prompt(3))
    assert sides.match(asked) == (11, False)
    granted(sides, asked.keys(identity=b"a" * 16))


# Asked again


def test_asked_again_nothing_is_doubled(sides: Sides) -> None:
    asked = Request("a", prompt(5))
    before = sides.cache.stats().counters.grants
    assert {sides.match(asked) for _ in range(10)} == {(19, False)}
    granted(sides, asked.keys())
    assert sides.cache.stats().counters.grants - before == 5 * 2


def test_two_requests_have_shares_each(sides: Sides) -> None:
    asked = [Request(name, prompt(5)) for name in "abc"]
    for request in [*asked, *asked]:
        assert sides.match(request) == (19, False)
    granted(sides, asked[0].keys() * 3)
    sides.scheduler.finished("b", [])
    granted(sides, asked[0].keys() * 2)


@pytest.mark.parametrize("order", list(itertools.permutations([0, 2, 5])))
def test_vllm_has_more_or_less_itself_meanwhile(sides: Sides, order: tuple[int, ...]) -> None:
    asked = Request("a", prompt(5, more=1))
    for local in order:
        assert sides.match(asked, local) == (20 - 4 * local, False)
        granted(sides, asked.keys(local))


def test_more_is_stored_meanwhile(sides: Sides) -> None:
    asked = Request("a", prompt(8))
    assert sides.match(asked) == (20, False)
    sides.save(Request("b", prompt(7)), list(range(7)))
    assert sides.match(asked) == (28, False)
    granted(sides, asked.keys(0, 7))


def test_some_is_forced_out_meanwhile(sides: Sides) -> None:
    """Its shares are gone; those of the others are given back in the end."""
    asked = Request("a", prompt(5))
    sides.match(asked)
    with outsider(sides) as cache:
        assert cache.delete(asked.keys(1, 2), force=True) == [Status.OK]
    sides.match(asked)
    sides.scheduler.finished("a", [])
    granted(sides, [])


def test_a_preempted_request_is_asked_for_again(sides: Sides) -> None:
    asked = Request("a", prompt(5, more=2))
    for _ in range(3):
        assert sides.match(asked) == (20, False)
        sides.scheduler.allocated(asked, BLOCKS[:6], 20)
        asked.num_computed_tokens = 20
        sides.compute(asked, BLOCKS[:6])
        granted(sides, [])
        asked.num_computed_tokens = 0
    assert not sides.scheduler.finished("a", [])


class Clock:
    """In the place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_shares_are_granted_anew_before_their_lease_is_over(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(hits_module, "time", clock)
    asked = Request("a", prompt(5))
    sides.match(asked)
    before = sides.cache.stats().counters.grants
    clock.now += vllm_support.LEASE_S / 2
    sides.match(asked)
    assert sides.cache.stats().counters.grants == before
    clock.now -= vllm_support.LEASE_S / 2
    for _ in range(3):
        before = sides.cache.stats().counters.grants
        clock.now += vllm_support.LEASE_S / 2 + 1
        assert sides.match(asked) == (19, False)
        sides.match(asked)
        assert sides.cache.stats().counters.grants == before + 10
        granted(sides, asked.keys())


def test_a_real_lease(make: Make) -> None:
    """Whoever asks often enough keeps its shares."""
    sides = make(read_lease_s=0.3, lease_s=0.3)
    sides.save(Request("first", prompt(5)), BLOCKS)
    asked = Request("a", prompt(5))
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        assert sides.match(asked) == (19, False)
        time.sleep(0.005)
    with outsider(sides) as cache:
        assert cache.delete(asked.keys()) == [Status.LOCKED] * 5
        time.sleep(0.35)
        assert cache.delete(asked.keys()) == [Status.OK] * 5, "nobody has asked"


@pytest.mark.parametrize("asked_again", [False, True])
def test_who_comes_after_its_lease_takes_nothing_from_others(make: Make, asked_again: bool) -> None:
    """Its shares are gone with their objects; those under the same keys are another request's."""
    sides = make(read_lease_s=0.05, lease_s=0.05)
    sides.save(Request("first", prompt(3)), BLOCKS)
    late, other = Request("late", prompt(3, more=1)), Request("other", prompt(3, more=1))
    sides.match(late)
    time.sleep(0.1)
    with outsider(sides) as cache:
        assert cache.delete(late.keys()) == [Status.OK] * 3
    sides.scheduler._hits._lease_s = vllm_support.LEASE_S  # of shares from now on
    sides.save(Request("again", prompt(3)), BLOCKS)
    sides.match(other)
    sides.scheduler._hits._lease_s = 0.05
    if asked_again:
        sides.match(late)
        granted(sides, late.keys() * 2)
    sides.scheduler.finished("late", [])
    granted(sides, other.keys())
    sides.scheduler.allocated(other, BLOCKS, 12)
    sides.run(sides.step())
    assert sides.tell() == set()


class Stolen:
    """A cache; what was found is partly gone when it is to be granted."""

    def __init__(self, cache: shmcache.Cache, lost: list[bytes]) -> None:
        self._cache = cache
        self._lost = lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def reserve_read(self, keys: list[bytes], extra_count: int) -> list[Status]:
        self._cache.delete(self._lost)
        return self._cache.reserve_read(keys, extra_count)


@pytest.mark.parametrize(("lost", "left"), [((0, 1), 0), ((2, 3), 2), ((4, 5), 4), ((1, 4), 1), ((0, 5), 0)])
def test_evicted_between_look_up_and_grant(sides: Sides, lost: tuple[int, int], left: int) -> None:
    asked = Request("a", prompt(5, more=1))
    sides.scheduler._hits._cache = Stolen(sides.cache, asked.keys(*lost))  # type: ignore[assignment]
    assert sides.match(asked) == (4 * left, False)
    granted(sides, asked.keys(0, left))
    sides.scheduler.finished("a", [])
    granted(sides, [])


# What vLLM makes of it


@pytest.mark.parametrize(("taken", "count"), [(20, 5), (19, 5), (17, 5), (16, 4), (8, 2), (5, 2), (1, 1), (0, 0)])
def test_vllm_takes_a_part(sides: Sides, taken: int, count: int) -> None:
    asked = Request("a", prompt(5, more=1))
    sides.match(asked)
    sides.scheduler.allocated(asked, BLOCKS[:6], taken)
    granted(sides, asked.keys(0, count))
    step = sides.step()
    assert [load.keys for load in step.loads] == ([asked.keys(0, count)] if count else [])
    assert [load.blocks for load in step.loads] == ([BLOCKS[:count]] if count else [])
    sides.run(step)
    granted(sides, [])
    assert sides.ranks[1].get(BLOCKS[count]) == bytes(PART)


def test_what_it_does_not_take_was_granted_to_it(sides: Sides) -> None:
    """Another request was granted more of the same chain, which was saved in the meantime."""
    asked, other = Request("a", prompt(8, more=1)), Request("b", prompt(8, more=1))
    assert sides.match(asked) == (20, False)
    sides.save(Request("second", prompt(8)), list(range(8)))
    assert sides.match(other) == (32, False)
    sides.scheduler.allocated(asked, BLOCKS[:9], 8)
    granted(sides, asked.keys(0, 2) + other.keys())
    sides.run(sides.step())
    sides.scheduler.finished("b", [])


def test_loads_lie_behind_what_vllm_has_itself(sides: Sides) -> None:
    asked = Request("a", prompt(5, more=1))
    sides.match(asked, 2)
    sides.scheduler.allocated(asked, BLOCKS[:6], 12)
    step = sides.step()
    assert [(load.keys, load.blocks) for load in step.loads] == [(asked.keys(2, 5), BLOCKS[2:5])]
    assert sides.step().loads == []
    sides.run(step)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_small_loads_are_made_within_the_step(make: Make, blocks: int) -> None:
    sides = make(sync_load_bytes=2 * PART)
    sides.save(Request("first", prompt(5)), BLOCKS)
    asked = Request("a", prompt(blocks, more=1))
    assert sides.match(asked) == (4 * blocks, blocks > 2)
    sides.scheduler.allocated(asked, BLOCKS[:6], 4 * blocks)
    assert [load.between_steps for load in sides.step().loads] == [blocks > 2]
    sides.run(sides.step())


def test_all_is_loaded_between_steps(make: Make) -> None:
    sides = make(sync_load_bytes=0)
    sides.save(Request("first", prompt(5)), BLOCKS)
    assert sides.match(Request("a", prompt(1, more=1))) == (4, True)
    assert sides.match(Request("b", prompt(5, seed=7))) == (0, False)


def test_a_part_of_what_is_large_is_loaded_as_vllm_was_told(make: Make) -> None:
    sides = make(sync_load_bytes=4 * PART)
    sides.save(Request("first", prompt(5)), BLOCKS)
    asked = Request("a", prompt(5))
    assert sides.match(asked) == (19, True)
    sides.scheduler.allocated(asked, BLOCKS[:5], 16)
    assert [load.between_steps for load in sides.step().loads] == [True]


@pytest.mark.parametrize("tokens", [20, 0])
def test_a_request_that_is_over_gives_back_what_it_did_not_use(sides: Sides, tokens: int) -> None:
    asked = Request("a", prompt(5))
    sides.match(asked)
    if not tokens:
        sides.scheduler.allocated(asked, BLOCKS[:5], 0)
        granted(sides, [])
    assert not sides.scheduler.finished("a", [])
    granted(sides, [])
    assert not sides.scheduler.finished("a", [])


def test_one_that_was_never_asked_for_is_over(sides: Sides) -> None:
    assert not sides.scheduler.finished("nobody", [1, 2])


def test_what_is_sent_to_the_ranks_is_theirs(sides: Sides) -> None:
    """An abort takes back nothing that a rank may be about to claim."""
    asked = Request("a", prompt(5))
    sides.match(asked)
    sides.scheduler.allocated(asked, BLOCKS[:5], 19)
    step = sides.step()
    assert not sides.scheduler.finished("a", BLOCKS[:5])
    granted(sides, asked.keys())
    sides.run(step)
    granted(sides, [])
    assert all(rank.has(BLOCKS[i], asked.all_hashes[i]) for rank in sides.ranks for i in range(5))


# When the arena fails


class Failing:
    """A cache of which some methods raise."""

    def __init__(
        self, cache: shmcache.Cache, *methods: str, error: type[Exception] = shmcache.ArenaDamagedError
    ) -> None:
        self._cache = cache
        self._methods = methods
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name in self._methods:
            raise self._error(f"no {name}")
        return getattr(self._cache, name)


@pytest.mark.parametrize("method", ["lookup", "reserve_read"])
def test_no_hits_where_the_arena_fails(sides: Sides, method: str, caplog: pytest.LogCaptureFixture) -> None:
    sides.scheduler._hits._cache = Failing(sides.cache, method)  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR, "vllm.shmcache"):
        for name in "abc":
            asked = Request(name, prompt(5))
            assert sides.match(asked) == (0, False)
            sides.scheduler.allocated(asked, BLOCKS[:5], 0)
            sides.scheduler.finished(name, [])
    assert [record.getMessage() for record in caplog.records] == [
        f"could not look for hits, and goes on without: no {method}"
    ]
    granted(sides, [])


def test_giving_back_may_fail(sides: Sides, caplog: pytest.LogCaptureFixture) -> None:
    asked = Request("a", prompt(5))
    sides.match(asked)
    sides.scheduler._hits._cache = Failing(sides.cache, "cancel_read")  # type: ignore[assignment]
    assert not sides.scheduler.finished("a", [])
    assert "could not give back hits" in caplog.text
    sides.cache.cancel_read(asked.keys(), 1)


# Others


def test_two_engines_find_what_either_stored(make: Make) -> None:
    one, other = make(), make(group="other")
    one.save(Request("a", prompt(3)), [0, 1, 2])
    other.save(Request("b", prompt(5)), [0, 1, 2, 3, 4])
    asked = Request("c", prompt(5))
    assert one.match(asked) == other.match(asked) == (19, False)
    keys = Counter(asked.keys(identity=IDENTITY))
    assert shares(one.arena) == {(group, rank): keys for group in ("vllm", "other") for rank in range(2)}
    other.scheduler.finished("c", [])
    granted(one, asked.keys())


def test_close_gives_back_what_is_granted(sides: Sides) -> None:
    for name in "ab":
        sides.match(Request(name, prompt(5)))
    sides.scheduler.close()
    granted(sides, [])
    check_idle(sides.cache)


def test_counters(sides: Sides) -> None:
    sides.scheduler.counters.take()
    asked = Request("a", prompt(8))
    for _ in range(3):
        sides.match(asked, 1)
    sides.scheduler.allocated(asked, BLOCKS[:8], 16)
    assert sides.scheduler.counters.take() == {"asked_blocks": 7, "hit_blocks": 4}
    sides.scheduler.allocated(asked, BLOCKS[:8], 0)
    assert sides.scheduler.counters.take() == {}
    sides.run(sides.step())
