"""The pages of ``--watch``, from ``ArenaInfo`` made by hand, on screens of all sizes."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console, Group
from rich.text import Text
from seen_support import (
    HOSTILE,
    NOW,
    arena,
    busy,
    busy_rates,
    check_golden,
    hostile,
    huge,
    lane,
    rows,
    seen,
    stale,
    unreadable,
)

from shmcache.stats import ArenaInfo, Counters, LockInfo
from shmcache_tools.look import Seen
from shmcache_tools.rates import Rates
from shmcache_tools.stat.views import View, view_of
from shmcache_tools.stat.watch.history import History
from shmcache_tools.stat.watch.live import help_page, page_of, sheet_of
from shmcache_tools.stat.watch.page import Page, frame, lay_out, line_text

_ALL = view_of(None, shares=False, blocks=False, limit=None)
_ENGINE = view_of("engine", shares=False, blocks=False, limit=None)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def _history(found: Seen, samples: int = 30) -> History:
    """Where that was seen again and again."""
    history = History()
    for second in reversed(range(samples)):
        history.add(replace(found, now=found.now - second))
    return history


def _screen(
    page: Page, width: int = 80, height: int = 24, *, first: int = 0, foot: str = "keys", colour: bool = False
) -> list[str]:
    """The lines of a screen, checked to be exactly as many and as wide."""
    console = _console(colour=colour)
    layout = lay_out(page, console, width, height)
    lines = frame(layout, min(first, layout.furthest), line_text(foot), console, width)
    texts = ["".join(segment.text for segment in line) for line in lines]
    assert len(texts) == height
    assert {cell_len(text) for text in texts} == {width}
    return texts


def _console(*, colour: bool = False, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    system = "256" if colour else None
    return Console(file=file, markup=False, highlight=False, color_system=system, force_terminal=True)  # type: ignore[arg-type]


def _page(view: View, found: Seen, width: int = 80, *, samples: int = 30) -> Page:
    return page_of(view, _history(found, samples), sheet_of(_console(), width))


def _text(view: View, found: Seen, width: int = 80, height: int = 24) -> str:
    return "\n".join(line.rstrip() for line in _screen(_page(view, found, width), width, height)) + "\n"


def _busy() -> Seen:
    (rates,) = busy_rates().values()
    lanes = {1: Rates(2.0, Counters(), Counters(read_hits=3000))}
    return seen(busy(), rates={"engine": replace(rates, lanes=lanes)})


def _several() -> Seen:
    others = (stale("left-behind"), huge(), unreadable("worse", HOSTILE))
    return seen(busy(), *others, rates=busy_rates())


# what is to be seen


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_golden(width: int, height: int) -> None:
    check_golden(f"watch-arena-{width}x{height}.txt", _text(_ENGINE, _busy(), width, height))
    check_golden(f"watch-arenas-{width}x{height}.txt", _text(_ALL, _several(), width, height))


def test_lanes_of_the_dead_and_the_stopped_come_first() -> None:
    text = _text(_ENGINE, _busy(), 120, 60)
    states = re.findall(r" \d+ (dead|stopped|alive) ", "\n".join(rows(text)).partition("group rank")[2])
    assert states[:5] == ["dead", "stopped", "alive", "alive", "alive"]
    assert "engine-0 1 4001 alive 1.5k 30 30Mi 75s 0 0 python" in rows(text)
    assert "engine-0 2 4002 dead - 4 4Mi 121min 12 0 python" in rows(text)


def test_a_lock_that_the_dead_hold_is_said() -> None:
    assert "lock held by dead pid 4002" in _text(_ENGINE, _busy())
    moment = replace(busy(), lock=LockInfo(1, 2, 4001, alive=True))
    assert "lock held" not in _text(_ENGINE, seen(moment))
    stopped = replace(busy(), lock=LockInfo(3, 1, 4003, alive=True))
    assert "lock held by stopped pid 4003" in _text(_ENGINE, seen(stopped))


def test_bad_news_is_red() -> None:
    for growth, style in ((0, "bold"), (3, "bold red")):
        rates = Rates(1.0, Counters(no_space=5), Counters(no_space=5 + growth))
        page = _page(_ENGINE, seen(busy(), rates={"engine": rates}))
        line = next(line for line in page.extras(20) if line.plain.startswith("no space/s"))
        assert str(line.spans[0].style) == style


def test_numbers_that_are_not_known_yet() -> None:
    lines = _screen(_page(_ENGINE, seen(busy()), samples=1))
    assert next(line for line in lines if line.startswith("keys read/s")).split()[:3] == ["keys", "read/s", "-"]


def test_more_width_and_less_height_put_series_side_by_side() -> None:
    assert any(
        "keys read/s" in line and "shares held" in line for line in _text(_ENGINE, _busy(), 120, 20).splitlines()
    )
    tall = _text(_ENGINE, _busy(), 120, 50).splitlines()
    assert not any("keys read/s" in line and "shares held" in line for line in tall)


def test_an_arena_that_is_not_there() -> None:
    assert "kv 01:15:20 no such arena yet" in " ".join(rows(_text(replace(_ENGINE, name="kv"), seen())))
    history = _history(_busy())
    history.add(replace(seen(), now=NOW + 5))
    page = page_of(_ENGINE, history, sheet_of(_console(), 80))
    assert "engine 01:15:25 gone since 01:15:25" in " ".join(rows("\n".join(_screen(page))))


def test_an_arena_that_cannot_be_read() -> None:
    text = _text(_ENGINE, seen(unreadable("engine", HOSTILE)))
    assert rows(text)[0].startswith("engine unreadable")
    assert "cannot be read" in text


def test_arenas_that_are_gone_are_shown_for_a_while() -> None:
    history = _history(_several())
    history.add(replace(seen(busy()), now=NOW + 5))
    sheet = sheet_of(_console(), 80)
    assert "left-behind gone since 01:15:25" in rows("\n".join(_screen(page_of(_ALL, history, sheet))))
    history.add(replace(seen(busy()), now=NOW + 70))
    assert "gone" not in "\n".join(_screen(page_of(_ALL, history, sheet)))


def test_no_arenas() -> None:
    text = _text(_ALL, seen())
    assert rows(text)[0].startswith("0 arenas")
    assert "no arenas of this user" in text


def test_a_look_that_failed_is_said_above_what_was_seen() -> None:
    history = _history(_busy())
    history.trouble = "Too many open files \x1b[2J"
    lines = _screen(page_of(_ENGINE, history, sheet_of(_console(), 80)))
    assert lines[0].rstrip() == "cannot look: Too many open files ?[2J"
    assert lines[1].startswith("engine ")
    history = History(trouble="no")
    assert _screen(page_of(_ENGINE, history, sheet_of(_console(), 80)))[0].rstrip() == "cannot look: no"


def test_views_that_are_drawn() -> None:
    view = View("kv", lambda found: Text(f"{found.infos[0].name} is drawn"), shares=True)
    assert rows(_text(view, seen(arena("kv"))))[1] == "kv is drawn"
    assert "no such arena yet" in _text(view, seen())
    everything = replace(view, name=None, draw=lambda found: Text(f"{len(found.infos)} drawn"))
    assert rows(_text(everything, seen()))[1] == "0 drawn"


def test_what_is_drawn_is_told_its_room() -> None:
    class _Room:
        def __rich_console__(self, console: Console, options: object) -> Iterator[Text]:
            assert console.options is not options
            yield Text(f"{options.max_width} {options.max_height - 1} {options.height}")  # type: ignore[attr-defined]

    view = View("kv", lambda _found: _Room(), objects=True)
    assert rows(_text(view, seen(arena("kv")), 77, 33))[1] == "77 31 None"


# screens


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (None, _several()),
        (None, seen()),
        ("engine", _busy()),
        (HOSTILE, seen(hostile())),
        (huge().name, seen(huge())),
        ("worse", _several()),
        ("not-there", _several()),
    ],
)
def test_every_size_of_screen(name: str | None, found: Seen) -> None:
    for width in (1, 2, 10, 39, 80, 200):
        page = _page(view_of(name, shares=False, blocks=False, limit=None), found, width)
        for height in (1, 2, 3, 5, 24, 50):
            for line in _screen(page, width, height, first=1):
                assert line.isprintable()


@pytest.mark.parametrize("blocks", [False, True])
def test_every_size_of_screen_for_what_is_drawn(blocks: bool) -> None:
    info = replace(busy(), objects=busy().objects, shares=busy().shares)
    view = view_of("engine", shares=not blocks, blocks=blocks, limit=None)
    for width in (1, 10, 20, 80, 200):
        page = _page(view, seen(info), width)
        for height in (1, 2, 3, 5, 24, 50):
            _screen(page, width, height, first=1)


def test_a_body_scrolls_below_its_head() -> None:
    page = Page(Text("head"), titles=Text("titles"), body=Group(*(Text(f"line {n}") for n in range(100))))
    lines = [line.rstrip() for line in _screen(page, 10, 8, first=40)]
    assert lines == ["head", "titles", *(f"line {n}" for n in range(40, 45)), "keys"]
    assert [line.rstrip() for line in _screen(page, 10, 8, first=1000)][-2:] == ["line 99", "keys"]
    layout = lay_out(page, _console(), 10, 8)
    assert (layout.rows, layout.furthest) == (5, 95)


def test_extras_leave_half_of_the_room() -> None:
    def extras(count: int) -> list[Text]:
        return [Text(f"extra {n}") for n in range(min(count, 30))]

    def shown(body: int, height: int) -> int:
        page = Page(Text("head"), extras, body=Group(*(Text("body") for _ in range(body))))
        return sum("extra" in line for line in _screen(page, 20, height))

    assert shown(100, 24) == 11
    assert shown(4, 24) == 18
    assert shown(4, 60) == 30
    assert shown(4, 3) == 0


def test_without_unicode_and_without_colours() -> None:
    console = _console(encoding="ascii")
    page = page_of(_ALL, _history(seen(busy(), rates=busy_rates())), sheet_of(console, 120))
    assert all(line.isascii() for line in _screen(page, 120, 24))
    plain, coloured = (_used(colour=colour) for colour in (False, True))
    assert re.search(r"XHwr----\.\.\.\. +50%|X[Hw]+r-+\.+ +50%", plain)
    assert re.search(r"█+░+ +50%", coloured)


def _used(*, colour: bool) -> str:
    page = page_of(_ALL, _history(seen(busy())), sheet_of(_console(colour=colour), 80))
    return next(line for line in _screen(page, colour=colour) if line.startswith("engine"))


def test_names_that_are_too_long_keep_both_ends() -> None:
    infos: list[ArenaInfo] = [arena("kv-" + "n" * 40 + tail, lanes=[lane(0)]) for tail in ("-01", "-02")]
    text = _text(_ALL, seen(*infos))
    assert re.search(r"^kv-n+~n+-01 ", text, re.MULTILINE)
    assert re.search(r"^kv-n+~n+-02 ", text, re.MULTILINE)


def test_help_names_every_key() -> None:
    text = "\n".join(_screen(help_page()))
    assert all(key in text for key in ("q", "space", "+ -", "PgUp", "Home", "?"))
