"""The map of an arena: against a slow model, in a terminal, and as a picture."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from seen_support import region

from shmcache.stats import ArenaInfo, Counters, ObjectInfo, Stats
from shmcache_tools.look import Seen
from shmcache_tools.stat.block_map import BlockMap, block_map, charts_of, fragmentation, grid_for, object_sizes
from shmcache_tools.stat.map_plot import PlotError, _grid, _image, blocks_by_age, free_by_size, save_maps
from shmcache_tools.stat.map_view import address_texts, block_maps
from shmcache_tools.stat.standings import STANDINGS
from shmcache_tools.text import make_console

_KIB = 1024
_NOW = 1_700_000_000.0
_NAMES = [standing.name for standing in STANDINGS]
_KEPT = [name for name in _NAMES if name != "free"]


def _object(block: int, blocks: int, standing: str, *, nbytes: int | None = None, age: float = 30) -> ObjectInfo:
    size = 4 * _KIB * blocks if nbytes is None else nbytes
    return ObjectInfo(b"key", size, block, blocks, standing, _NOW - age, owner=0, reserved=0, held=0)


def _arena(
    objects: Sequence[ObjectInfo] = (), *, blocks: int = 256, block_size: int = 4 * _KIB, name: str = "kv"
) -> ArenaInfo:
    stats = Stats(
        capacity=blocks * block_size,
        block_size=block_size,
        used_bytes=0,
        resident_bytes=0,
        slots=blocks,
        objects=len(objects),
        writing=0,
        reserved=0,
        held=0,
        lanes_alive=0,
        lanes_dead=0,
        counters=Counters(),
    )
    return ArenaInfo(name, path="", segment_bytes=0, stats=stats, objects=tuple(objects))


_SIX = (
    _object(0, 16, "ready", nbytes=60 * _KIB),
    _object(24, 16, "reserved"),
    _object(40, 16, "writing"),
    _object(56, 16, "held"),
    _object(72, 16, "dead"),
)
_BAD = ArenaInfo("bad", path="", segment_bytes=0, problem="no arena: wrong magic \x1b[2J")


def _seen(*infos: ArenaInfo) -> Seen:
    return Seen(infos, now=_NOW)


def _with_regions(*objects: ObjectInfo, **fields: Any) -> ArenaInfo:
    """An arena of 256 blocks and two GPUs: one with 64 blocks, one that is lost, with 16 larger ones."""
    small = region(1, capacity=64 * 4 * _KIB, block_size=4 * _KIB)
    lost = region(3, device=1, capacity=16 * 16 * _KIB, block_size=16 * _KIB, state="lost")
    return replace(_arena(objects), **{"regions": (small, lost), "region_limit": 8, **fields})


_EVERYWHERE = (
    _object(0, 16, "ready"),
    *(replace(_object(4, 4, standing), region=n) for n, standing in ((1, "held"), (3, "dead"), (7, "writing"))),
    replace(_object(63, 5, "reserved"), region=1),  # more than the region has is cut off
)


# against a slow model

_inside = st.builds(_object, st.integers(0, 70), st.integers(0, 20), st.sampled_from(_KEPT))
_anywhere = st.builds(_object, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from(_KEPT))
_objects = st.lists(_inside | _anywhere, max_size=12)
_blocks = st.integers(1, 80)


def _painted(objects: Sequence[ObjectInfo], blocks: int) -> list[str]:
    """The standing of each block, the slow way."""
    painted = ["free"] * blocks
    for o in sorted(objects, key=lambda o: o.block):
        for block in range(o.block, min(o.block + o.blocks, blocks)):
            painted[block] = o.standing if painted[block] == "free" else painted[block]
    return painted


def _runs(painted: Sequence[str], *standings: str) -> list[int]:
    groups = itertools.groupby(painted, lambda standing: standing in standings)
    return [len(list(group)) for wanted, group in groups if wanted]


def _shown(part: Sequence[str]) -> str:
    """What a cell of these blocks should show."""
    if "dead" in part:
        return "dead"
    counts = Counter(part)
    return max(counts, key=lambda standing: (counts[standing], _NAMES.index(standing)))


def _map(objects: Sequence[ObjectInfo], blocks: int, block_size: int = 4 * _KIB) -> BlockMap:
    return block_map(objects, blocks * block_size, block_size)


@given(_objects, _blocks)
def test_runs_cover_the_arena_without_overlap(objects: list[ObjectInfo], blocks: int) -> None:
    arena, painted = _map(objects, blocks), _painted(objects, blocks)
    assert arena.blocks == blocks
    assert (np.diff(arena.edges) > 0).all()
    assert [_NAMES[code] for code in arena.codes.repeat(np.diff(arena.edges))] == painted
    assert [n for _, n in arena.totals()] == [painted.count(name) for name in _NAMES]
    assert arena.totals()[0][0] == len(_runs(painted, "free"))


@given(_objects, _blocks, st.integers(1, 90))
def test_a_cell_shows_what_most_of_its_blocks_are(objects: list[ObjectInfo], blocks: int, per_cell: int) -> None:
    painted = _painted(objects, blocks)
    expected = [_shown(painted[first : first + per_cell]) for first in range(0, blocks, per_cell)]
    assert [_NAMES[code] for code in _map(objects, blocks).cells(per_cell)] == expected


@given(_objects, _blocks, st.sets(st.sampled_from(_NAMES)))
def test_runs_of_some_standings(objects: list[ObjectInfo], blocks: int, standings: set[str]) -> None:
    assert _map(objects, blocks).runs(*standings).tolist() == _runs(_painted(objects, blocks), *standings)


@given(_objects, _blocks)
def test_fragmentation(objects: list[ObjectInfo], blocks: int) -> None:
    painted, torn = _painted(objects, blocks), fragmentation(_map(objects, blocks))
    free = _runs(painted, "free")
    assert (torn.free, torn.runs) == (4 * _KIB * sum(free), len(free))
    assert torn.largest == 4 * _KIB * max(free, default=0)
    assert torn.obtainable == 4 * _KIB * max(_runs(painted, "free", "ready", "dead"), default=0)
    assert torn.fraction == (1 - max(free) / sum(free) if free else None)


def test_what_2_to_the_31_blocks_cost_goes_with_the_objects() -> None:
    arena = _map([_object(2**30, 3, "held"), _object(2**31 - 1, 5, "dead")], 2**31)
    assert len(arena.codes) == 4
    assert arena.totals()[_NAMES.index("dead")] == (1, 1)
    cells = arena.cells(2**21)
    assert len(cells) == 1024
    assert np.flatnonzero(cells).tolist() == [1023]  # three blocks of two million are not most


@given(st.integers(1, 2**31), st.integers(-5, 300), st.integers(-5, 100))
def test_the_grid_fits_and_is_fine(blocks: int, columns: int, rows: int) -> None:
    grid = grid_for(blocks, columns, rows)
    wide, high = max(1, columns), max(1, rows)
    assert 2 * wide / 3 <= grid.columns <= wide or grid.columns == wide == 1
    assert grid.rows(blocks) <= high
    if grid.blocks_per_cell > 1:  # cells half as large would not fit
        assert -(-2 * blocks // grid.blocks_per_cell) > grid.columns * high


@given(st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 30)), min_size=1))
def test_object_sizes(shapes: list[tuple[int, int]]) -> None:
    sizes = object_sizes([_object(0, blocks, "ready", nbytes=nbytes) for nbytes, blocks in shapes], 4 * _KIB)
    expected = [min(nbytes, blocks * 4 * _KIB) for nbytes, blocks in shapes]  # more than its blocks is a lie
    assert sizes is not None
    assert (sizes.objects, sizes.smallest, sizes.largest) == (len(shapes), min(expected), max(expected))
    assert sizes.median == statistics.median_low(expected)
    assert sizes.padding == pytest.approx(1 - sum(expected) / (4 * _KIB * sum(blocks for _, blocks in shapes)))


def test_sizes_of_no_objects() -> None:
    assert object_sizes([], 4096) is None


def test_addresses_are_exact() -> None:
    assert address_texts(3 * 2**29, 3) == ["0 MiB", "1,536 MiB", "3,072 MiB"]
    assert address_texts(1000, 2) == ["0 B", "1,000 B"]
    assert address_texts(2**60, 2) == ["0 TiB", "1,048,576 TiB"]


def test_free_memory_by_the_size_of_its_runs() -> None:
    arena = _map([_object(first, 1, "held") for first in (1, 4, 8)], 16)  # free: 1, 2, 3 and 7 blocks
    assert free_by_size(arena).tolist() == pytest.approx([1 / 13, 5 / 13, 7 / 13, 0, 0])
    assert free_by_size(_map([_object(0, 16, "held")], 16)).tolist() == [0] * 5


def test_blocks_by_age() -> None:
    ages = (-5, 0.5, 59, 60, 90_000)  # a clock that was set back makes nothing older
    blocks = blocks_by_age([_object(0, 2, "held", age=age) for age in ages], _NOW)
    assert blocks[_NAMES.index("held")].tolist() == [4, 0, 2, 2, 0, 0, 2]
    assert blocks.sum() == 10


def test_objects_lie_in_their_region_only() -> None:
    host, small, lost = charts_of(_with_regions(*_EVERYWHERE))
    assert [n for _, n in host.blocks.totals()] == [240, 16, 0, 0, 0, 0]
    assert [n for _, n in small.blocks.totals()] == [59, 0, 1, 0, 4, 0]
    assert [n for _, n in lost.blocks.totals()] == [12, 0, 0, 0, 0, 4]
    assert [chart.lost for chart in (host, small, lost)] == [False, False, True]
    assert [chart.region and chart.region.number for chart in (host, small, lost)] == [None, 1, 3]
    assert fragmentation(lost.blocks).largest == 8 * 16 * _KIB


def test_a_region_that_says_it_has_no_blocks_has_no_map() -> None:
    info = _with_regions(regions=(region(1, capacity=0, block_size=4 * _KIB), region(2)))
    assert [chart.region and chart.region.number for chart in charts_of(info)] == [None, 2]
    assert charts_of(_BAD) == charts_of(replace(info, objects=None)) == []


def test_the_largest_region_there_can_be_has_a_map() -> None:
    (*_, chart) = charts_of(_with_regions(regions=(region(1, capacity=2**81, block_size=2**50),)))
    torn = fragmentation(chart.blocks)
    assert (torn.free, torn.largest, torn.obtainable) == (2**81, 2**81, 2**81)


# in a terminal

_GOLDEN_REGIONS = """\
kv host memory  1 MiB in 256 blocks of 4 KiB
  0 KiB ----------------................................................
