"""tools/bench/scale.py: its arithmetic beside real arenas, its queue beside theory, and what the command gives."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmcache

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TIMEOUT_S = 280
SEED = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(2**32)))


def _costs(bench: Callable[[str], Any], **more: Any) -> Any:
    """Costs in round numbers: a microsecond a key, nothing a lane."""
    costs = bench("scale_costs")
    zero = costs.Line(0.0)
    numbers: dict[str, Any] = dict.fromkeys(("reserve_key", "join_key", "lookup_key", "grant_share", "read_key"), 1e-6)
    numbers |= {"evict_key": zero, "scan_slot": costs.Line(10e-9), "rebuild_slot": 1e-7, "attach": 1e-3}
    numbers |= {"inspect_slot": costs.Line(1e-7), "verify_slot": costs.Line(1e-7), "populate_rate": 1e9, "wake": 0.0}
    return costs.UnitCosts(**(numbers | more))


# The layout


def test_the_formula_beside_real_arenas(bench: Callable[[str], Any]) -> None:
    bench("scale_layout").check()


def test_a_format_that_has_changed(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layout = bench("scale_layout")
    before = layout.metadata_bytes
    monkeypatch.setattr(layout, "metadata_bytes", lambda *numbers: before(*numbers) + 65536)
    with pytest.raises(RuntimeError, match="this program expected"):
        layout.check()
    assert [name for name in shmcache.arenas() if name.startswith(f"bench-{os.getpid()}-")] == []


def test_limits_of_the_configuration(bench: Callable[[str], Any]) -> None:
    layout = bench("scale_layout")
    for numbers in ({"slots": layout.MAX_SLOTS}, {"lanes": layout.MAX_LANES}):
        shmcache.ArenaConfig("8GiB", block_size=4096, **numbers)
        ((name, most),) = numbers.items()
        with pytest.raises(ValueError, match=name):
            shmcache.ArenaConfig("8GiB", block_size=4096, **{name: most + 1})


# The host


def test_blocks_waste_little(bench: Callable[[str], Any]) -> None:
    host = bench("scale_host")
    assert host.block_for(2 << 20) == 2 << 20
    assert host.block_for(5 << 20) == 1 << 20
    for nbytes in (70272 * 16, 196608, 4096 * 77 + 1):
        block = host.block_for(nbytes)
        assert -(-nbytes // block) * block <= 1.05 * nbytes
        assert -(-nbytes // (2 * block)) * 2 * block > 1.05 * nbytes


def test_needs(bench: Callable[[str], Any]) -> None:
    host, costs = bench("scale_host"), _costs(bench)
    model = host.Model("m", 65536, 1.0)
    place = host.Host(memory=1 << 40, share=0.5, gpus=4, hit_rate=0.75, tokens_a_second=16000.0, nodes=2)
    need = host.needs(host.Case(model, 2, 2), place, costs)
    assert (need.object_bytes, need.block_size, need.objects) == (1 << 20, 1 << 20, 1 << 19)
    assert (need.lanes, need.saved, need.reserved) == (6, 4000, 8000)
    assert (need.looked_up, need.read) == (16000, 12000)
    assert need.turnover == pytest.approx(2**19 / 4000)
    assert need.rebuild == pytest.approx(2**19 * 1e-7)
    assert need.populate == pytest.approx(2**39 / 64e9)
    assert need.remote_rate == pytest.approx(16000 * 2**20 / 4)
    assert need.reading_cores == pytest.approx(16000e-6 + 12000 * 2 * 2e-6)
    copied = host.needs(host.Case(host.Model("m", 65536, 1.0, replicated=True), 2, 2), place, costs)
    assert (copied.reserved, copied.read_bytes) == (4000, 2 * need.read_bytes)


def test_a_line_never_falls(bench: Callable[[str], Any]) -> None:
    fit = bench("scale_costs").fit
    line = fit([(1, 1.1), (16, 2.6), (256, 26.6)])
    assert (line.base, line.a_lane) == (pytest.approx(1.0), pytest.approx(0.1))
    falling = fit([(1, 2.0), (256, 1.0)])
    assert falling.a_lane == 0
    assert 1 <= falling.base <= 2


# The queue


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_waits_are_those_of_theory(bench: Callable[[str], Any], utilisation: float) -> None:
    """Poisson arrivals, holds of one length: the mean wait of M/D/1."""
    print("seed", SEED)
    serve, hold = bench("scale_lock").serve, 1e-3
    times = np.cumsum(np.random.default_rng(SEED).exponential(hold / utilisation, 300_000))
    rows = serve(((float(at), None) for at in times), lambda _start, _who: hold)
    expected = utilisation * hold / (2 * (1 - utilisation))
    assert rows[:, 0].mean() == pytest.approx(expected, rel=0.06)
    assert rows[:, 1].sum() / times[-1] == pytest.approx(utilisation, rel=0.02)


def test_who_slept_is_woken(bench: Callable[[str], Any]) -> None:
    rows = bench("scale_lock").serve(
        [(0.0, 1.0), (0.5, 0.2), (1.25, 0.1), (1.6, 0.1)], lambda _start, held: held, wake=0.1
    )
    expected = [[0.0, 1.0, 0.0], [0.6, 0.2, 0.1], [0.15, 0.1, 0.1], [0.0, 0.1, 0.0]]
    assert rows == pytest.approx(np.array(expected))


def _holds(bench: Callable[[str], Any], engines: int, tp: int, **rules: Any) -> Any:
    host, costs = bench("scale_host"), _costs(bench)
    case = host.Case(host.Model("m", 65536, 1.0), engines, tp)
    need = host.needs(case, host.Host(memory=1 << 40, share=0.5), costs)
    lock = bench("scale_lock")
    return lock.Holds(case, need, costs, lock.Rules(**rules))  # lists of 4,096 victims


def test_lists_of_victims(bench: Callable[[str], Any]) -> None:
    """Made when there is none, when it is old, and when all in it are gone, by whomever."""
    holds = _holds(bench, 2, 1)
    scans = []
    for at, process, keys in (
        (0.00, 0, 1000),
        (0.01, 0, 3000),
        (0.02, 0, 96),
        (0.03, 0, 1),
        (0.04, 1, 4000),
        (0.05, 0, 95),
        (0.06, 0, 1),
        (0.65, 0, 1),
        (0.66, 1, 1),
    ):
        before = holds.scans
        holds(at, (process, hash((at, process)), keys))
        scans.append(holds.scans - before)
    assert scans == [1, 0, 0, 1, 1, 0, 1, 1, 1]


def test_lists_that_are_kept(bench: Callable[[str], Any]) -> None:
    holds = _holds(bench, 1, 1, stale_s=float("inf"))
    for at in range(4096):
        holds(float(at), (0, at, 1))
    assert holds.scans == 1


@pytest.mark.parametrize(("one_list", "scans"), [(False, 4), (True, 1)])
def test_one_list_for_all(bench: Callable[[str], Any], one_list: bool, scans: int) -> None:
    holds = _holds(bench, 4, 1, stale_s=float("inf"), one_list=one_list)
    for number in range(4):
        holds(0.0, (number, number, 1000))
    assert holds.scans == scans


def test_the_first_rank_makes_room(bench: Callable[[str], Any]) -> None:
    holds, fixed = _holds(bench, 1, 2), bench("scale_lock").HOLD_S
    assert holds(0.0, (0, 7, 100)) == pytest.approx(fixed + 100e-6 + 2**19 * 10e-9)
    assert holds(0.1, (1, 7, 100)) == pytest.approx(fixed + 100e-6)
    assert holds.scans == 1


def test_steps_of_a_trace(bench: Callable[[str], Any], tmp_path: Path) -> None:
    """What is new in each request, cut into steps."""
    trace = tmp_path / "trace"
    trace.write_text('{"hash_ids": [1, 2, 3]}\n{"hash_ids": [1, 2, 3]}\n{"hash_ids": [1, 4]}\n', encoding="utf-8")
    lock, host = bench("scale_lock"), bench("scale_host")
    traffic = lock.traffic_of(trace, 1)
    assert traffic.tokens == [1536, 512]
    assert traffic.hit_rate == pytest.approx(4 / 8)
    assert lock.bursts(traffic, host.Host(step_tokens=1024)) == [64, 32, 32]


def test_a_heavier_load_waits_longer(bench: Callable[[str], Any]) -> None:
    host, limits, costs = bench("scale_host"), bench("scale_limits"), _costs(bench)
    case = host.Case(host.Model("m", 65536, 1.0), 2, 2)
    place = host.Host(memory=1 << 40, share=0.5, tokens_a_second=20000.0)
    found = limits.outlook(case, place, costs, [512], (0.5, 1, 1000), 1)
    light, now, heavy = found.waits
    assert light.utilisation < now.utilisation < 0.95 < heavy.utilisation
    assert light.p50 <= now.p50 < heavy.p50
    assert found.changed["scans outside the lock"].longest_hold < now.longest_hold
    assert 1 < bench("scale_lock").capacity_of(found.waits) < 1000
    headrooms = [limit.headroom for limit in found.limits]
    assert headrooms == sorted(headrooms)
    assert all(headroom > 0 for headroom in headrooms)
    (objects,) = [limit for limit in found.limits if limit.name == "objects"]
    assert objects.headroom == 2


# The command


def _run(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, str(BENCH / "scale.py"), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert [name for name in shmcache.arenas() if name.startswith(f"bench-{process.pid}-")] == []
    return process.returncode, out, err


def test_it_runs(tmp_path: Path) -> None:
    report, args = tmp_path / "scale.json", ["--quick", "--seed", "5", "--case", "llama-8b:4x2", "--case", "mine:8x1"]
    plot: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        plot = ["--plot", str(tmp_path / "scale.png")]
    code, out, err = _run(*args, "--model", "mine=4096,1.5", "--json", str(report), *plot)
    assert (code, err) == (0, "")
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["machine"]["seed"] == 5
    held = document["costs"]["held"]
    assert len(held) == 2 * 4 * 4 * 2
    assert all(0 < row["seconds"] < 1 for row in held)
    assert [case["label"] for case in document["cases"]] == ["llama-8b, 4 x TP 2", "mine, 8 x TP 1"]
    for case in document["cases"]:
        assert case["need"]["slots"] <= 1 << 20
        assert [wait["load"] for wait in case["waits"]] == sorted(wait["load"] for wait in case["waits"])
        nearest = case["limits"][0]
        assert f"{nearest['name']} (at " in out
    objects = next(row for row in document["cases"][1]["limits"] if row["name"] == "objects")
    assert objects["headroom"] < 0.1
    assert "mine, 8 x TP 1: broken as described: " in out
    assert not plot or Path(plot[1]).stat().st_size > 20000


@pytest.mark.parametrize(
    "wrong",
    [
        ["--memory", "much"],
        ["--case", "llama-8b:9x1"],
        ["--case", "llama-9b:1x1"],
        ["--case", "llama-8b:0x1"],
        ["--model", "mine=0,1"],
        ["--hit-rate", "1"],
        ["--gpus", "0"],
        ["--token-block", "9000"],
        ["--plot", "scale.txt"],
        ["more"],
    ],
)
def test_usage(wrong: list[str]) -> None:
    code, out, err = _run(*wrong)
    assert (code, out) == (2, "")
    assert "error: " in err


def test_no_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("[]\n", encoding="utf-8")
    for path in (trace, tmp_path / "none"):
        code, out, err = _run("--quick", "--trace", str(path))
        assert (code, out) == (1, "")
        assert err.startswith("scale.py: ")
