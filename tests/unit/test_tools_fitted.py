"""Tables that fit any width, the bar of an arena's occupancy, the colours of standings, numbers in few cells."""

from __future__ import annotations

import typing
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.color import Color
from seen_support import busy, draw, stale

from shmcache.stats import ObjectInfo
from shmcache_tools.stat.fitted_table import Cell, Column, FittedTable
from shmcache_tools.stat.occupancy import OccupancyBar, bytes_by_standing, share_out
from shmcache_tools.stat.standings import STANDING, STANDINGS, Standing
from shmcache_tools.text import short_age_text, short_count_text, short_percent_text, short_size_text

_COLUMNS = (
    Column("name", least=6, middle=True),
    Column("quantity", "n", right=True),
    Column("first to go", "first", goes=2),
    Column("next to go", "next", goes=1),
    Column("comment", least=5),
)


def _table(*quantities: int) -> FittedTable:
    table = FittedTable(_COLUMNS)
    for quantity in quantities:
        cells = f"name-of-{quantity}-name", Cell(f"{quantity} things", str(quantity)), "first", "next", "no comment"
        table.add_row(cells)
    return table


def test_all_is_there_where_there_is_room() -> None:
    assert draw(_table(1, 20)).splitlines() == [
        "name              quantity  first to go  next to go  comment",
        "name-of-1-name    1 things  first        next        no comment",
        "name-of-20-name  20 things  first        next        no comment",
    ]


def test_all_is_there_where_there_is_just_enough_room() -> None:
    widest = max(map(len, draw(_table(1, 20)).splitlines()))
    assert draw(_table(1, 20), widest) == draw(_table(1, 20))
    assert "quantity" not in draw(_table(1, 20), widest - 1)


def test_numbers_and_names_get_shorter_first() -> None:
    assert draw(_table(1, 20), 48).splitlines() == [
        "name              n  first  next  comment",
        "name-of-1-name    1  first  next  no comment",
        "name-of-20-name  20  first  next  no comment",
    ]


def test_then_texts_are_cropped() -> None:
    assert draw(_table(1, 20), 33).splitlines() == [
        "name       n first next comment",
        "name…name  1 first next no comme…",
        "name…name 20 first next no comme…",
    ]


def test_then_columns_go_and_it_is_told() -> None:
    assert draw(_table(1, 20), 24).splitlines() == [
        "name     n next comment",
        "nam…ame  1 next no comm…",
        "nam…ame 20 next no comm…",
        "not shown at this width:",
        "first to go",
    ]
    assert draw(_table(1, 20), 18).splitlines()[0].split() == ["name", "n", "comment"]


@given(st.lists(st.integers(0, 10**12), max_size=5), st.integers(16, 200))
def test_no_line_is_wider_than_the_terminal(quantities: list[int], width: int) -> None:
    lines = draw(_table(*quantities), max(width, 16 + max(map(len, map(str, quantities)), default=0))).splitlines()
    assert max(map(len, lines)) <= max(width, 16 + max(map(len, map(str, quantities)), default=0))


def test_texts_of_wide_characters_fit() -> None:
    table = FittedTable([Column("comment", least=5), Column("end")])
    table.add_row(("漢字" * 20, "x"))
    assert draw(table, 20).splitlines()[1].endswith(" x")


def test_a_row_has_one_cell_a_column() -> None:
    with pytest.raises(ValueError, match="expected 5 cells, got 1"):
        _table().add_row(["alone"])


# The bar


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=6), st.integers(0, 300))
def test_all_cells_are_given_out(amounts: list[int], cells: int) -> None:
    by_name = {str(place): amount for place, amount in enumerate(amounts)}
    shares = share_out(cells, by_name)
    assert list(shares) == list(by_name)
    assert sum(shares.values()) == (cells if any(amounts) else 0)
    there = [name for name, amount in by_name.items() if amount]
    assert all(shares[name] == 0 for name in by_name if name not in there)
    if cells >= len(there):
        assert all(shares[name] >= 1 for name in there)
    for a, b in combinations(there, 2):
        assert by_name[a] != by_name[b] or abs(shares[a] - shares[b]) <= 1
        assert by_name[a] <= by_name[b] or shares[a] >= shares[b]