256 KiB ................................................................
512 KiB ................................................................
768 KiB ................................................................

kv region 1, cuda:0 GPU-00000001  256 KiB in 64 blocks of 4 KiB
0 KiB ....HHHH.......................................................r

kv region 3, cuda:1 GPU-00000003  LOST  256 KiB in 16 blocks of 16 KiB
0 MiB ....XXXX........"""

_GOLDEN = """\
kv  1 MiB in 256 blocks of 4 KiB
  0 KiB ----------------........rrrrrrrrrrrrrrrrwwwwwwwwwwwwwwwwHHHHHHHH
256 KiB HHHHHHHHXXXXXXXXXXXXXXXX........................................
512 KiB ................................................................
768 KiB ................................................................
a cell is a block, 4 KiB

            objects    bytes  of all
. free            -  704 KiB  68.8 %
- ready           1   64 KiB   6.2 %
r reserved        1   64 KiB   6.2 %
w writing         1   64 KiB   6.2 %
H held            1   64 KiB   6.2 %
X dead            1   64 KiB   6.2 %

fragmentation   4.5 %: 2 free runs, the largest 672 KiB
one write       at most 736 KiB: free, ready and dead blocks in a row
object sizes    60 KiB to 64 KiB, half up to 64 KiB; 1.2 % padding"""

_TERMINALS = [(80, 24), (160, 50), (40, 30), (80, 12), (300, 24)]


def _plain(seen: Seen) -> str:
    out = io.StringIO()
    make_console(out).print(block_maps(seen))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _without_meanings(text: str) -> str:
    """A golden text is of the map, not of what the legend says to each standing."""
    return re.sub(r" %  \w.*", " %", text)


def _terminal(width: int, height: int, system: Any = "256", **options: Any) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system=system,
        markup=False,
        **options,
    )


def _lines(console: Console, seen: Seen) -> list[list[Segment]]:
    return console.render_lines(block_maps(seen), pad=False)


def _many_objects(blocks: int) -> list[ObjectInfo]:
    """Objects of all standings, with gaps of many sizes between."""
    firsts = [n * n + 3 * n for n in range(blocks) if n * n + 5 * n < blocks]
    return [_object(first, 1 + n, _KEPT[n % len(_KEPT)]) for n, first in enumerate(firsts)]


def test_golden_text() -> None:
    assert _without_meanings(_plain(_seen(_arena(_SIX)))) == _GOLDEN


def test_what_a_cell_of_many_blocks_is_is_told() -> None:
    text = _plain(_seen(_arena(_many_objects(65536), blocks=65536)))
    assert "a cell is 48 blocks, 192 KiB: what most of them are; dead if any is" in text
    assert [line[:8] for line in text.splitlines()[1:4]] == ["  0 MiB ", " 12 MiB ", " 24 MiB "]
    assert max(map(len, text.splitlines())) <= 80


def test_an_arena_without_objects_and_a_full_one() -> None:
    empty = _plain(_seen(_arena()))
    assert "fragmentation   0.0 %: 1 free run, the largest 1 MiB" in empty
    assert "object sizes    no objects" in empty
    full = _plain(_seen(_arena([_object(0, 256, "held")])))
    assert "fragmentation   nothing is free" in full
    assert "one write       at most 0 B" in full
    assert "object sizes    1 MiB; 0.0 % padding" in full


def test_golden_text_of_regions() -> None:
    text = _plain(_seen(_with_regions(*_EVERYWHERE)))
    maps = [part for part in text.split("\n\n") if part.startswith("kv ")]
    assert "\n\n".join(part[: part.index("\na cell")] for part in maps) == _GOLDEN_REGIONS
    assert "fragmentation   6.8 %: 2 free runs, the largest 220 KiB" in text
    assert "fragmentation   33.3 %: 2 free runs, the largest 128 KiB" in text
    assert text.count("one write       nothing: the region is lost") == 1
    assert text.count("one write       at most ") == 2


@pytest.mark.parametrize(("height", "lines"), [(24, 27), (40, 39), (100, 60)])
def test_maps_of_regions_share_the_screen(height: int, lines: int) -> None:
    info = _with_regions(*_EVERYWHERE)
    many = [replace(found, capacity=2**30) for found in info.regions]
    drawn = _lines(_terminal(80, height), _seen(replace(info, regions=tuple(many))))
    assert len(drawn) <= max(lines, height - 1)
    text = ["".join(segment.text for segment in line) for line in drawn]
    assert [line.split("  ")[0] for line in text if line.startswith("kv ")] == [
        "kv host memory",
        "kv region 1, cuda:0 GPU-00000001",
        "kv region 3, cuda:1 GPU-00000003",
    ]


def test_what_cannot_be_read_is_told() -> None:
    assert _plain(_seen(_BAD)) == "bad cannot be read: no arena: wrong magic ?[2J"
    unlisted = replace(_arena(name="other"), objects=None)
    text = _plain(_seen(_BAD, _arena(), unlisted))
    assert text.startswith("bad cannot be read: ")
    assert "\n\nkv  1 MiB in 256 blocks of 4 KiB\n" in text
    assert text.endswith("other: its objects were not looked at")
    assert _plain(_seen()) == "no arenas of this user"


@pytest.mark.parametrize("size", _TERMINALS)
@pytest.mark.parametrize("blocks", [1, 7, 256, 5000, 65536, 2**31])
@pytest.mark.parametrize("system", ["256", None])
def test_a_map_fits_the_terminal(size: tuple[int, int], blocks: int, system: str | None) -> None:
    width, height = size
    console = _terminal(width, height, system)
    lines = _lines(console, _seen(_arena(_many_objects(min(blocks, 9999)), blocks=blocks)))
    assert len(lines) < height  # the prompt comes below
    assert max(Segment.get_line_length(line) for line in lines) <= width
    assert "fragmentation" in "".join(segment.text for line in lines[-9:] for segment in line)


def _cells_of(lines: Sequence[list[Segment]], *, halves: bool) -> list[str]:
    """The standings that the colours of a map's characters show, row by row."""
    by_colour = {Style.parse(standing.style).color: standing.name for standing in STANDINGS}
    cells: list[str] = []
    for line in itertools.takewhile(lambda line: "a cell is" not in line[0].text, lines[1:]):
        upper, lower = [], []
        for segment in line[1:]:  # after the address
            assert segment.style is not None
            assert set(segment.text) <= {"█", "▀"} if halves else {"█"}
            below = segment.style.bgcolor if "▀" in segment.text else segment.style.color
            upper += [by_colour[segment.style.color]] * len(segment.text)
            lower += [by_colour[below]] * len(segment.text) if halves and below else []
        cells += upper + lower
    return cells


