"""The report of the demo, from numbers made by hand."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from shmcache.stats import Counters, Stats
from shmcache_tools.demo_report import GRANT, LOOKUP, Loss, Outcome, Tally, report
from shmcache_tools.text import make_console


def _outcome() -> Outcome:
    tally = Tally(requests=10, world_size=2, chunk_bytes=10**6, best_hit_rate=0.5)
    tally.finished = tally.handed_out = 10
    tally.chunks, tally.hits = 100, 40
    tally.read_chunks = [100, 100]
    tally.losses = [Loss(0, 0.002, 0.001, 0), Loss(1, 0.004, 0.002, 0), Loss(0, 0.01, 0.003, 0)]
    for _ in range(99):
        tally.sample(LOOKUP, 500e-9, 10)
    tally.sample(LOOKUP, 110e-6, 11)
    tally.sample(GRANT, 1.0, 0)
    stats = Stats(
        capacity=2**30,
        block_size=65536,
        used_bytes=0,
        resident_bytes=0,
        slots=100,
        objects=60,
        writing=0,
        reserved=0,
        held=0,
        lanes_alive=1,
        lanes_dead=0,
        counters=Counters(evictions=7, evicted_bytes=7 * 10**6, reaped_shares=42),
    )
    return Outcome(tally, elapsed_s=2.0, pipe_bytes=123456, stats=stats, problems=[])


def _text(outcome: Outcome) -> str:
    out = io.StringIO()
    make_console(out).print(report(outcome))
    return out.getvalue()


def test_a_good_run() -> None:
    outcome = _outcome()
    text = _text(outcome)
    assert outcome.faults == []
    for part in (
        "10 of 10, by each of 2 workers, in 2.0 s",
        "40.0 %, 40 of 100 chunks (50.0 % without evictions)",
        "200 chunks, 0.20 GB, 0.10 GB a second",
        "in 0 chunks; every byte was compared",
        "0 GB of chunks; 0.1 MB of keys and answers, by pipe",
        "7 objects, 0.01 GB",
        "3, with 42 shares",
        "after 4 ms (p50), 10 ms (max), of it reap() 2 ms",
        "0, evicted before the new worker came",
        "All good",
    ):
        assert part in text
    (lookup,) = [line.split() for line in text.splitlines() if line.startswith(LOOKUP)]
    assert lookup[1:] == ["50", "ns", "10", "us", "1,001", "100"]
    assert GRANT not in text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"finished": 9}, "9 of 10 requests finished"),
        ({"read_chunks": [100, 99]}, "199 of 200 chunks read"),
        ({"mismatches": 1}, "1 chunks held wrong bytes"),
        ({"losses": [Loss(0, 0.1, 0.1, 2)]}, "shares left on a dead worker's lane"),
    ],
)
def test_what_makes_a_run_bad(change: dict[str, object], fault: str) -> None:
    outcome = _outcome()
    for name, value in change.items():
        setattr(outcome.tally, name, value)
    assert any(fault in found for found in outcome.faults)
    assert "FAILED: " in _text(outcome)


def test_a_bad_arena_makes_a_run_bad() -> None:
    outcome = _outcome()
    left = replace(outcome, stats=replace(outcome.stats, reserved=2, held=1))
    assert left.faults == ["3 shares outstanding"]
    unsound = replace(outcome, problems=["slot 3: torn"])
    assert unsound.faults == ["verify(): slot 3: torn"]
    assert "slot 3: torn" in _text(unsound)
