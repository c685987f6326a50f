"""``tools/replay`` as a person runs it, on traces small enough to know in advance what each tier hits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes._packages import need

import shmcache
from shmcache_tools.chunks import keys_of
from shmcache_tools.replay.__main__ import main
from shmcache_tools.trace import make_conversations

_TIMEOUT_S = 90
_CHUNK = 4096

_ROOM = str(20 * _CHUNK)


def _chains(others: int) -> list[list[int]]:
    """Ten chunks, twice; ten more, which fill the room; ``others``, for which as many of the first ten, from their end,
    must go; the first ten again. Whatever has to go is in L2 by then: who publishes waits for what is being stored,
    as that is more than an eighth of this small arena."""
    first, second = list(range(10)), list(range(10, 20))
    return [first, first, second, list(range(20, 20 + others)), first]


Replay = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the default L2 is made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return _write(tmp_path / "trace.jsonl", _chains(4))


@pytest.fixture
def long_trace(tmp_path: Path) -> Path:
    chains = [request.hash_ids.tolist() for request in make_conversations(1, 20000)]
    return _write(tmp_path / "long.jsonl", chains)


@pytest.fixture
def start(scratch: Path) -> Replay:
    def start_one(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "shmcache_tools.replay", "--chunk-bytes", str(_CHUNK), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )

    return start_one


@pytest.fixture
def run(start: Replay, scratch: Path) -> Callable[..., tuple[int, str, str]]:
    """Replays to the end: exit code, output, errors. Arena and files are gone."""
    need("xxhash")

    def run_one(*arguments: str) -> tuple[int, str, str]:
        with start(*arguments) as replay:
            out, err = replay.communicate(timeout=_TIMEOUT_S)
        assert _arena_of(replay) not in shmcache.arenas()
        assert list(scratch.iterdir()) == []
        return replay.returncode, out, err

    return run_one


def _write(path: Path, chains: Any, interval_ms: int = 0) -> Path:
    lines = (json.dumps({"timestamp": i * interval_ms, "hash_ids": chain}) for i, chain in enumerate(chains))
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _arena_of(replay: subprocess.Popen[str]) -> str:
    return f"replay-{replay.pid}"


def _document(ran: tuple[int, str, str]) -> dict[str, Any]:
    exit_code, out, err = ran
    assert (exit_code, err) == (0, ""), out
    document: dict[str, Any] = json.loads(out)
    assert (document["wrong_chunks"], document["shares_left"], document["faults"]) == (0, 0, [])
    return document


def _wait_until_running(replay: subprocess.Popen[str], scratch: Path) -> None:
    """Wait until it has read something, and stored something."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        assert replay.poll() is None
        if _arena_of(replay) in shmcache.arenas() and any(scratch.rglob("*.safetensors")):
            stats = shmcache.inspect(_arena_of(replay)).stats
            if stats and stats.counters.releases:
                return
        time.sleep(0.01)
    pytest.fail("the replay did not start")


@pytest.mark.parametrize(("others", "readers"), [(3, "1"), (4, "3"), (10, "2")])
def test_what_each_tier_hits(run: Callable[..., Any], tmp_path: Path, others: int, readers: str) -> None:
    path = _write(tmp_path / "known.jsonl", _chains(others))
    shown = _document(run(str(path), "--capacity", _ROOM, "--readers", readers, "--json"))
    total, l1, written = 40 + others, 20 - others, 20 + others
    assert shown["chunks"] == {"total": total, "l1": l1, "l2": others, "none": written, "past_prefix": 0}
    rates = {"l1": l1 / total, "l2": others / total, "total": 20 / total, "endless": pytest.approx(20 / total)}
    assert shown["hit_rate"] == rates
    l2 = {name: shown["l2"][name] for name in ("loads", "loaded_bytes", "stores", "stored_bytes", "evictions")}
    assert l2 == {
        "loads": others,
        "loaded_bytes": others * _CHUNK,
        "stores": written,
        "stored_bytes": written * _CHUNK,
        "evictions": 0,
    }
    assert (shown["l2"]["failures"], shown["l2"]["load_misses"], shown["l2"]["no_space"]) == (0, 0, 0)
    assert (shown["l1"]["evictions"], shown["l1"]["evicted_bytes"]) == (2 * others, 2 * others * _CHUNK)
    kinds = ("l1_alone", "l2_missed", "l2_loaded")
    assert [shown["times"][kind]["prefetch"]["requests"] for kind in kinds] == [1, 3, 1]
    assert shown["times"]["l2_missed"]["first_key"] is None
    assert [shown["times"][kind]["first_key"]["requests"] for kind in ("l1_alone", "l2_loaded")] == [1, 1]


