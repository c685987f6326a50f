"""What ``tools/replay --policy`` shows of findings made by hand, and what makes a study bad."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from processes._packages import need
from rich.console import Console

from shmcache_tools.chunks import keys_of
from shmcache_tools.replay.policy_arena import tried_arena
from shmcache_tools.replay.policy_report import Findings, SpanFindings, Step, document, progress, report, save_plot


def _findings(faults: tuple[str, ...] = ()) -> Findings:
    span = SpanFindings("a/trace.jsonl", "whole", 10, 100, 50, {1.0: 1, 20.0: 10}, endless=0.5, speed=60.0)
    span.hit_rates = {"optimum": [0.4, 0.5], "lru": [0.1, 0.3], "arena-segmented": [0.2, 0.3]}
    span.late_s = 0.5
    span.faults += faults
    return Findings(["arena-segmented", "lru", "optimum"], [span])


def _text(findings: Findings, *, terminal: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=terminal, highlight=False).print(report(findings))
    return out.getvalue()


def test_the_best_is_bold_and_a_bound_is_not() -> None:
    text = _text(_findings(), terminal=True)
    bold = {part.split("\x1b")[0] for part in text.split("\x1b[1m")[1:]}
    assert {"20.0", "30.0"} <= bold
    assert not {"10.0", "40.0", "50.0"} & bold
    assert text.count("\x1b[1m30.0") == 2  # both are the best


def test_how_late_it_was_is_told_in_both_times() -> None:
    rows = [" ".join(line.split()) for line in _text(_findings()).splitlines()]
    assert "arenas at 60 times its speed, late at most 500 ms, 30.0 s of its time" in rows


def test_faults_are_told() -> None:
    findings = _findings(("arena, lru, 10 slots: 1 share left",))
    assert findings.faults == ["trace.jsonl, whole: arena, lru, 10 slots: 1 share left"]
    text = " ".join(_text(findings).split())
    assert "FAILED: trace.jsonl, whole: arena, lru, 10 slots: 1 share left" in text
    assert "All good" not in text
    assert document(findings)["faults"] == findings.faults


def test_the_document_is_json() -> None:
    shown = json.loads(json.dumps(document(_findings())))
    assert shown["spans"][0]["arenas"] == {"speed": 60.0, "late_max_s": 0.5}
    assert shown["spans"][0]["hit_rates"]["lru"] == [0.1, 0.3]


def test_progress_from_the_first_moment_on() -> None:
    out = io.StringIO()
    step = Step(spans=3)
    console = Console(file=out, width=80)
    console.print(progress(step))
    step.begin("trace.jsonl, whole: sieve, 5 %", 1000)
    step.served = 400
    console.print(progress(step))
    assert "0 of 3" in out.getvalue()
    assert "400 of 1,000" in out.getvalue()
    assert "trace.jsonl, whole: sieve, 5 %" in out.getvalue()


def test_a_picture_of_traces_with_and_without_halves(tmp_path: Path) -> None:
    need("matplotlib")
    findings = _findings()
    (whole,) = findings.spans
    half = SpanFindings("b.jsonl", "first half", 5, 50, 25, {1.0: 1}, endless=0.5, speed=60.0)
    half.hit_rates = {name: [0.1] for name in findings.policies}
    save_plot(tmp_path / "rates.svg", Findings(findings.policies, [whole, whole, half]))
    assert (tmp_path / "rates.svg").stat().st_size > 5000


# What is wrong with an arena


def test_a_share_that_is_left_is_a_fault() -> None:
    keys = keys_of(np.arange(3, dtype=np.uint64))
    with tried_arena(4, "lru", 1.0) as arena:
        assert arena.serve(keys) == 0
        arena._cache.reserve_read(keys[:2])
        assert arena.faults() == ["2 shares left"]
        arena._cache.finish_read(keys[:2])
        assert arena.faults() == []


@pytest.mark.parametrize(("chunks", "faults"), [(2, ["no room for 2 chunks: is /dev/shm full?"]), (5, [])])
def test_no_room_is_a_fault_unless_the_chain_is_too_long(chunks: int, faults: list[str]) -> None:
    with tried_arena(4, "lru", 1.0) as arena:
        held = keys_of(np.arange(100, 104, dtype=np.uint64))
        batch = arena._cache.reserve_write(held, 4096)  # nothing of it can go
        arena.serve(keys_of(np.arange(chunks, dtype=np.uint64)))
        batch.publish()
        assert arena.faults() == faults
