"""The pictures of tools/bench/prefetch.py, observe.py and device.py, of numbers made by hand; and what --plot refuses.

Each text of an SVG is a comment in it, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import _packages

BENCH = Path(__file__).parents[2] / "tools" / "bench"

Bench = Callable[[str], ModuleType]


def _texts(path: Path) -> list[str]:
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", path.read_text(encoding="utf-8"))]


def _need(program: str) -> None:
    _packages.need("matplotlib")
    if program == "observe":
        _packages.need("prometheus_client")


# Numbers made by hand


def _throughput(bench: Bench, **more: Any) -> Any:
    numbers: dict[str, Any] = {
        "store": "file",
        "peer": "preadv",
        "object_bytes": 65536,
        "threads": 3,
        "bytes_per_s": 1e9,
        "peer_bytes_per_s": 2e9,
        "ratio": 0.49,
        "first_key_s": 0.02,
        "one_key_s": 0.0005,
        "goal": None,
    }
    return bench("prefetch").Throughput(**{**numbers, **more})


def _save_prefetch(bench: Bench, path: Path) -> None:
    lines = [
        _throughput(bench),
        _throughput(bench, object_bytes=1 << 20, ratio=0.75, goal=0.9),
        _throughput(bench, object_bytes=4 << 20, ratio=0.95, goal=0.9),
        _throughput(bench, store="valkey", peer="client's GET", bytes_per_s=3e9, ratio=1.5),
    ]
    bench("prefetch_plot").save_plot(path, "a machine", lines)


def _save_observe(bench: Bench, path: Path, *, looks: bool = True, phases: bool = True) -> None:
    look, phase = bench("observe_scrape").Look, bench("observe_hits").Phase
    seen = [look("inspect", 3e6, 2e6, 2.5e6, 7.0), look("reading 1.6 MB once", 4e5, 3e5, 3.5e5, 1.0)]
    rounds = [{"median": 1e5, "p99": 2e5}, {"median": 3e5, "p99": 4e5}]
    twice = [{what: 2 * ns for what, ns in found.items()} for found in rounds]
    heard = [phase("while nobody looks", rounds=rounds), phase("scraped all the time", 7, twice)]
    bench("observe_plot").save_plot(path, "a machine", 8192, seen if looks else [], heard if phases else [])


def _save_device(bench: Bench, path: Path) -> None:
    finding = bench("device_common").Finding
    copy, hidden = "copy host to device, 1 GiB", "of what could be hidden, hidden"
    parts = {
        "regions": [
            finding("add_region", "time", [0.001, 0.002, 0.003], "torch's export", [0.004, 0.004, 0.003]),
            finding("share back after the event, by the thread", "time", [0.0, 0.0]),
        ],
        "reading in place": [
            finding(
                "kernel reads 16,384 x 64 KiB in place",
                "rate",
                [3.1e12, 3.1e12],
                "the same of local memory",
                [3.1e12, 3.1e12],
                0.98,
            ),
        ],
        "copies": [
            finding(copy, "rate", [5e10, 5e10], "torch's pinned memory", [6e10, 6e10], least_ratio=0.98),
            finding(copy, "rate", [5e10, 5e10], "views not pinned", [1e10]),
        ],
        "asynchrony": [
            finding(hidden, "share", [0.9, 1.0], "torch's pinned memory", [1.0], least=0.8),
            finding(hidden, "share", [0.9, 1.0], "views not pinned", [-0.2]),
        ],
    }
    bench("device_plot").save_plot(path, "a device", parts)


SAVE: dict[str, Callable[[Bench, Path], None]] = {
    "prefetch": _save_prefetch,
    "observe": _save_observe,
    "device": _save_device,
}
SAID = {
    "prefetch": [
        "prefetch from L2; grey: what its peer does alone with as many threads (a machine)",
        "file: bytes a second, 3 threads",
        "1.00 GB/s: 49 % of preadv",
        "2.00 GB/s: preadv",
        "1.00 GB/s: 75 % of preadv; at least 90 %: missed",
        "1.00 GB/s: 95 % of preadv; at least 90 %: met",
        "3.00 GB/s: 150 % of client's GET",
        "valkey: from submit until it can be read",
        "500 us: one key alone",
        "20 ms: the first key of a chain",
        "64 KiB",
        "4 MiB",
    ],
    "observe": [
        "one look at 8,192 objects: CPU time",
        "2.5 ms, 7.0 x the bare reading",
        "350 us: no look can be faster",
        "the engine meanwhile: 256 keys read and released, 99th percentile",
        "while nobody looks",
        "200 us",
        "400 us, 2.00 x as while nobody looks",
        "600 us, 2.00 x as while nobody looks",
    ],
    "device": [
        "regions: times, less is better",
        "2 ms",
        "4 ms: torch's export; 2.000 x",
        "share back after the event, by the thread",
        "0 ns",
        "3,100.0 GB/s; at least 0.98 x: met",
        "3,100.0 GB/s: the same of local memory; 1.000 x",
        "copies: bytes a second",
        "50.0 GB/s; at least 0.98 x: missed",
        "60.0 GB/s: torch's pinned memory; 0.833 x",
        "10.0 GB/s: views not pinned; 5.000 x",
        "asynchrony: shares",
        "95 %; at least 80 %: met",
        "-20 %: views not pinned",
    ],
}


@pytest.mark.parametrize("program", SAVE)
def test_what_a_picture_says(program: str, bench: Bench, tmp_path: Path) -> None:
    _need(program)
    path = tmp_path / "plot.svg"
    SAVE[program](bench, path)
    texts = _texts(path)
    assert [said for said in SAID[program] if said not in texts] == []


@pytest.mark.parametrize("program", SAVE)
def test_a_picture_of_pixels(program: str, bench: Bench, tmp_path: Path) -> None:
    _need(program)
    path = tmp_path / "plot.png"
    SAVE[program](bench, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ours_with_two_peers_is_one_bar(bench: Bench, tmp_path: Path) -> None:
    _need("device")
    path = tmp_path / "plot.svg"
    _save_device(bench, path)
    assert _texts(path).count("copy host to device, 1 GiB") == 1
    assert _texts(path).count("50.0 GB/s; at least 0.98 x: missed") == 1


@pytest.mark.parametrize("only", ["looks", "phases"])
def test_one_part_of_the_report(only: str, bench: Bench, tmp_path: Path) -> None:
    _need("observe")
    path = tmp_path / "plot.svg"
    _save_observe(bench, path, **{"looks": False, "phases": False, only: True})
    texts = _texts(path)
    assert ("inspect" in texts) == (only == "looks")
    assert ("while nobody looks" in texts) == (only == "phases")


def test_nothing_measured_is_an_empty_picture(bench: Bench, tmp_path: Path) -> None:
    _need("prefetch")
    path = tmp_path / "plot.svg"
    bench("prefetch_plot").save_plot(path, "a machine", [])
    assert len(_texts(path)) == 1


def _figure(program: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    figures: list[Any] = []
    monkeypatch.setattr(bench("bench_bars"), "save", lambda figure, _path: figures.append(figure))
    SAVE[program](bench, Path("unused"))
    (figure,) = figures
    figure.draw_without_rendering()
    return figure


LENGTHS = {
    "prefetch": [
        [1e9, 2e9, 1e9, 2e9, 1e9, 2e9],
        [3e9, 2e9],
        [0.0005, 0.02] * 3,
        [0.0005, 0.02],
    ],
    "observe": [[2.5e6, 3.5e5], [2e5, 4e5], [3e5, 6e5]],
    "device": [  # by columns
        [0.002, 0.004, 0.0],
        [0.95, 1.0, -0.2],
        [3.1e12, 3.1e12],
        [5e10, 6e10, 1e10],
    ],
}


@pytest.mark.parametrize("program", SAVE)
def test_how_long_bars_are(program: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _need(program)
    figure = _figure(program, bench, monkeypatch)
    panels = [[bar.get_width() for bar in axes.patches] for axes in figure.axes if axes.get_visible()]
    assert panels == LENGTHS[program]


@pytest.mark.parametrize("program", SAVE)
def test_no_text_is_cut(program: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _need(program)
    from matplotlib.text import Annotation  # an extra

    figure = _figure(program, bench, monkeypatch)
    ends = [text.get_window_extent().x1 for text in figure.findobj(Annotation)]
    assert len(ends) >= 6
    assert max(ends) <= figure.bbox.width


# The option


@pytest.mark.parametrize("program", [*SAVE, "vllm"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.pdf", "expected a name that ends in .png or .svg, got 'plot.pdf'"),
        ("nowhere/plot.svg", "there is no folder 'nowhere'"),
    ],
)
def test_a_file_that_could_not_be_written(
    program: str, name: str, message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    _need(program)
    with pytest.raises(SystemExit, match="2"):
        bench(program).main(["--plot", name])
    out, err = capsys.readouterr()
    assert out == ""
    assert f"argument --plot: {message}" in err


@pytest.mark.parametrize("program", [*SAVE, "vllm"])
def test_without_matplotlib(
    program: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _need(program)
    module = bench(program)
    monkeypatch.setattr(
        bench("bench_plot"), "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(SystemExit, match="2"):
        module.main(["--plot", str(tmp_path / "plot.svg")])
    assert "a plot needs matplotlib: pip install 'shmcache[plot]'" in capsys.readouterr().err