@pytest.mark.parametrize("others", [3, 10])
def test_the_arena_alone(run: Callable[..., Any], tmp_path: Path, others: int) -> None:
    path = _write(tmp_path / "known.jsonl", _chains(others))
    shown = _document(run(str(path), "--capacity", _ROOM, "--no-l2", "--json"))
    chunks = {"total": 40 + others, "l1": 20 - others, "l2": 0, "none": 20 + 2 * others, "past_prefix": 0}
    assert shown["chunks"] == chunks
    assert shown["l2"]["description"] is None
    assert (shown["l2"]["stores"], shown["l2"]["loads"]) == (0, 0)
    assert shown["times"]["l2_loaded"] == {"prefetch": None, "first_key": None}


def test_an_arena_that_holds_all_needs_no_l2(run: Callable[..., Any], trace: Path) -> None:
    shown = _document(run(str(trace), "--capacity", "1MiB", "--json"))
    assert shown["chunks"] == {"total": 44, "l1": 20, "l2": 0, "none": 24, "past_prefix": 0}
    assert shown["l2"]["stores"] == 24
    assert shown["l1"]["evictions"] == 0


def test_an_l2_that_is_kept_serves_the_next_replay(run: Callable[..., Any], trace: Path, tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    _document(run(str(trace), "--l2", kept, "--capacity", _ROOM, "--json"))
    shown = _document(run(str(trace), "--l2", kept, "--capacity", "1MiB", "--json"))
    assert shown["chunks"] == {"total": 44, "l1": 20, "l2": 24, "none": 0, "past_prefix": 0}
    assert kept in shown["l2"]["description"]


def test_wrong_bytes_in_l2_are_told(run: Callable[..., Any], trace: Path, tmp_path: Path) -> None:
    """They are stored so, with the checksum that they have: only who knows what they should be can tell."""
    file_store = need("shmcache.storage.file").FileStore(tmp_path / "kept")
    key = keys_of(np.array([7], dtype=np.uint64)).tobytes()
    assert file_store.store([key], [memoryview(bytes(_CHUNK))]) == [shmcache.Status.OK]
    others = [keys_of(np.array([chunk], dtype=np.uint64)).tobytes() for chunk in range(7)]
    file_store.store(others, [memoryview(b"%d" % i * _CHUNK) for i in range(7)])
    exit_code, out, _ = run(str(trace), "--l2", str(tmp_path / "kept"), "--requests", "1")
    assert exit_code == 1
    assert "FAILED: 8 chunks held wrong bytes" in out


def test_the_report(run: Callable[..., Any], trace: Path) -> None:
    exit_code, out, err = run(str(trace), "--capacity", _ROOM)
    assert (exit_code, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for row in ("L1 36.4 %, 16 chunks", "L2 9.1 %, 4 chunks", "none 54.5 %, 24 chunks", "shares left 0"):
        assert row in rows
    assert any(row.startswith("prefetch, loads ") for row in rows)
    assert "All good" in out
    assert "\x1b" not in out


def test_many_requests_in_flight_in_a_small_arena(run: Callable[..., Any], tmp_path: Path) -> None:
    chains = [request.hash_ids.tolist() for request in make_conversations(3, 200)]
    path = _write(tmp_path / "many.jsonl", chains)
    room = str((max(map(len, chains)) + 20) * _CHUNK)
    shown = _document(
        run(str(path), "--capacity", room, "--in-flight", "8", "--readers", "2", "--l2-capacity", "4MiB", "--json")
    )
    chunks = shown["chunks"]
    assert shown["requests"] == 200
    assert sum(chunks.values()) == 2 * chunks["total"] == 2 * sum(map(len, chains))
    assert shown["l1"]["evictions"] > 0
    assert shown["l2"]["evictions"] > 0
    assert shown["l2"]["loads"] > 0
    assert shown["times"]["l2_loaded"]["first_key"] is None  # not to be known where requests overlap


def test_at_the_speed_of_the_trace(run: Callable[..., Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "paced.jsonl", [[0], [1], [2]], interval_ms=400)
    shown = _document(run(str(path), "--speed", "2", "--json"))
    assert shown["elapsed_s"] >= 0.4
    assert shown["times"]["late"]["requests"] == 3
    assert shown["options"]["speed"] == 2.0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_replay_leaves_nothing(
    start: Replay, scratch: Path, long_trace: Path, signum: signal.Signals
) -> None:
    need("xxhash")
    with start(str(long_trace), "--capacity", "4MiB", "--in-flight", "4", "--readers", "2") as replay:
        _wait_until_running(replay, scratch)
        replay.send_signal(signum)
        _, err = replay.communicate(timeout=_TIMEOUT_S)
    assert replay.returncode == 128 + signum
    assert err == f"replay: ended by {signum.name}; nothing is left behind\n"
    assert _arena_of(replay) not in shmcache.arenas()
    assert list(scratch.iterdir()) == []


def test_an_interrupted_replay_that_waits_for_its_time(start: Replay, tmp_path: Path) -> None:
    path = _write(tmp_path / "slow.jsonl", [[0], [1]], interval_ms=3600 * 1000)
    with start(str(path), "--speed", "1", "--no-l2", "--in-flight", "2") as replay:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (_arena_of(replay) in shmcache.arenas() and _published(replay)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        replay.send_signal(signal.SIGINT)
        replay.communicate(timeout=_TIMEOUT_S)
    assert replay.returncode == 128 + signal.SIGINT


def _published(replay: subprocess.Popen[str]) -> int:
    stats = shmcache.inspect(_arena_of(replay)).stats
    return stats.counters.publishes if stats else 0


def test_what_a_sigkill_left_is_removed_by_the_next(
    start: Replay, run: Callable[..., Any], scratch: Path, trace: Path, long_trace: Path
) -> None:
    with start(str(long_trace), "--capacity", "4MiB") as replay:
        _wait_until_running(replay, scratch)
        replay.kill()
        replay.communicate(timeout=_TIMEOUT_S)
    (left,) = scratch.iterdir()
    shmcache.destroy(_arena_of(replay), force=True)
    exit_code, _, err = run(str(trace))  # it looks that nothing is there afterwards
    assert exit_code == 0
    assert err == f"removing {left}, the L2 of a run that was killed\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "required: TRACE"),
        (["/nonexistent"], "No such file"),
        ([os.devnull], "holds no request"),
        (["TRACE", "--capacity", "8KiB"], "--capacity: the longest request has 10 chunks and needs 40 KiB, got 8KiB"),
        (["TRACE", "--capacity", "much"], "capacity"),
        (["TRACE", "--chunk-bytes", "12"], "multiple of 8"),
        (["TRACE", "--l2", "nowhere://host"], "nowhere"),
        (["TRACE", "--l2-capacity", "much"], "argument --l2-capacity: size: expected a number"),
        (["TRACE", "--l2-capacity", "1KiB"], "at least 1MiB"),
        (["TRACE", "--no-l2", "--l2-capacity", "1GiB"], "not allowed with"),
        (["TRACE", "--in-flight", "0"], "expected 1 to 1024"),
        (["TRACE", "--readers", "129"], "expected 1 to 128"),
        (["TRACE", "--speed", "0"], "expected 0.001 to"),
        (["TRACE", "--requests", "none"], "invalid"),
    ],
)
def test_usage(trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    need("xxhash")
    try:
        given = [str(trace) if argument == "TRACE" else argument for argument in arguments]
        exit_code = main(["--chunk-bytes", str(_CHUNK), *given])
    except SystemExit as end:  # argparse
        exit_code = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (exit_code, out) == (2, "")
    assert why in re.sub(r"\s+", " ", err)


def test_usage_is_an_exit_code(run: Callable[..., Any]) -> None:
    exit_code, out, err = run("/nonexistent")
    assert (exit_code, out) == (2, "")
    assert err == "replay: [Errno 2] No such file or directory: '/nonexistent'\n"


def test_an_l2_that_does_not_answer(run: Callable[..., Any], trace: Path) -> None:
    need("valkey")
    exit_code, out, err = run(str(trace), "--l2", "valkey://127.0.0.1:1")
    assert (exit_code, out) == (1, "")
    assert err.startswith("replay: L2: ")
    assert "does not answer" in err
    assert "Traceback" not in err
