"""What ``--watch`` remembers, and how it puts numbers over time: pure parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from seen_support import NOW, arena, unreadable

import shmcache
from shmcache.stats import ArenaInfo, Counters
from shmcache_tools.look import Observer, Seen
from shmcache_tools.rates import rates_between
from shmcache_tools.stat.watch.history import History, look_into
from shmcache_tools.stat.watch.series import READS, SERIES, series_of, short_number
from shmcache_tools.stat.watch.sparkline import ASCII_LEVELS, UNICODE_LEVELS, sparkline

_PLACE = SERIES.index(READS)


def _arena(reads: int, **fields: object) -> ArenaInfo:
    made = arena("kv", **fields)  # type: ignore[arg-type]
    assert made.stats is not None
    return replace(made, stats=replace(made.stats, counters=Counters(read_hits=reads)))


def _history(*looks: ArenaInfo | None) -> History:
    """A look a second; None: the arena was not there."""
    history, before = History(), None
    for second, info in enumerate(looks):
        rates = rates_between(before, info, 1.0) if info else None
        infos = (info,) if info else ()
        history.add(Seen(infos, {"kv": rates} if rates else {}, NOW + second, second))
        before = info
    return history


def _reads(history: History) -> list[float | None]:
    return history.timelines["kv"].values(_PLACE)


# history


def test_a_sample_a_look_but_the_first() -> None:
    assert _reads(_history(_arena(10))) == []
    assert _reads(_history(_arena(10), _arena(15), _arena(15), _arena(25))) == [5.0, 0.0, 10.0]


def test_an_arena_made_anew_starts_anew() -> None:
    assert _reads(_history(_arena(10), _arena(15), _arena(3, inode=8))) == []
    assert _reads(_history(_arena(10), _arena(15), _arena(3, inode=8), _arena(7, inode=8))) == [4.0]


def test_an_arena_that_cannot_be_read_for_a_while_goes_on() -> None:
    history = _history(_arena(10), _arena(15), unreadable("kv", "damaged"), _arena(30), _arena(36))
    assert _reads(history) == [5.0, 6.0]


def test_an_arena_that_was_gone_starts_anew() -> None:
    history = _history(_arena(10), _arena(15), None)
    assert history.gone == {"kv": NOW + 2}
    assert not history.timelines
    history = _history(_arena(10), _arena(15), None, None, _arena(15))
    assert not history.gone
    assert _reads(history) == []


def test_since_when_it_is_gone() -> None:
    assert _history(_arena(1), None, None, None).gone == {"kv": NOW + 1}
    assert not _history(None, None).gone


def test_what_is_remembered_is_bounded() -> None:
    history = _history(*map(_arena, range(2000)))
    assert len(_reads(history)) == 512
    for second in range(100):
        history.add(Seen((arena(f"short-lived-{second}"),), {}, NOW + second, second))
    assert list(history.gone)[-1] == "short-lived-98"
    assert len(history.gone) == 64


@pytest.mark.parametrize(
    ("error", "news"),
    [(OSError(24, "Too many open files"), "Too many"), (shmcache.ArenaBusyError(""), "ArenaBusyError")],
)
def test_a_look_that_fails_leaves_what_was_seen(error: Exception, news: str) -> None:
    class _Failing(Observer):
        def look(self) -> Seen:
            raise error

    class _Seeing(Observer):
        def look(self) -> Seen:
            return Seen((_arena(9),), {}, NOW + 9, 9)

    history = _history(_arena(1), _arena(5))
    look_into(history, _Failing())
    assert news in str(history.trouble)
    assert history.seen.now == NOW + 1
    assert _reads(history) == [4.0]
    look_into(history, _Seeing())
    assert history.trouble is None
    assert history.seen.now == NOW + 9


# series


def test_series_are_there_once_they_matter() -> None:
    def names(**counters: int) -> list[str]:
        stats = arena("kv").stats
        assert stats is not None
        found = series_of(replace(stats, counters=Counters(**counters)))
        assert all(SERIES[place] is series for place, series in found)
        return [series.name for _, series in found]

    assert "L2 failures/s" not in names()
    assert "L2 failures/s" in names(l2_timeouts=1)
    assert names()[:2] == ["keys read/s", "hit rate"]


def test_every_series_has_a_value_and_a_short_text() -> None:
    huge = Counters(**dict.fromkeys(Counters.__slots__, 2**64 - 1))
    before, after = _arena(0), _arena(0)
    assert before.stats is not None
    assert after.stats is not None
    stats = replace(after.stats, counters=huge, held=2**28, reserved=2**28)
    rates = rates_between(before, replace(after, stats=stats), 0.1)
    assert rates is not None
    for series in SERIES:
        value = series.value(rates, stats)
        assert value, series.name
        assert len(series.text(value)) <= 7, series.name
        assert len(series.name) <= 20


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.004, "0.004"),
        (0.34, "0.3"),
        (0.96, "1"),
        (1, "1"),
        (3.14, "3.1"),
        (9.96, "10"),
        (999.4, "999"),
        (999.6, "1k"),
        (1234, "1.2k"),
        (123_456, "123k"),
        (999_999, "1M"),
        (5.55e9, "5.5G"),
        (1e18, "1E"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


# sparklines


def test_sparkline_is_scaled_to_the_highest_shown() -> None:
    assert sparkline([7, 0, 1, 2, 3, 4, 5, 6, 7], 8) == UNICODE_LEVELS
    assert sparkline([700, 0, 1, 2, 3, 4, 5, 6, 7], 8) == UNICODE_LEVELS  # 700 is no longer shown
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, utf8=False) == ASCII_LEVELS
    assert sparkline([0.5, 1.0], 2, 1.0) == "▅█"
    assert sparkline([2.0], 1, 1.0) == "█"  # above the top


def test_sparkline_tells_little_from_nothing() -> None:
    assert sparkline([0, 0.001, 1000], 3) == "▁▂█"
    assert sparkline([0, 0, 0], 3) == "▁▁▁"


def test_sparkline_keeps_its_width() -> None:
    assert sparkline([1, None, 1], 5) == "  █ █"
    assert sparkline([], 3) == "   "
    assert sparkline([None], 1) == " "
    assert sparkline([1, 2], 0) == ""
    assert sparkline([1, 2], -3) == ""