@pytest.mark.parametrize(("blocks", "wide"), [(5, 2), (256, 2), (700, 1), (1111, 1)])
def test_colours_show_every_block(blocks: int, wide: int) -> None:
    objects = _many_objects(blocks)
    cells = _cells_of(_lines(_terminal(80, 24), _seen(_arena(objects, blocks=blocks))), halves=wide == 1)
    assert cells[::wide] == cells[wide - 1 :: wide] == _painted(objects, blocks)


@pytest.mark.parametrize(
    "console", [_terminal(80, 24, None), _terminal(80, 24, "standard"), _terminal(80, 24, no_color=True)]
)
def test_letters_where_colours_do_not_tell(console: Console) -> None:
    console.print(block_maps(_seen(_arena(_SIX))))
    file = console.file
    assert isinstance(file, io.StringIO)
    assert not set(file.getvalue()) & set("█▀")
    assert "HHHHHHHH" in file.getvalue()


def test_letters_where_the_terminal_knows_ascii_only() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), force_terminal=True, color_system="256", width=70)
    console.print(block_maps(_seen(_arena(_SIX, name="n" * 64))))


# as a picture


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_picture_as_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, reader = tmp_path / "m.svg", tmp_path / "opened"
    path.write_text("the one before", encoding="utf-8")
    reader.hardlink_to(path)
    save_maps(_seen(_arena(_SIX, name="kv-7")), path)
    assert reader.read_text(encoding="utf-8") == "the one before"  # replaced, not overwritten
    assert capsys.readouterr().out == f"wrote {path}\n"
    root = ET.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314 # we wrote it
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.findtext(".//{http://purl.org/dc/elements/1.1/}title") == "shmcache kv-7"
    assert _files(tmp_path) == ["m.svg", "opened"]


