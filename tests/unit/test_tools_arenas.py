"""The table of all arenas and one arena in full, from ``ArenaInfo`` made by hand."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Group
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
    huge,
    lane,
    row,
    rows,
    seen,
    stale,
    unreadable,
)

from shmcache.stats import ArenaInfo, Counters, Histogram, Histograms, Stats
from shmcache_tools.look import Seen
from shmcache_tools.rates import Rates
from shmcache_tools.stat.remarks import remarks_of
from shmcache_tools.stat.render import arena_in_full, arenas_table

_WIDTHS = (80, 120, 500)
_SHORT = "arena size used obj grp live dead rsv held hits now age state"


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def _several() -> Seen:
    """Arenas of every kind."""
    foreign = "arena 'bad': expected a segment that shmcache made, found a foreign, cut or overwritten one"
    return seen(
        busy(),
        huge(),
        stale("-dash"),
        stale("left-behind"),
        unreadable("bad", f"{foreign}; remove it with shmcache-cleanup --force bad"),
        unreadable("worse", HOSTILE),
        replace(unreadable("old", "made before the last boot"), old=True),
        rates=busy_rates(),
    )


def _stats(info: ArenaInfo) -> Stats:
    assert info.stats is not None
    return info.stats


def _full(info: ArenaInfo) -> str:
    return draw(arena_in_full(seen(info)))


@pytest.mark.parametrize("width", _WIDTHS)
def test_golden_arenas(width: int) -> None:
    check_golden(f"arenas-{width}.txt", draw(arenas_table(_several()), width))


@pytest.mark.parametrize("width", _WIDTHS)
def test_golden_arena_in_full(width: int) -> None:
    check_golden(f"arena-{width}.txt", draw(arena_in_full(seen(busy(), rates=busy_rates())), width))


@pytest.mark.parametrize("info", [huge(), hostile(), stale("left-behind"), unreadable("worse", HOSTILE)])
def test_golden_arenas_of_all_kinds_in_full(info: ArenaInfo) -> None:
    kind = {HOSTILE: "hostile", "left-behind": "stale", "worse": "unreadable"}.get(info.name, "huge")
    check_golden(f"arena-{kind}-80.txt", draw(arena_in_full(seen(info)), 80))


def test_golden_colours() -> None:
    check_golden("arenas-80.ansi", draw(arenas_table(_several()), 80, colour=True))
    check_golden("arena-80.ansi", draw(arena_in_full(seen(busy(), rates=busy_rates())), 80, colour=True))


def test_no_arenas() -> None:
    assert draw(arenas_table(seen())) == "no arenas of this user\n"
    assert draw(arena_in_full(seen())) == "no such arena any more\n"


def test_one_line_an_arena() -> None:
    text = draw(arenas_table(seen(busy(), arena("other", lanes=[lane(0)]), rates=busy_rates())))
    assert row(text, "engine 512") == "engine 512 MiB 50.0 % 4,096 1 4 1 12 35 75.0 % 99.0 % 3 h 2 min in use"
    assert row(text, "other") == "other 512 MiB 0.0 % 0 0 1 0 0 0 - - 3 h 2 min in use"


def test_an_unreadable_arena_is_one_line_and_its_problem() -> None:
    text = draw(arenas_table(_several()))
    assert "bad - - - - - - - - - - - unreadable" in rows(text)
    assert "remove it with: shmcache-cleanup --force bad\n" in text
    assert "to remove it, if nobody uses it: shmcache-cleanup --force worse\n" in text


@pytest.mark.parametrize("width", [80, 81, 100, 119])
def test_a_table_of_arenas_fits_a_terminal(width: int) -> None:
    ordinary = [replace(busy(), name=f"engine-{n}-of-the-model-llama-{n}") for n in range(3)]
    lines = draw(arenas_table(seen(*ordinary, stale("left"))), width).splitlines()[:5]
    assert max(map(len, lines)) <= width
    assert lines[0].split() == [
        "arena",
        "size",
        "used",
        "obj",
        "grp",
        "live",
        "dead",
        "rsv",
        "held",
        "hits",
        "now",
        "age",
        "state",
    ]
    assert all(line.startswith(f"engine-{n}") and f"llama-{n} " in line for n, line in enumerate(lines[1:4]))


def test_what_does_not_fit_is_told() -> None:
    text = draw(arenas_table(seen(huge(), unreadable("bad", "why"))), 70)
    assert "not shown at this width: groups, age" in text
    assert " grp " not in text


@pytest.mark.parametrize("width", range(1, 80, 7))
def test_no_width_is_too_small(width: int) -> None:
    several = _several()
    for text in (draw(arenas_table(several), width), *(draw(arena_in_full(seen(i)), width) for i in several.infos)):
        assert text


def test_what_is_piped_is_never_cut() -> None:
    for view in (arenas_table(_several()), arena_in_full(seen(huge())), arena_in_full(seen(hostile()))):
        text = draw(view)
        assert "…" not in text
        assert "not shown" not in text
    assert f"{huge().name} 16 TiB" in " ".join(draw(arenas_table(seen(huge()))).split())


@pytest.mark.parametrize("width", _WIDTHS)
def test_no_text_commands_the_terminal(width: int) -> None:
    bad = unreadable(HOSTILE, HOSTILE)
    for view in (arenas_table(seen(hostile(), bad)), arena_in_full(seen(hostile())), arena_in_full(seen(bad))):
        text = draw(view, width)
        assert all(char.isprintable() for char in text.replace("\n", ""))
        assert "\x1b]" not in draw(view, width, colour=True)


def test_an_arena_in_full() -> None:
    text = draw(arena_in_full(seen(busy(), rates=busy_rates())))
    for part in (
        "2023-11-14 22:13:20+00:00, 3 h 2 min ago",
        "llama-8b/bf16/v1",
        "512 MiB in blocks of 64 KiB",
        "256 MiB, 50.0 %; 300 MiB of memory",
        "4,096 readable, 3 being written, at most 8,192",
        "12 reserved, 35 held",
        "75.0 % of the keys asked of read",
        "7,777 objects, 48 GiB; 12 reservations refused",
        "1,000 keys read/s, 99.0 % hits; 0 objects published/s, 5 evicted/s",
        "held by lane 2, incarnation 5, pid 4002 (dead)",
        "read 300 s, write 600 s; lock timeout 5 s",
        "59 lanes of 64 vacant",
        "X dead 4 MiB 0.8 %   H held 33 MiB 6.4 %   w writing 3 MiB 0.6 %   r reserved 16 MiB 3.1 %",
        "- ready 200 MiB 39.1 %   . free 256 MiB 50.0 %",
    ):
        assert part in text
    assert (
        row(text, "prefetch") == "prefetch 3 requests of 20 keys: 25.0 % from L1, 50.0 % from L2; 1 in flight, 2 queued"
    )
    on_the_way = "2 MiB on their way"
    assert row(text, "L2") == f"L2 11 objects loaded, 0.12 GB; 0 stored, 0.00 GB, {on_the_way}; 0 failures, 1 damaged"


@pytest.mark.parametrize("width", [40, 80])
def test_long_words_are_folded(width: int) -> None:
    long = arena("n" * 64, fingerprint="f" * 256, path=f"/dev/shm/{'p' * 70}")  # noqa: S108 # a text
    text = "".join(draw(arena_in_full(seen(long)), width).split("capacity")[0].split())
    assert "n" * 64 in text
    assert "f" * 256 in text
    assert "p" * 70 in text


def test_lanes_of_a_group_stand_together() -> None:
    text = _full(busy())
    lanes = text[text.index("lane  group") : text.index(" vacant")]
    assert re.findall(r" (3999|400[0-9]) ", lanes) == ["4004", "3999", "4001", "4002", "4003"]
    assert row(text, "0") == "0 engine-0 controller 3999 scheduler alive 3 h 2 min 1 0 0 0 B 3 -"
    assert row(text, "2") == "2 engine-0 2 4002 python dead 3 h 2 min 5 12 4 4 MiB 0 2 h 1 min"
    assert row(text, "3") == "3 engine-0 3 4003 python stopped 3 h 2 min 1 0 1 1 MiB 0 1 h 6 min"
    assert row(text, "4") == "4 - private 4004 notebook alive 30 s 1 0 0 0 B 0 -"


def test_lanes_of_no_use_are_left_out() -> None:
    vacant = lane(7, state="vacant", pid=0, command="", started=0.0)
    assert "no lane in use" in _full(arena("empty", lanes=[vacant]))
    text = _full(arena("granted", lanes=[replace(vacant, reserved=9)]))
    assert row(text, "7") == "7 engine-0 7 - - vacant - 1 9 0 0 B 0 -"


@pytest.mark.parametrize("state", ["dead", "stopped"])
def test_the_dead_and_the_stopped_stand_out(state: str) -> None:
    fields = {"stopped": True} if state == "stopped" else {"state": "dead"}
    text = draw(arena_in_full(seen(arena("engine", lanes=[lane(1, **fields), lane(2)]))), 80, colour=True)
    (found,) = [line for line in text.splitlines() if " 4001 " in line]
    before = Text.from_ansi(found[: found.index(state)] + state).spans[-1].style
    assert "bold" in str(before)
    assert "reverse" in str(before)


def test_every_counter_is_shown_and_zeros_are_not() -> None:
    counters = Counters(*range(1001, 1001 + len(Counters.__slots__)))
    text = _full(arena("engine", replace(_stats(busy()), counters=counters)))
    for name in Counters.__slots__:
        assert f"{name.replace('_', ' ')} " in text
        assert f"{getattr(counters, name):,}" in text
    assert "other counters" not in text
    assert "lookup misses" not in _full(busy())
    assert "all other counters are 0" in _full(busy())
    assert "all counters are 0" in _full(stale("unused"))


def test_counters_tell_their_growth() -> None:
    text = draw(arena_in_full(seen(busy(), rates=busy_rates())))
    assert row(text, "read hits") == "read hits 3,000,000 +1,000/s prefetch requests 3"
    none = {"engine": Rates(1.0, _stats(busy()).counters, _stats(busy()).counters)}
    text = draw(arena_in_full(seen(busy(), rates=none)))
    assert "/s " not in text.split("vacant")[1]
    assert "0 keys read/s, - hits" in text


def test_times_are_shown_where_there_are_any() -> None:
    assert "p99" not in _full(stale("unused"))
    load = Histogram(0.5, (0, 98, *[0] * 20, 1))  # 98 of at most 32 us, and one of more than 33 s
    text = _full(arena("engine", replace(_stats(busy()), histograms=Histograms(l2_load=load))))
    assert row(text, "l2 load") == "l2 load 99 5.05 ms 32 us above 33.6 s"
    assert load.quantile_s(0.98) == 32e-6
    assert Histogram().quantile_s(0.5) is None


def test_prefetches_and_l2_are_told_in_words_once_there_are_any() -> None:
    text = _full(stale("unused"))
    assert "prefetch" not in text
    assert "L2" not in text


# What to do


def _commands(*infos: ArenaInfo) -> list[str]:
    return [remark.command for remark in remarks_of(infos)]


def test_what_to_do_about_each_kind() -> None:
    assert _commands(arena("fine", lanes=[lane(0)])) == []
    assert _commands(busy()) == ["shmcache-cleanup --reap engine", "kill -CONT 4003", "kill -KILL 4003"]
    assert _commands(stale("left")) == ["shmcache-cleanup left"]
    assert _commands(unreadable("bad", "why")) == ["shmcache-cleanup --force bad"]
    assert _commands(replace(unreadable("old", "why"), old=True)) == ["shmcache-cleanup old"]


def test_dead_lanes_of_a_stale_arena_need_no_reaping() -> None:
    assert _commands(arena("left", lanes=[lane(0, state="dead")])) == ["shmcache-cleanup left"]


def test_several_stale_ones_come_last_and_have_one_command_together() -> None:
    commands = _commands(stale("a"), busy(), stale("b"))
    assert commands[-3:] == ["shmcache-cleanup a", "shmcache-cleanup b", "shmcache-cleanup --stale"]
    assert commands[0] == "shmcache-cleanup --reap engine"


def test_a_name_with_a_dash_is_no_option() -> None:
    assert _commands(stale("-dash")) == ["shmcache-cleanup -- -dash"]
    assert _commands(unreadable("--all", "why")) == ["shmcache-cleanup --force -- --all"]


def test_a_command_is_one_for_any_shell() -> None:
    (command,) = _commands(stale("x; reboot \x1b[2J $(reboot)"))
    assert shlex.split(command) == ["shmcache-cleanup", "x; reboot ?[2J $(reboot)"]


def test_many_stopped_lanes_make_no_endless_command() -> None:
    first, second = remarks_of([arena("engine", lanes=[lane(n, stopped=True) for n in range(100)])])
    assert first.command == "kill -CONT 4000 4001 4002 4003 4004 4005 4006 4007"
    assert "100 stopped lanes (8 of them here)" in first.sentence
    assert second.command.startswith("kill -KILL 4000 ")


@pytest.mark.parametrize("width", [70, 80, 90, 200, 500])
def test_a_command_is_in_one_piece_for_a_shell(width: int) -> None:
    name = "n" * 64
    infos = stale(name), arena(name, lanes=[lane(0), lane(1, state="dead")])
    text = draw(Group(*remarks_of(infos)), width).replace("\\\n", "")
    words = [shlex.split(line.partition(": ")[2] or line) for line in text.splitlines() if "shmcache-cleanup" in line]
    assert words == [["shmcache-cleanup", "--reap", name], ["shmcache-cleanup", name]]


def test_ages_are_never_negative() -> None:
    assert "0 s ago" in _full(arena("tomorrow", created=NOW + 100))
