"""tools/bench/cost.py: that each part measures what it says, in small; what it measures is never judged."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from processes import _packages
from rich.console import Console

import shmcache

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TIMEOUT_S = 240
PARTS = ("reading", "writing", "readers", "objects", "eviction", "whole")
LITTLE = 1 << 20  # bytes

Bench = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No arena of the bench stays."""
    yield
    _check_clean(os.getpid())


def _check_clean(pid: int) -> None:
    assert not [name for name in shmcache.arenas() if name.startswith(f"bench-{pid}-")]


@pytest.fixture
def limits(bench: Bench) -> ModuleType:
    """The limits; skips where they cannot be compiled, but not in CI."""
    module = bench("cost_limits")
    loaded, reason = module.load()
    if loaded is None and not os.environ.get("CI"):
        pytest.skip(reason)
    assert loaded is not None, reason
    return module


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "cost.py"), *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    _check_clean(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _costs(report: Iterator[Any]) -> tuple[list[Any], list[str]]:
    """All costs of a part, and its remarks."""
    costs, remarks = [], []
    for measured in report:
        if isinstance(measured, str):
            remarks.append(measured)
        else:
            costs += measured
    assert all(cost.best > 0 for cost in costs if not cost.name.startswith("the difference"))
    assert len({cost.name for cost in costs}) == len(costs)
    return costs, remarks


# The program


@pytest.mark.parametrize(
    "wrong",
    [
        ["--only", "nothing"],
        ["--objects", "255"],
        ["--objects", "1048577"],
        ["--objects", "many"],
        ["--plot", "costs.txt"],
        ["--plot", "/nowhere/costs.svg"],
        ["more"],
    ],
)
def test_usage(wrong: list[str], bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench("cost").main(wrong)
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err


def test_help_has_an_example_of_each_part(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench("cost").main(["--help"])
    out = capsys.readouterr().out
    assert set(bench("cost").PARTS) == set(PARTS)
    for part in PARTS:
        assert f"cost.py --only {part} " in out


def test_reading_with_json_and_plot(tmp_path: Path, limits: ModuleType) -> None:
    _packages.need("lmdb")
    _packages.need("matplotlib")
    document, picture = tmp_path / "cost.json", tmp_path / "cost.svg"
    args = ("--quick", "--only", "reading", "--objects", "256", "--json", str(document), "--plot", str(picture))
    found = _run(*args)
    assert (found.returncode, found.stderr) == (0, "")
    costs = json.loads(document.read_text(encoding="utf-8"))["costs"]
    assert {cost["part"] for cost in costs} == {"reading"}
    assert len(costs) == 12
    goals = [goal for cost in costs for goal in cost["goals"]]
    assert len(goals) == 13
    assert all(isinstance(goal["met"], bool) for goal in goals)
    assert found.stdout.splitlines()[-1] == f"{sum(goal['met'] for goal in goals)} of 13 goals met"
    for cost in costs:
        assert set(cost["peers"]) == {"lmdb get", "lmdb getmulti"}
        assert cost["limits"]
    assert {limit for cost in costs for limit in cost["limits"]} == {
        limits.LOOKUP,
        limits.GRANT,
        limits.READ,
        limits.WORDS,
        limits.CALL,
        limits.TWO_CALLS,
    }
    drawn = picture.read_text(encoding="utf-8")
    assert "<svg" in drawn
    assert all(f"<!-- {text} -->" in drawn for text in ("peer: lmdb get", f"limit: {limits.LOOKUP}"))


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    document = tmp_path / "cost.json"
    found = _run("--quick", "--only", "reading", "--objects", "256", "--json", str(document), CC="false")
    assert (found.returncode, found.stderr) == (0, "")
    report = json.loads(document.read_text(encoding="utf-8"))
    assert [line for line in report["remarks"] if "limits.c cannot be compiled" in line]
    assert "limits.c cannot be compiled" in found.stdout
    assert not any(cost["limits"] for cost in report["costs"])


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "cannot be compiled"),
        ("no-such-compiler", "No such file"),
        (f"{sys.executable} -c raise(SystemExit('an.error:.of.its.own'))", "an.error:.of.its.own"),
        ("", "no C compiler on the PATH"),
    ],
)
def test_why_there_are_no_limits(compiler: str, reason: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", os.environ["PATH"] if compiler else "/nowhere")
    module, said = bench("cost_limits").load()
    assert module is None
    assert reason in said
    assert "no limits to compare with" in said
    assert "\n" not in said
    with bench("cost_limits").table(np.zeros((1, 32), np.uint8)) as table:
        assert table is None
    assert bench("cost_limits").copier([], b"x") is None


# The parts, in small


def test_writing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_writing")
    monkeypatch.setattr(part, "FOOTPRINT", 8 * LITTLE)
    monkeypatch.setattr(part, "PASS", 4 * LITTLE)
    costs, _ = _costs(part.costs(2))
    assert [cost.name for cost in costs] == [
        f"{what}, {size}" for size in part.SIZES for what in ("put", "delete + put")
    ]
    for cost in costs:
        assert set(cost.limits) == {"memcpy"}
        assert [cost.met(goal) is None for goal in cost.goals] == ([] if "4 KiB" in cost.name else [False])


def test_memcpy_is_of_all_bytes(limits: ModuleType) -> None:
    source = os.urandom(5000)
    targets = [np.zeros(5000, np.uint8) for _ in range(3)]
    copy = limits.copier(targets, source)
    copy(1)
    assert [bytes(target) == source for target in targets] == [False, True, False]


def test_readers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_readers")
    monkeypatch.setattr(part, "COUNTS", (1, 3))
    monkeypatch.setattr(part, "LASTING_NS", 5_000_000)
    costs, _ = _costs(part.costs(2))
    assert len(costs) == 6
    judged = [cost for cost in costs if cost.goals]
    assert [cost.name for cost in judged] == ["3 readers, one object", "3 readers, an object each"]
    for cost in judged:
        assert set(cost.limits) == {"1 reader", "an arena each"}
        assert cost.met(cost.goals[0]) is not None


def test_a_reader_that_dies(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = bench("cost_readers")
    program = tmp_path / "reader.py"
    program.write_text("print('ready', flush=True); input(); raise SystemExit(3)")
    monkeypatch.setattr(bench("cost_reader"), "__file__", str(program))
    with pytest.raises(RuntimeError, match="a reader ended with 3"):
        _costs(part.costs(2))


def test_objects(bench: Bench, limits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_objects")
    monkeypatch.setattr(part, "COUNTS", (500, 2000))
    monkeypatch.setattr(part, "CAPACITIES", (8 * LITTLE, 32 * LITTLE))
    monkeypatch.setattr(part, "FEW", 1000)
    costs, remarks = _costs(part.costs(2))
    assert remarks == []
    by_name = {cost.name: cost for cost in costs}
    assert set(by_name["lookup, 2,000 objects"].limits) == {"500 objects", limits.LOOKUP}
    assert set(by_name["read + release, hot set, 2,000 objects"].limits) == {"500 objects"}
    assert set(by_name[f"{part.WRITE}, 2,000 objects"].limits) == {"500 objects"}
    assert set(by_name[f"{limits.READ}, 2,000 objects"].limits) == {"500 objects"}
    assert [goal.beside for goal in by_name["lookup, 1,000 objects in 32 MiB"].goals] == ["8 MiB"]


def test_eviction(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_eviction")
    monkeypatch.setattr(part, "COUNTS", (1024, 4096))
    monkeypatch.setattr(part, "GOAL_COUNT", 4096)
    costs, remarks = _costs(part.costs(2))
    assert remarks == []
    assert len(costs) == 8
    judged = [cost for cost in costs if cost.goals]
    assert [cost.point.at for cost in judged] == [4096, 4096]
    by_name = {cost.name: cost for cost in costs}
    assert by_name["write, no room, 4,096 objects"].point.of == "objects"


@pytest.mark.usefixtures("limits")
def test_pages(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_pages")
    monkeypatch.setattr(part, "OBJECTS", 1024)
    first, again = part.touch_costs(3)
    for cost in (first, again):
        assert re.fullmatch(r"[0-9,]+ page faults?", cost.note)
    assert set(first.limits) == {"again"}
    ((cost,), *more) = part.populate_costs(8 * LITTLE, 2)
    assert more == []
    assert set(cost.limits) == {part.SMALL, part.HUGE}
    assert cost.met(cost.goals[0]) is not None


def test_the_whole_is_in_the_report(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench("cost_whole")
    monkeypatch.setattr(part.cost_pages, "OBJECTS", 1024)
    costs, _ = _costs(part.costs(1, LITTLE))
    judged = [cost.name for cost in costs if cost.goals]
    assert [name.split(",")[0] for name in judged] == [
        "attach to 4 GiB",
        "create with populate",
        "both: reap and rebuild",
    ]


@pytest.mark.parametrize("part", ["objects", "eviction"])
def test_without_room_it_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    module = bench(f"cost_{part}")
    monkeypatch.setattr(module, "lacks_room", lambda nbytes: f"it needs {nbytes} bytes")
    costs, remarks = _costs(module.costs(2))
    assert costs == []
    assert remarks
    assert all(line.startswith(f"{part}: n") and "it needs" in line for line in remarks)


def test_room(bench: Bench) -> None:
    lacks_room = bench("cost_common").lacks_room
    assert "of shared memory" in lacks_room(1 << 60)


# What is made of the numbers


def test_the_loops_of_the_limits(limits: ModuleType) -> None:
    keys = np.random.default_rng(5).integers(0, 256, (700, limits.WIDTH), np.uint8)
    order = np.random.default_rng(6).permutation(700)
    with limits.table(keys) as table:
        runs = {**table.by_keys(itertools.repeat(keys[order]), 700), **table.by_slots(order), **table.calls(3)}
        for _ in range(2):
            for run in runs.values():
                run.once()
        assert {len(run.wall) for run in runs.values()} == {2}
        strange = keys.copy()
        strange[650, 31] ^= 1  # in the last word of a key
        for name in (limits.LOOKUP, limits.GRANT, limits.READ):
            run = table.by_keys(itertools.repeat(strange), 700)[name]
            with pytest.raises(RuntimeError, match="a key is missing"):
                run.once()


def _cost(bench: Bench, **more: Any) -> Any:
    common = bench("cost_common")
    ours, theirs = common.Run(abs, []), common.Run(abs, [])
    ours.wall, ours.cpu, theirs.wall, theirs.cpu = [300.0, 100.0, 110.0], [100.0, 90.0, 100.0], [200.0] * 3, [250.0] * 3
    goals = [
        common.at_most(105),
        common.faster(2, "peer"),
        common.share(95, "limit"),
        common.no_more(1.1, "limit"),
        common.faster(2, "missing"),
    ]
    cost = common.cost_of("put, 4 KiB", "put", ours, goals=goals, **more)
    return common.compare(cost, ours, {"peer": theirs}, {"limit": ours})


def test_goals(bench: Bench) -> None:
    by_cpu, by_wall = _cost(bench), _cost(bench, by_cpu=False)
    assert [by_cpu.met(goal) for goal in by_cpu.goals] == [True, True, True, True, None]
    assert [by_wall.met(goal) for goal in by_wall.goals] == [False, False, True, True, None]
    assert by_cpu.peers["peer"].times == 2.5
    assert by_wall.peers["peer"].times == pytest.approx(200 / 110)
    assert (by_cpu.best, by_cpu.median, by_cpu.cpu) == (90.0, 110.0, 100.0)


def test_what_a_table_says(bench: Bench) -> None:
    cost = _cost(bench, note="noted")
    out = io.StringIO()
    Console(file=out, width=200).print(bench("cost_text").costs_table([cost, cost]))
    header, *rows = (" ".join(line.split()) for line in out.getvalue().splitlines())
    assert header == "cost of one put, 4 KiB wall CPU best ours goal"
    assert rows[:5] == [
        "put 110 ns 100 ns 90 ns met 105 ns noted",
        "- 2 x faster (missing)",
        "limit 100 ns 90 ns 1.00 x its time met 95 % of its speed",
        "met 1.1 x its time",
        "peer 250 ns 250 ns 2.50 x faster met 2 x faster",
    ]


def test_no_room_in_the_middle(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> Iterator[Any]:
        raise shmcache.ArenaSpaceError("arena 'x': no more")

    cost = bench("cost")
    monkeypatch.setitem(cost.PARTS, "objects", lambda *_: full())
    assert cost.main(["--only", "objects"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "objects: arena 'x': no more" in [line.rstrip() for line in out]
    assert out[-1] == "0 of 0 goals met"
