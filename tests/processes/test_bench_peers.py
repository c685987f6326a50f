"""tools/bench/peers.py with those peers that are there: it runs, tells who is missing, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from processes._packages import need

import shmcache

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SHM = Path("/dev/shm")  # noqa: S108 # where Linux keeps it
TIMEOUT_S = 280
SIZES = ["4 KiB", "256 KiB", "4 MiB"]
READERS = ["1 reader", "2 readers", "4 readers"]
RANKS = ["TP 1", "TP 2", "TP 4", "TP 8"]
HAS_SERVER = bool(shutil.which("valkey-server") or shutil.which("redis-server")) and find_spec("valkey") is not None
# What each system does, of what there is to do.
ALL = {"hit", "hits", "miss", "misses", "put_new", "put_over", "readers_same", "readers_apart", "cycle"}
WORKS = {
    "shmcache": ALL,
    "lmdb": ALL,
    "Valkey": ALL,
    "shared_memory": ALL,
    "Ray": ALL - {"miss", "misses"},
    "iceoryx2": ALL - {"misses", "put_new"},
    "LMCache L1": ALL - {"readers_same", "readers_apart"},
    "memcpy": {"hit", "hits", "put_new", "put_over"},
    "preadv": {"hit", "hits"},
    "cffi call": {"hit", "hits", "miss"},
}


def _start(*args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(BENCH / "peers.py"), "--quick", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def _run(*args: str, **environment: str) -> tuple[int, str, str]:
    with _start(*args, **environment) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    _check_clean(process.pid)
    return process.returncode, out, err


def _check_clean(pid: int) -> None:
    assert [name for name in shmcache.arenas() if name.startswith(f"bench-{pid}-")] == []
    assert list(SHM.glob(f"shmcache-bench-{pid}-*")) == []


def _columns(workload: str) -> list[str]:
    return READERS if workload.startswith("readers") else RANKS if workload == "cycle" else SIZES


def _check(findings: list[dict[str, Any]], systems: set[str]) -> None:
    """One finding for each thing that each system does, and numbers that can be."""
    expected = {(work, column, system) for system in systems for work in WORKS[system] for column in _columns(work)}
    counted = Counter((finding["workload"], finding["column"], finding["system"]) for finding in findings)
    assert set(counted) == expected
    assert set(counted.values()) == {1}
    for finding in findings:
        assert 0 < finding["best"] <= finding["median"]
        assert finding["cpu"] >= 0
        assert finding["times"] == 1 if finding["system"] == "shmcache" else finding["times"] > 0
        assert finding["limit"] == (finding["system"] in {"memcpy", "preadv", "cffi call"})


def _peers_here() -> dict[str, str]:
    """The peers that these tests can count on, by option: all but those that take long to start."""
    here = {"lmdb": "lmdb", "shared_memory": "shared_memory"}
    return {**here, "valkey": "Valkey"} if HAS_SERVER else here


def test_everything_is_measured(tmp_path: Path) -> None:
    need("lmdb")
    path = tmp_path / "peers.json"
    code, out, err = _run("--peers", ",".join(_peers_here()), "--json", str(path), TMPDIR=str(tmp_path))
    assert (code, err) == (0, "")
    document = json.loads(path.read_text(encoding="utf-8"))
    systems = {"shmcache", *_peers_here().values(), "memcpy", "preadv", "cffi call"}
    systems -= set(document["missing"])  # where there is no C compiler
    assert set(document["missing"]) <= {"cffi call"}
    assert set(document["systems"]) == systems
    _check(document["findings"], systems)
    assert set(document["units"]) == ALL
    for title in (
        "hit: one key",
        "hits in a batch of 256",
        "put over",
        "readers, a process each",
        "grant, read, release",
    ):
        assert title in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("peer", "module", "system"),
    [("ray", "ray", "Ray"), ("iceoryx2", "iceoryx2", "iceoryx2"), ("lmcache", "lmcache", "LMCache L1")],
)
def test_a_peer_that_is_seldom_installed(peer: str, module: str, system: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    missing = find_spec(module) is None
    code, _, err = _run("--peers", peer, "--json", str(path), *(["--only", "miss"] if missing else []))
    assert code == 0, err
    document = json.loads(path.read_text(encoding="utf-8"))
    findings = [finding for finding in document["findings"] if finding["system"] in {"shmcache", system}]
    if missing:
        assert document["missing"][system].startswith("needs ")
        assert {finding["system"] for finding in findings} == {"shmcache"}
    else:
        _check(findings, {"shmcache", system})


def test_who_is_missing_is_a_line(tmp_path: Path) -> None:
    code, out, err = _run("--only", "hit", "--peers", "valkey", PATH=str(tmp_path))
    assert (code, err) == (0, "")
    assert re.search(r"^Valkey +left out: needs valkey-server or redis-server", out, re.MULTILINE)
    assert re.search(r"^cffi call +left out: needs a C compiler", out, re.MULTILINE)
    rows = [line.split("  ")[0] for line in out.partition("hit: one key")[2].splitlines()[2:]]
    assert rows == ["shmcache", "limit: memcpy", "limit: preadv"]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot(ending: str, tmp_path: Path) -> None:
    need("matplotlib")
    path = tmp_path / f"plot.{ending}"
    code, _, err = _run("--only", "miss", "--peers", "shared_memory", "--plot", str(path))
    assert (code, err) == (0, "")
    assert path.read_bytes().startswith({"svg": b"<?xml", "png": b"\x89PNG"}[ending])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plot", "peers.pdf"], "expected a name that ends in .png or .svg, got 'peers.pdf'"),
        (["--plot", "nowhere/peers.svg"], "there is no folder 'nowhere'"),
        (["--peers", "lmdb,memcached"], "got 'memcached'"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_usage(args: list[str], message: str) -> None:
    code, out, err = _run(*args)
    assert (code, out) == (2, "")
    assert message in err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    code, out, err = _run("--only", "miss", "--peers", "", "--json", str(tmp_path))
    assert code == 1
    assert "miss: one key" in out
    assert err.startswith("peers.py: ")
    assert str(tmp_path) in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("workload", "after_s"), [("hit", 0.5), ("readers_same", 2.0), ("cycle", 1.0)])
def test_an_interrupted_run_leaves_nothing(workload: str, after_s: float, signum: int, tmp_path: Path) -> None:
    args = ("--only", workload, "--peers", ",".join(_peers_here()))
    with _start(*args, TMPDIR=str(tmp_path)) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("preadv"):  # all have started
                    break
            time.sleep(after_s)
            children = _children(process.pid)
            process.send_signal(signum)
            _, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert (process.returncode, err) in {(1, "peers.py: interrupted\n"), (0, "")}  # it may have been done
    _check_clean(process.pid)
    assert list(tmp_path.iterdir()) == []
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in text.split()]