def test_the_picture_as_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one.PNG", tmp_path / "two.png"]
    save_maps(_seen(_arena(_SIX)), paths[0])
    save_maps(_seen(_arena(_SIX), _BAD, _arena(name="empty")), paths[1])
    heads = [path.read_bytes()[:24] for path in paths]
    assert all(head.startswith(b"\x89PNG\r\n\x1a\n") for head in heads)
    sizes = [(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) for head in heads]
    assert sizes == [(1950, 1050), (1950, 2100)]
    assert "left out: bad cannot be read: " in capsys.readouterr().out


def test_the_picture_of_regions(tmp_path: Path) -> None:
    path = tmp_path / "m.svg"
    save_maps(_seen(_with_regions(*_EVERYWHERE)), path)
    words = re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))
    titles = [re.sub(r", \d{4}-.*", "", line) for line in words if line.startswith("arena kv ")]
    assert titles == [
        "arena kv host memory: 1 MiB in 256 blocks of 4 KiB",
        "arena kv region 1, cuda:0 GPU-00000001: 256 KiB in 64 blocks of 4 KiB",
        "arena kv region 3, cuda:1 GPU-00000003: LOST, 256 KiB in 16 blocks of 16 KiB",
    ]


def test_the_pixels_are_the_cells() -> None:
    objects = _many_objects(500)
    arena = _map(objects, 500)
    grid = _grid(500)
    pixels = _image(arena, grid)
    rows = grid.rows(500)
    cells = pixels[:: pixels.shape[0] // rows, :: pixels.shape[1] // grid.columns].reshape(-1, 3)
    colours = {standing.name: standing.colour for standing in STANDINGS}
    assert [f"#{bytes(cell).hex()}" for cell in cells[:500]] == [colours[name] for name in _painted(objects, 500)]
    assert (cells[500:] == 255).all()
    assert len(cells) > 500
    assert pixels.shape[0] >= 800
    assert pixels.shape[1] >= 1600


@pytest.mark.parametrize("blocks", [1, 2, 3, 65536, 65537, 2**31])
def test_the_grid_of_a_picture(blocks: int) -> None:
    grid = _grid(blocks)
    assert grid.columns & (grid.columns - 1) == 0
    assert grid.columns <= 512
    assert grid.rows(blocks) <= 256
    assert (grid.blocks_per_cell == 1) is (blocks <= 65537)


@pytest.mark.parametrize(
    ("infos", "ending", "told"),
    [
        ([_arena()], "m.pdf", "expected a name that ends in .svg or .png"),
        ([_arena()], "m", "expected a name that ends in .svg or .png"),
        ([_arena()], "nowhere/m.svg", "cannot be written: No such file or directory"),
        ([_arena()], "file/m.svg", "cannot be written: Not a directory"),
        ([_arena()], "folder.svg", "cannot be written: Is a directory"),
        ([_arena()], f"{'m' * 300}.svg", "cannot be written: File name too long"),
        ([_BAD], "m.svg", "bad cannot be read: no arena: wrong magic ?[2J"),
        ([], "m.svg", "no arenas of this user"),
        ([_with_regions(regions=tuple(map(region, range(1, 33))))], "m.svg", "33 maps are too many for a picture"),
        ([_arena()] * 9, "m.svg", "9 arenas are too many for a picture, 8 at most: name one"),
    ],
)
def test_no_picture(tmp_path: Path, infos: list[ArenaInfo], ending: str, told: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(PlotError, match=told.replace("?[", r"\?\[")):
        save_maps(_seen(*infos), tmp_path / ending)
    assert _files(tmp_path) == ["file", "folder.svg"]


def test_a_picture_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fill_the_disk(_figure: Figure, file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "m.svg"
    path.write_text("the one before", encoding="utf-8")
    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(PlotError, match="No space left on device"):
        save_maps(_seen(_arena()), path)
    assert _files(tmp_path) == ["m.svg"]
    assert path.read_text(encoding="utf-8") == "the one before"


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'shmcache\[plot\]'"):
        save_maps(_seen(_arena()), tmp_path / "m.svg")


def test_only_a_picture_needs_matplotlib() -> None:
    import subprocess

    code = "import sys, shmcache_tools.stat; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_settings_of_other_pictures_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "text.usetex", True)  # would need TeX
    save_maps(_seen(_arena()), tmp_path / "m.svg")
    assert mpl.rcParams["text.usetex"] is True