def test_half_is_half() -> None:
    assert share_out(80, {"free": 50, "held": 50}) == {"free": 40, "held": 40}
    assert share_out(80, {"free": 2**44, "dead": 1}) == {"free": 79, "dead": 1}


def test_a_bar_without_colours_has_letters() -> None:
    stats = busy().stats
    assert stats is not None
    bar, legend, *_ = draw(OccupancyBar(stats), 50).splitlines()
    assert bar == "X" + "HHHH" + "w" + "rrr" + "-" * 18 + "." * 23
    assert legend == "X dead 4 MiB 0.8 %   H held 33 MiB 6.4 %"
    assert sum(bytes_by_standing(stats).values()) == stats.capacity
    coloured = draw(OccupancyBar(stats), 50, colour=True)
    assert "█" in coloured
    assert "HHHH" not in coloured


def test_an_empty_bar() -> None:
    stats = stale("empty").stats
    assert stats is not None
    assert draw(OccupancyBar(stats), 20) == f"{'.' * 20}\n. free 512 MiB 100.0\n%\n"


# The colours


def test_every_standing_has_a_colour_and_a_letter() -> None:
    assert list(STANDING) == ["free", "ready", "reserved", "writing", "held", "dead"]
    assert all(f'"{name}"' in typing.cast("str", ObjectInfo.__doc__) for name in STANDING if name != "free")
    assert len({standing.glyph for standing in STANDINGS}) == len(STANDINGS)
    for standing in STANDINGS:
        assert standing.name == "free" or _on_a_terminal(standing) == standing.colour


def _on_a_terminal(standing: Standing) -> str:
    return Color.parse(standing.style).get_truecolor().hex


#: What people see who lack one kind of cone, and who lack none (Machado, Oliveira, Fernandes 2009).
_EYES = {
    "any": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def _linear(colour: str) -> list[float]:
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def _lab(colour: str, eye: str) -> tuple[float, float, float]:
    """CIE L*a*b*, in which distance is how different two colours look."""
    seen = [sum(a * v for a, v in zip(weights, _linear(colour), strict=True)) for weights in _EYES[eye]]
    r, g, b = (min(1.0, max(0.0, v)) for v in seen)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eye", _EYES)
def test_everybody_can_tell_the_colours_apart(eye: str) -> None:
    for a, b in combinations(STANDINGS, 2):
        first, second = _lab(_on_a_terminal(a), eye), _lab(_on_a_terminal(b), eye)
        assert sum((x - y) ** 2 for x, y in zip(first, second, strict=True)) ** 0.5 > 20, (a.name, b.name)


def test_the_colours_stand_out_from_black_and_from_white() -> None:
    for standing in STANDINGS:
        r, g, b = _linear(_on_a_terminal(standing))
        luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
        assert min((luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)) > 2, standing.name


# Numbers in few cells


def test_short_counts() -> None:
    shown = {0: "0", 99999: "99999", 100_000: "100k", 999_499: "999k", 999_500: "1M", 2**20: "1.05M", 2**64: "18.4E"}
    assert {count: short_count_text(count) for count in shown} == shown


@given(st.integers(0, 2**64))
def test_short_counts_are_short(count: int) -> None:
    assert len(short_count_text(count)) <= 5


def test_short_sizes_percents_and_ages() -> None:
    assert [short_size_text(size) for size in (0, 512, 1536, 2**29)] == ["0B", "512B", "1.5Ki", "512Mi"]
    assert [short_percent_text(f) for f in (None, 0.0, 0.004, 0.5, 0.9999, 1.0)] == [
        "-",
        "0%",
        "0%",
        "50%",
        "99%",
        "100%",
    ]
    ages = (-5, 0, 179, 180, 10_799, 10_800, 3 * 86400 - 1, 3 * 86400)
    assert [short_age_text(age) for age in ages] == ["0s", "0s", "179s", "3min", "179min", "3h", "71h", "3d"]
