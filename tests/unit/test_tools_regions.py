"""Regions of device memory, and who has pinned host memory, in all views but maps; from ``ArenaInfo`` made by hand."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from rich.text import Text
from seen_support import (
    HOSTILE,
    NOW,
    arena,
    busy,
    busy_rates,
    check_golden,
    draw,
    hostile,
    huge_gpus,
    lane,
    region,
    row,
    rows,
    seen,
    unreadable,
    with_gpus,
)

from shmcache.stats import ArenaInfo, Gauges, RegionInfo, ShareInfo
from shmcache_tools.look import Seen
from shmcache_tools.stat.regions_view import numbers_text, owner_of
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.stat.render import arena_in_full, arenas_table
from shmcache_tools.stat.shares_view import shares_table
from shmcache_tools.stat.views import view_of
from shmcache_tools.stat.watch.history import History
from shmcache_tools.stat.watch.live import page_of, sheet_of
from shmcache_tools.stat.watch.page import frame, lay_out, line_text

_TAKEN = "(1 GiB of its GPU stays taken while it is open)"
_SIZES = ((80, 24), (120, 40))


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def _unasked(info: ArenaInfo) -> ArenaInfo:
    """As most views look at it."""
    return replace(info, shares=None, objects=None)


def _gpus() -> Seen:
    return seen(_unasked(with_gpus()), rates=busy_rates())


def _several() -> Seen:
    return seen(_unasked(with_gpus()), arena("other", lanes=[lane(0)]), unreadable("bad", "why"), rates=busy_rates())


def _shares(seen: Seen) -> RenderableType:
    return shares_table(seen, None)


def _full(*regions: RegionInfo, width: int = 500) -> str:
    lanes = [lane(0), lane(1), lane(2, state="dead")]
    return draw(arena_in_full(seen(arena("engine", lanes=lanes, regions=regions, region_limit=8))), width)


def _screen(name: str | None, found: Seen, width: int, height: int) -> list[str]:
    """What ``--watch`` shows."""
    console = Console(markup=False, highlight=False, color_system=None, force_terminal=True)
    history = History()
    history.add(found)
    view = view_of(name, shares=False, blocks=False, limit=None)
    layout = lay_out(page_of(view, history, sheet_of(console, width)), console, width, height)
    lines = frame(layout, 0, line_text("keys"), console, width)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


# What is to be seen


@pytest.mark.parametrize("width", [80, 120, 500])
def test_golden(width: int) -> None:
    check_golden(f"arena-gpus-{width}.txt", draw(arena_in_full(_gpus()), width))
    check_golden(f"arenas-gpus-{width}.txt", draw(arenas_table(_several()), width))
    check_golden(f"shares-gpus-{width}.txt", draw(_shares(seen(with_gpus())), width))


def test_golden_colours() -> None:
    check_golden("arena-gpus-80.ansi", draw(arena_in_full(_gpus()), 80, colour=True))
    check_golden("shares-gpus-80.ansi", draw(_shares(seen(with_gpus())), 80, colour=True))


@pytest.mark.parametrize(("width", "height"), _SIZES)
def test_golden_live(width: int, height: int) -> None:
    for name, what in (("engine", "arena"), (None, "arenas")):
        text = "\n".join(_screen(name, _several(), width, height))
        check_golden(f"watch-{what}-gpus-{width}x{height}.txt", f"{text}\n")


def test_a_region_is_a_line_with_its_gpu_its_owner_and_who_has_it_open() -> None:
    text = draw(arena_in_full(_gpus()))
    uuid = "84ba-6c97-c49f-cf006933a4ac"
    assert f"1 cuda:0 GPU-00000001-{uuid} 1 engine-0 1 4001 python 1 GiB 256 MiB, 25.0 % 64 KiB 2-4 live" in rows(text)
    assert f"2 cuda:1 GPU-00000002-{uuid} 3 engine-0 3 4003 python 24 GiB 0 B, 0.0 % 1 MiB - live" in rows(text)
    assert f"3 cuda:2 GPU-00000003-{uuid} 2 engine-0 2 4002 python 1 GiB 1 MiB, 0.1 % 64 KiB 1 lost" in rows(text)
    assert row(text, "devices") == "devices 27.5 GiB in 4 regions of at most 8; 259 MiB used, 0.9 %"
    assert row(text, "capacity") == "capacity 512 MiB of host memory in blocks of 64 KiB"


def test_the_owner_of_a_lost_region_is_not_who_has_its_lane_now() -> None:
    text = draw(arena_in_full(_gpus()))
    assert "4 cuda:0 GPU-00000004-84ba-6c97-c49f-cf006933a4ac 0 - - - - 1.5 GiB 2 MiB, 0.1 % 64 KiB - lost" in rows(
        text
    )
    info = with_gpus()
    owners = [owner_of(info, found) for found in info.regions]
    assert [owner and owner.index for owner in owners] == [1, 3, 2, None]
    assert owner_of(info, region(1, owner=99)) is None
    assert owner_of(info, region(1, incarnation=1)) is None
    assert "owner gone" in "\n".join(_screen("engine", _gpus(), 80, 24))
    left = draw(arena_in_full(seen(_lost())))  # its owner was reaped, and nobody has come since
    assert re.search(r" cuda:0 +GPU-\S+ +1 +engine-0 +1 +- ", left)
    assert " owner gone " in "\n".join(_screen("engine", seen(_lost()), 80, 24))


def test_lanes_tell_what_they_have_pinned_and_which_regions_are_theirs() -> None:
    text = draw(arena_in_full(_gpus()))
    lanes = rows(text[text.index("lane  group") : text.index(" vacant")])
    assert lanes[0].endswith(" oldest held pinned regions")
    ends = {line.split()[0]: line.split()[-2:] for line in lanes[1:6]}
    assert ends == {"0": ["-", "-"], "1": ["MiB", "1"], "2": ["-", "3"], "3": ["-", "2"], "4": ["MiB", "-"]}
    assert lanes[3].endswith(" 512 MiB 1")
    two = _full(region(1), region(5), region(6))
    assert row(two, "1 engine-0").endswith(" 1, 5-6")


def test_who_pins_without_any_region() -> None:
    pinned = arena("engine", lanes=[lane(0, gauges=Gauges(pinned_bytes=2**29)), lane(1)])
    text = draw(arena_in_full(seen(pinned)))
    assert row(text, "0 engine-0").endswith(" - 512 MiB")
    assert row(text, "1 engine-0").endswith(" - -")
    assert "regions" not in text


def test_what_lost_means_is_said_where_something_is_lost() -> None:
    assert "lost: its owner is gone" in _full(region(1), region(2, state="lost"))
    assert "lost" not in _full(region(1), region(2))


def test_what_is_lost_stands_out() -> None:
    text = draw(arena_in_full(_gpus()), 80, colour=True)
    (found,) = [line for line in text.splitlines() if "GPU-00000003" in line]
    style = str(Text.from_ansi(found[: found.rindex("lost")] + "lost").spans[-1].style)
    assert "bold" in style
    assert "reverse" in style


@pytest.mark.parametrize("draw_view", [arena_in_full, arenas_table, _shares])
def test_nothing_of_it_without_regions(draw_view: Callable[[Seen], RenderableType]) -> None:
    text = draw(draw_view(seen(busy(), rates=busy_rates())))
    assert not re.search(r"region|device|GPU|pinned|host memory", text)
    assert not re.search(r"region|device|GPU|pinned", "\n".join(_screen("engine", seen(busy()), 120, 40)))
    assert "device" not in "\n".join(_screen(None, seen(busy()), 120, 40))


def test_the_table_of_arenas_has_device_memory_beside_host_memory() -> None:
    text = draw(arenas_table(_several()))
    assert rows(text)[0].startswith("arena capacity used device memory objects ")
    assert row(text, "engine 512").startswith("engine 512 MiB 50.0 % 27.5 GiB, 0.9 % 4,096 ")
    assert row(text, "other").startswith("other 512 MiB 0.0 % - 0 ")
    assert row(text, "bad - -") == "bad " + "- " * 12 + "unreadable"
    for width in (80, 100, 119):
        lines = draw(arenas_table(_several()), width).splitlines()[:4]
        assert max(map(len, lines)) <= width
        assert " device " in lines[0]
        assert " 27.5Gi 1% " in lines[1]


def test_shares_tell_their_region() -> None:
    text = draw(_shares(seen(with_gpus())))
    assert row(text, "held 50 s") == "held 50 s on-the-gpu 1 MiB 1 1 1 engine-0 1 4001 python alive"
    assert row(text, "held 40 s") == "held 40 s lost 1 MiB 4 lost 1 4 - private 4004 notebook alive"
    assert row(text, "held 1 h 6 min").split()[7:10] == ["MiB", "-", "1"]


def test_live_regions_give_way_to_what_is_lost() -> None:
    lost = replace(_unasked(with_gpus()), regions=(*map(region, range(1, 30)), region(30, state="lost")))
    lines = [line for line in _screen("engine", seen(lost), 80, 24) if line.startswith("region ")]
    assert 3 < len(lines) < 20
    assert lines[-1].startswith("region 30 ")
    assert lines[-1].endswith(" lost")
    assert [line.split()[1] for line in lines[:-1]] == [str(number) for number in range(1, len(lines))]


# What to do


def _remarks(info: ArenaInfo) -> list[tuple[str, str]]:
    return [(remark.sentence, remark.command) for remark in remarks_of([info]) if "region" in remark.sentence]


def _lost(**fields: object) -> ArenaInfo:
    lanes = [lane(0), lane(1, state="vacant", pid=0), lane(2)]
    return arena("engine", lanes=lanes, regions=(region(1, state="lost", **fields),), region_limit=8)


def test_who_keeps_what_is_lost() -> None:
    assert _remarks(with_gpus()) == [
        (
            f"region 3 of engine is lost, but kept by lane 1 {_TAKEN}; to end who does not let go",
            "kill 4001",
        ),
        ("region 4 of engine is lost, but kept by lane 4; to end who does not let go", "kill 4004"),
    ]


def test_where_shares_were_not_looked_at_it_says_how_to() -> None:
    see = "to see whose shares", "shmcache-stat --shares engine"
    assert _remarks(_lost()) == [(f"region 1 of engine is lost, but kept by shares; {see[0]}", see[1])]
    assert _remarks(_lost(opened=(0, 2))) == [
        (f"region 1 of engine is lost, but kept by lanes 0, 2 {_TAKEN}; {see[0]}", see[1])
    ]
    dash = replace(_lost(), name="-dash")
    assert _remarks(dash)[0][1] == "shmcache-stat --shares -- -dash"


def test_what_a_reap_ends_needs_no_more_than_that() -> None:
    dead = arena("engine", lanes=[lane(0), lane(1, state="dead")], regions=(region(1, state="lost"),))
    assert [remark.command for remark in remarks_of([dead])] == ["shmcache-cleanup --reap engine"]
    assert _remarks(replace(_lost(), shares=())) == []
    assert _remarks(replace(_lost(), regions=(region(1),))) == []
    assert _remarks(_lost(used_bytes=0)) == []


def test_shares_of_other_regions_keep_nothing_of_a_lost_one() -> None:
    shares = (ShareInfo("held", 0, b"k", 1, 1, NOW, region=2), ShareInfo("held", 0, b"k", 1, 1, NOW))
    assert _remarks(replace(_lost(), shares=shares)) == []


def test_many_who_keep_it_make_no_endless_command() -> None:
    many = arena(
        "engine", lanes=[lane(n) for n in range(100)], regions=(region(1, state="lost", opened=tuple(range(100))),)
    )
    ((sentence, command),) = _remarks(replace(many, shares=()))
    assert "kept by 100 lanes" in sentence
    assert command == "kill 4000 4001 4002 4003 4004 4005 4006 4007"


# What there can be


@pytest.mark.parametrize("info", [hostile(), huge_gpus(), with_gpus()])
def test_every_width_and_nothing_that_a_terminal_obeys(info: ArenaInfo) -> None:
    for width in (1, 39, 80, 500):
        for view in (arena_in_full, arenas_table, _shares):
            assert all(line.isprintable() for line in draw(view(seen(info)), width).splitlines())
        for height in (1, 5, 24):
            for name in (info.name, None):
                assert all(line.isprintable() for line in _screen(name, seen(info), width, height))
    assert HOSTILE not in draw(arena_in_full(seen(info)))


def test_a_table_of_the_largest_fits_a_terminal() -> None:
    text = draw(arena_in_full(seen(huge_gpus())), 80)
    regions = text[text.index("\nreg ") : text.index("\nlost: ")].splitlines()[1:]
    assert len(regions) == 1 + 31 + 1
    assert all(line.rstrip().endswith(("live", "lost")) for line in regions[1:-1])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "-"),
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 2], "0, 2"),
        ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
        (range(256), "0-255"),
    ],
)
def test_numbers_in_short(numbers: list[int], text: str) -> None:
    assert numbers_text(numbers) == text
