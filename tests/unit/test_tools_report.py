"""The report of the demo, from numbers made by hand."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from shmcache.stats import Counters, Gauges, Histogram, Histograms, Stats
from shmcache.storage import PrefetchResult
from shmcache_tools.demo.report import GRANT, RESERVE, Loss, Outcome, Tally, progress, report
from shmcache_tools.text import make_console


def _outcome() -> Outcome:
    tally = Tally(requests=10, world_size=2, chunk_bytes=10**6, best_hit_rate=0.5)
    tally.finished = tally.handed_out = 10
    tally.prefetched(PrefetchResult(hits=20, l1_hits=20, l2_hits=0), 60)
    tally.prefetched(PrefetchResult(hits=20, l1_hits=15, l2_hits=5), 40)
    tally.read_chunks = [100, 100]
    tally.losses = [Loss(0, 0.002, 0.001, 0), Loss(1, 0.004, 0.002, 0), Loss(0, 0.01, 0.003, 0)]
    for _ in range(99):
        tally.sample(RESERVE, 500e-9, 10)
    tally.sample(RESERVE, 110e-6, 11)
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
        counters=Counters(
            evictions=7,
            evicted_bytes=7 * 10**6,
            reaped_shares=42,
            l2_loads=5,
            l2_loaded_bytes=5 * 10**6,
            l2_stores=60,
            l2_stored_bytes=60 * 10**6,
        ),
        gauges=Gauges(prefetch_in_flight=2, l2_loading=16, l2_backlog_bytes=2**20),
        histograms=Histograms(prefetch_total=Histogram(0.01, (0, 3, 1) + (0,) * 20)),
    )
    return Outcome(tally, elapsed_s=2.0, flush_s=0.03, pipe_bytes=123456, l2="files", stats=stats, problems=[])


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
        "40.0 %: L1 35.0 %, L2 5.0 % (endless cache: 50.0 %)",
        "200 chunks, 0.20 GB, 0.10 GB a second",
        "in 0 chunks; every byte was compared",
        "0 GB of chunks; 0.1 MB of keys and answers, by pipe",
        "7 chunks, 0.01 GB",
        "60 chunks, 0.06 GB, the last 30 ms after the end",
        "3, with 42 shares",
        "after 4 ms (p50), 10 ms (max), of it reap() 2 ms",
        "0, evicted before the new worker came",
        "All good",
    ):
        assert part in text
    (reserve,) = [line.split() for line in text.splitlines() if line.startswith(RESERVE)]
    assert reserve[3:] == ["50", "ns", "10", "us", "1,001", "100"]
    assert GRANT not in text
    (prefetch,) = [line.split() for line in text.splitlines() if line.startswith("prefetch total")]
    assert prefetch[2:] == ["4", "2.5", "ms", "32", "us", "64", "us"]


def test_no_line_is_too_long_for_a_terminal_of_80_columns() -> None:
    lines = [line.rstrip() for line in _text(_outcome()).splitlines()]
    assert max(map(len, lines)) <= 80


def test_without_l2() -> None:
    text = _text(replace(_outcome(), l2=None))
    assert "stores" not in text
    assert "All good" in text


def test_what_went_wrong_with_l2_is_told_and_makes_no_run_bad() -> None:
    outcome = _outcome()
    counters = replace(outcome.stats.counters, l2_load_errors=2, l2_damaged=1, prefetch_no_space=9)
    outcome = replace(outcome, stats=replace(outcome.stats, counters=counters))
    rows = [" ".join(line.split()) for line in _text(outcome).splitlines()]
    assert "failures 3" in rows
    assert "not loaded for want of room 9 requests" in rows
    assert outcome.faults == []


def test_progress() -> None:
    outcome = _outcome()
    out = io.StringIO()
    make_console(out).print(progress(outcome.tally, outcome.stats, [], []))
    rows = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    for row in (
        "hit rate 40.0 %: L1 35.0 %, L2 5.0 %",
        "in flight 2 requests, 16 chunks loading",
        "loaded from L2 5 chunks, 0.01 GB",
        "stored to L2 0.06 GB, 1 MiB on the way",
        "prefetch took at most 32 us (p50), 64 us (p99)",
    ):
        assert row in rows


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
