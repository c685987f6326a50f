"""``tools/replay --policy`` as a person runs it, on traces small enough to know in advance what each cache hits."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes._packages import need

import shmcache
from shmcache_tools.replay.__main__ import main
from shmcache_tools.replay.policies import SIMULATED
from shmcache_tools.replay.policy_study import POLICIES
from shmcache_tools.trace import make_conversations

_TIMEOUT_S = 90
_REPLAY = (sys.executable, "-m", "shmcache_tools.replay")

#: Ten different chunks; caches of 20 % hold two, of 50 % five.
_CHAINS = [[1], [1], [2, 3], [4, 5, 6], [7, 8, 9, 10], [1], [2, 3]]
_CHUNKS = sum(map(len, _CHAINS))


def _write(path: Path, chains: Sequence[Sequence[int]], interval_ms: int) -> Path:
    lines = (json.dumps({"timestamp": i * interval_ms, "hash_ids": list(chain)}) for i, chain in enumerate(chains))
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return _write(tmp_path / "trace.jsonl", _CHAINS, 1000)


@pytest.fixture
def long_trace(tmp_path: Path) -> Path:
    chains = [request.hash_ids.tolist() for request in make_conversations(1, 20000)]
    return _write(tmp_path / "long.jsonl", chains, 40)


@pytest.fixture
def study(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs in this process: exit code, output, errors. No arena is left."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            exit_code = main(arguments)
        except SystemExit as end:  # argparse
            exit_code = end.code  # type: ignore[assignment]
        assert _arenas_of(os.getpid()) == []
        return exit_code, *capsys.readouterr()

    return run


Study = Callable[..., tuple[int, str, str]]


def _arenas_of(pid: int) -> list[str]:
    return [name for name in shmcache.arenas() if name.startswith(f"replay-{pid}-")]


def _document(ran: tuple[int, str, str]) -> dict[str, Any]:
    exit_code, out, err = ran
    assert (exit_code, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    assert (document["schema"], document["faults"]) == (1, [])
    return document


def test_every_policy_and_size(study: Study, trace: Path) -> None:
    (span,) = _document(study(str(trace), "--policy", "--sizes", "50,20", "--speed", "100", "--json"))["spans"]
    assert span["sizes"] == [{"percent": 20.0, "slots": 2}, {"percent": 50.0, "slots": 5}]
    assert (span["trace"], span["span"], span["requests"]) == (str(trace), "whole", 7)
    assert (span["chunks"], span["distinct"]) == (_CHUNKS, 10)
    assert span["endless"] == pytest.approx(4 / _CHUNKS)
    assert span["arenas"]["speed"] == 100.0
    assert list(span["hit_rates"]) == list(POLICIES)
    hits = {name: [round(rate * _CHUNKS) for rate in rates] for name, rates in span["hit_rates"].items()}
    # All hit the second request. Where there is room for more than a chain, 1 was used twice and stays.
    assert hits["arena-lru"] == hits["lru"] == [1, 1]
    assert hits["arena-segmented"] == hits["segmented"] == [1, 2]
    assert hits["optimum"] == [3, 4]


def test_the_table(study: Study, trace: Path) -> None:
    exit_code, out, err = study(str(trace), "--policy", "lru,optimum,arena-lru", "--sizes", "20,50", "--speed", "100")
    assert (exit_code, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for row in (
        "trace.jsonl",
        f"whole 7 requests, {_CHUNKS} chunks",
        "distinct 10 chunks in the whole trace",
        "prefix hits of all chunks, % 20 % 50 %",
        "chunks in the cache 2 5",
        "arena, LRU 7.1 7.1",
        "LRU, suffix first 7.1 7.1",
        "offline optimum 21.4 28.6",
        "All good: no share left, every arena is sound.",
    ):
        assert row in rows
    assert any(row.startswith("arenas at 100 times its speed, late at most ") for row in rows)
    assert "\x1b" not in out


def test_simulated_policies_alone_need_no_time(study: Study, tmp_path: Path) -> None:
    path = _write(tmp_path / "slow.jsonl", _CHAINS, 3600 * 1000)
    (span,) = _document(study(str(path), "--policy", ",".join(SIMULATED), "--json"))["spans"]
    assert span["arenas"] is None
    assert [size["percent"] for size in span["sizes"]] == [1, 2, 5, 10, 25, 50]


def test_several_traces_and_their_halves(study: Study, trace: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "other.jsonl", [[7], [7]], 0)
    shown = _document(
        study(str(trace), str(other), "--policy", "arena-lru,lru", "--halves", "--json", "--speed", "1e3")
    )
    spans = [(Path(span["trace"]).name, span["span"], span["requests"]) for span in shown["spans"]]
    halves = [("whole", 7), ("first half", 3), ("second half", 4)]
    assert spans[:3] == [("trace.jsonl", *half) for half in halves]
    assert spans[3:] == [
        ("other.jsonl", "whole", 2),
        ("other.jsonl", "first half", 1),
        ("other.jsonl", "second half", 1),
    ]
    assert shown["spans"][3]["hit_rates"] == {"arena-lru": [0.5] * 6, "lru": [0.5] * 6}
    assert shown["spans"][5]["hit_rates"] == {"arena-lru": [0.0] * 6, "lru": [0.0] * 6}


def test_the_pace_is_the_trace_s(study: Study, tmp_path: Path) -> None:
    path = _write(tmp_path / "paced.jsonl", [[1], [2], [3]], 1000)
    began = time.monotonic()
    _document(study(str(path), "--policy", "arena-segmented", "--speed", "5", "--json"))
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(("ending", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_picture(study: Study, trace: Path, tmp_path: Path, ending: str, begin: bytes) -> None:
    need("matplotlib")
    picture = tmp_path / f"rates.{ending}"
    exit_code, _, err = study(str(trace), str(trace), "--policy", "lru,optimum", "--halves", "--plot", str(picture))
    assert (exit_code, err) == (0, "")
    content = picture.read_bytes()
    assert content.startswith(begin)
    assert len(content) > 5000


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["TRACE", "--policy", "best"], "expected some of arena-segmented, arena-lru, lru"),
        (["--policy", "TRACE"], "put TRACE first"),
        (["TRACE", "--policy", "--sizes", "0"], "more than 0 and at most 100 %"),
        (["TRACE", "--policy", "--sizes", "5,x"], "--sizes"),
        (["TRACE", "--policy", "--plot", "rates.txt"], "ends in .svg or .png"),
        (["TRACE", "--policy", "--plot", "/nonexistent/rates.svg"], "no folder /nonexistent"),
        (["TRACE", "--policy", "--capacity", "2GiB"], "--capacity: not with --policy"),
        (["TRACE", "--policy", "--no-l2"], "not with --policy"),
        (["TRACE", "--sizes", "5"], "--sizes: not without --policy"),
        (["TRACE", "--halves"], "--halves: not without --policy"),
        (["TRACE", "TRACE"], "expected one TRACE"),
        (["TRACE", "/nonexistent", "--policy"], "No such file"),
        ([os.devnull, "--policy"], "holds no request"),
    ],
)
def test_usage(study: Study, trace: Path, arguments: list[str], why: str) -> None:
    exit_code, out, err = study(*(str(trace) if argument == "TRACE" else argument for argument in arguments))
    assert (exit_code, out) == (2, "")
    assert why in re.sub(r"\s+", " ", err)


def test_a_picture_without_matplotlib(study: Study, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    exit_code, out, err = study(str(trace), "--policy", "lru", "--plot", "rates.svg")
    assert (exit_code, out) == (2, "")
    assert "pip install 'shmcache[plot]'" in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_study_leaves_nothing(long_trace: Path, signum: signal.Signals) -> None:
    command = [*_REPLAY, str(long_trace), "--policy", "arena-lru,arena-segmented", "--speed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(lambda: len(_arenas_of(process.pid)) == 12, process)
        process.send_signal(signum)
        out, err = process.communicate(timeout=_TIMEOUT_S)
    assert (process.returncode, out) == (128 + signum, "")
    assert err == f"replay: ended by {signum.name}; nothing is left behind\n"
    assert _arenas_of(process.pid) == []


def test_an_interrupted_simulation(long_trace: Path) -> None:
    command = [*_REPLAY, str(long_trace), "--policy", "lru", "--sizes", "1,2,5,10,20,30,40,50,60,70,80,90"]
    main_end, process_end = pty.openpty()
    with subprocess.Popen(command, stdout=process_end, stderr=subprocess.PIPE, text=True) as process:
        os.close(process_end)
        shown = b""
        while b"lru," not in shown:  # the progress, on a terminal
            shown += os.read(main_end, 4096)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == "replay: ended by SIGINT; nothing is left behind\n"
    os.close(main_end)
    assert process.returncode == 128 + signal.SIGINT


def _wait_for(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
