"""tools/bench/device.py without a GPU, and on the double of the driver, where what it measures says nothing."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_double
import pytest
import torch
from processes import _bench_gpu, _packages

import shmcache

TESTS = Path(__file__).parents[1]
BENCH = TESTS.parent / "tools" / "bench"
TIMEOUT_S = 240
PARTS = {"regions", "reading in place", "keys", "release_after", "page-locking", "copies", "asynchrony"}
COLUMNS = ["what", "shmcache", "peer", "peer's", "ratio", "goal", "met"]


class Bench:
    """How the program is run where the double is in the place of a GPU."""

    def __init__(self, folder: Path) -> None:
        self.machine = folder / "machine"
        self.machine.mkdir()
        site = folder / "site"
        site.mkdir()
        start = f"from processes import _bench_gpu; _bench_gpu.install({str(self.machine)!r})\n"
        (site / "sitecustomize.py").write_text(start, encoding="utf-8")
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, TESTS)))}

    def start(self, *args: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(BENCH / "device.py"), "--quick", "--bytes", "16MiB", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )

    def check_clean(self, pid: int) -> None:
        assert not [name for name in shmcache.arenas() if name.startswith(f"bench-{pid}-")]
        assert cuda_double.allocations(self.machine) == []
        assert cuda_double.violations(self.machine) == []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def _real_gpu() -> Any:
    """device_gpu.py, which imports on any torch."""
    spec = importlib.util.spec_from_file_location("real_device_gpu", BENCH / "device_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "device.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    found = _run()
    assert found.returncode == 1
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("device.py: torch ")
    assert "no CUDA device" in line


@pytest.mark.parametrize(
    "wrong", [["--bytes", "1"], ["--bytes", "17MiB"], ["--only", "nothing"], ["--plot", "device.pdf"], ["more"]]
)
def test_usage(wrong: list[str]) -> None:
    found = _run(*wrong)
    assert found.returncode == 2
    assert "error: " in found.stderr
    assert found.stdout == ""


def test_the_stand_in_has_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, callable)
        return {name: list(inspect.signature(one).parameters) for name, one in found if not name.startswith("_")}

    assert methods(_bench_gpu.Gpu) == methods(_real_gpu().Gpu)


def test_all_parts(bench: Bench, tmp_path: Path) -> None:
    _packages.need("matplotlib")
    document, picture = tmp_path / "device.json", tmp_path / "device.svg"
    with bench.start("--json", str(document), "--plot", str(picture)) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    headers = [line.split("  ")[0] for line in lines if " a tenth below " in line]
    assert set(headers) == PARTS
    last = next(i for i, line in enumerate(lines) if line.split() == COLUMNS)
    assert "goals met" in lines[-1]
    assert len(lines) > last + 20
    found = json.loads(document.read_text(encoding="utf-8"))
    assert found["machine"]["device"] == "a double"
    goals = [line for line in found["findings"] if line["met"] is not None]
    assert len(goals) == 8
    for line in found["findings"]:
        assert line["ours"]
        assert line["kind"] == "share" or line["median"] >= 0
        assert bool(line["peer"]) == bool(line["theirs"])
    drawn = picture.read_text(encoding="utf-8")
    assert all(f"<!-- {line['what']} -->" in drawn for line in found["findings"])
    assert all(f"<!-- {part}: " in drawn for part in PARTS)
    bench.check_clean(process.pid)


def test_the_second_process_dies(bench: Bench) -> None:
    with bench.start("--only", "reading", SHMCACHE_TEST_DIES="1") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert err.splitlines() == ["device.py: the second process ended, exit code -9; see its message above"]
    bench.check_clean(process.pid)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(bench: Bench, signum: int) -> None:
    with bench.start() as process:
        assert process.stdout is not None
        assert any(line.startswith("regions ") for line in process.stdout)
        process.send_signal(signum)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert err.splitlines() == ["device.py: interrupted"]
    bench.check_clean(process.pid)
