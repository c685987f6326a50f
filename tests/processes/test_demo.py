"""The demo as a person runs it, only smaller: whole runs, deaths, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes._packages import need

import shmcache
from shmcache_tools.demo.__main__ import main
from shmcache_tools.trace import make_conversations

_TIMEOUT_S = 90
_SMALL = ("--chunk-bytes", "4096", "--capacity", "4MiB", "--seed", "1")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its L2; nothing is left there."""
    need("xxhash")
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shmcache_tools.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(*arguments: str) -> tuple[int, str]:
    """The exit code and the report; the arena and the workers are gone."""
    with _start(*arguments) as demo:
        out, err = demo.communicate(timeout=_TIMEOUT_S)
    assert err == ""
    assert _arena_of(demo) not in shmcache.arenas()
    assert _workers_of(demo) == []
    return demo.returncode, out


def _arena_of(demo: subprocess.Popen[str]) -> str:
    return f"demo-{demo.pid}"


def _workers_of(demo: subprocess.Popen[str]) -> list[int]:
    """The pids of its worker processes, also when they have another parent by now."""
    mark = f"shmcache_tools.demo.worker\0{_arena_of(demo)}\0".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # ended while we looked
    return found


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} not in:\n{text}"
    return int(match[1].replace(",", ""))


def _wait_until_running(demo: subprocess.Popen[str], workers: int) -> None:
    """Wait until its workers have read something."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        assert demo.poll() is None
        if _arena_of(demo) in shmcache.arenas():
            stats = shmcache.inspect(_arena_of(demo)).stats
            if stats and stats.counters.releases and stats.lanes_alive == workers + 1:
                return
        time.sleep(0.01)
    pytest.fail("the demo did not start")


def _wait_until_gone(demo: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while _workers_of(demo):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_made_up_conversations() -> None:
    exit_code, out = _run(*_SMALL, "--requests", "300")
    assert exit_code == 0
    assert "300 of 300, by each of 4 workers" in out
    assert "All good" in out
    assert _number(out, r"\nevictions +([\d,]+) chunks") > 0
    assert 20 < _number(out, r"hit rate +(\d+)\.\d %: L1") < 100
    assert _number(out, r"loads +([\d,]+) chunks") > 0
    assert _number(out, r"stores +([\d,]+) chunks") > 0
    for operation in ("reserve to write", "publish and grant", "read", "release", "prefetch total", "l2 store"):
        assert re.search(rf"^{operation} +[\d,.]+ ", out, re.MULTILINE)
    assert "\x1b" not in out


def test_without_l2() -> None:
    exit_code, out = _run(*_SMALL, "--requests", "100", "--no-l2")
    assert exit_code == 0
    assert re.search(r"^L2 +none *$", out, re.MULTILINE)
    assert ", L2 0.0 %" in out
    assert "All good" in out
    assert "l2 store" not in out


def test_an_l2_that_is_smaller_than_what_is_stored() -> None:
    exit_code, out = _run(*_SMALL, "--requests", "150", "--l2-capacity", "1MiB")
    assert exit_code == 0
    assert _number(out, r"\n  evictions +([\d,]+) chunks") > 0
    assert "All good" in out


def test_an_l2_that_is_kept_has_what_the_next_run_needs(tmp_path: Path) -> None:
    kept = ("--l2", str(tmp_path / "kept"), "--requests", "100", *_SMALL)
    for written in (True, False):
        exit_code, out = _run(*kept)
        assert exit_code == 0
        assert (_number(out, r"stores +([\d,]+) chunks") > 0) == written


def test_a_trace_in_an_arena_that_holds_one_request(tmp_path: Path) -> None:
    """With no room for two requests the scheduler waits for shares, and drops nothing."""
    trace = [request.hash_ids.tolist() for request in make_conversations(2, 150)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in trace))
    capacity = max(map(len, trace)) * 12288
    exit_code, out = _run(
        *("--trace", str(path), "--workers", "2", "--chunk-bytes", "12288", "--capacity", str(capacity))
    )
    assert exit_code == 0
    assert "150 of 150, by each of 2 workers" in out
    assert _number(out, r"waited for room +([\d,]+) times") > 0


def test_workers_are_killed_and_nothing_is_lost() -> None:
    exit_code, out = _run(*_SMALL, "--requests", "300", "--kill", "0.5")
    assert exit_code == 0
    assert "300 of 300, by each of 4 workers" in out
    assert _number(out, r"workers died +([\d,]+), with") > 0
    assert "All good" in out


def test_killing_in_a_small_arena() -> None:
    """Chunks of dead workers are evicted before they come back, and are written again."""
    exit_code, out = _run(
        *("--workers", "2", "--chunk-bytes", "4096", "--capacity", "512KiB", "--seed", "5"),
        *("--requests", "250", "--kill", "0.4"),
    )
    assert exit_code == 0
    assert _number(out, r"workers died +([\d,]+), with") > 0
    assert _number(out, r"waited for room +([\d,]+) times") > 0


def test_one_worker_that_somebody_else_kills() -> None:
    with _start(*_SMALL, "--requests", "400", "--workers", "1") as demo:
        _wait_until_running(demo, 1)
        for pid in _workers_of(demo):
            os.kill(pid, signal.SIGKILL)
        out, err = demo.communicate(timeout=_TIMEOUT_S)
    assert (demo.returncode, err) == (0, "")
    assert _number(out, r"workers died +([\d,]+), with") == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(signum: signal.Signals) -> None:
    with _start(*_SMALL, "--requests", "20000", "--keep", "--kill") as demo:
        _wait_until_running(demo, 4)
        demo.send_signal(signum)
        _, err = demo.communicate(timeout=_TIMEOUT_S)
    assert demo.returncode == 128 + signum
    assert err == f"demo: ended by {signum.name}; nothing is left behind\n"
    assert _arena_of(demo) not in shmcache.arenas()
    assert _workers_of(demo) == []


def test_workers_do_not_outlive_a_killed_demo(scratch: Path) -> None:
    with _start(*_SMALL, "--requests", "20000") as demo:
        _wait_until_running(demo, 4)
        demo.kill()
        demo.communicate(timeout=_TIMEOUT_S)
    _wait_until_gone(demo)
    info = shmcache.inspect(_arena_of(demo))
    assert info.stale
    shmcache.destroy(info.name)
    (left,) = scratch.iterdir()
    with _start(*_SMALL, "--requests", "1") as demo:
        _, err = demo.communicate(timeout=_TIMEOUT_S)
    assert err == f"removing {left}, the L2 of a run that was killed\n"


def test_keep() -> None:
    with _start(*_SMALL, "--requests", "20", "--keep") as demo:
        out, _ = demo.communicate(timeout=_TIMEOUT_S)
    assert demo.returncode == 0
    arena = _arena_of(demo)
    assert f"shmcache-cleanup {arena}" in out
    stats = shmcache.inspect(arena).stats
    assert stats is not None
    assert stats.objects > 0
    assert stats.reserved + stats.held == 0
    shmcache.destroy(arena)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--workers", "0"], "expected 1 to"),
        (["--chunk-bytes", "12"], "multiple of 8"),
        (["--capacity", "1MiB"], "the longest request has"),
        (["--capacity", "much"], "capacity"),
        (["--trace", "/nonexistent"], "No such file"),
        (["--trace", os.devnull], "no request"),
        (["--kill", "0"], "expected 0.05"),
        (["--l2", "nowhere://host"], "nowhere"),
        (["--no-l2", "--l2-capacity", "1GiB"], "not allowed with"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    try:
        exit_code = main(arguments)
    except SystemExit as end:  # argparse
        exit_code = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (exit_code, out) == (2, "")
    assert why in err


def test_usage_is_an_exit_code() -> None:
    with _start("--trace", "/nonexistent") as demo:
        out, err = demo.communicate(timeout=_TIMEOUT_S)
    assert (demo.returncode, out) == (2, "")
    assert err == "demo: [Errno 2] No such file or directory: '/nonexistent'\n"
