"""Keys of ``--watch`` as terminals send them, what they do, and the lines of a piped one: pure parts."""

from __future__ import annotations

import random
import re
import time

import pytest
from rich.console import Console
from rich.text import Text
from seen_support import HOSTILE, NOW, arena, busy, busy_rates, seen, unreadable

from shmcache_tools.look import Seen
from shmcache_tools.stat.views import View
from shmcache_tools.stat.watch.history import History
from shmcache_tools.stat.watch.keyboard import decode
from shmcache_tools.stat.watch.lines import Lines
from shmcache_tools.stat.watch.live import next_due, next_interval, scrolled
from shmcache_tools.stat.watch.page import Layout
from shmcache_tools.text import make_console

_ALL = View(None, lambda _seen: Text("not drawn"))

# keys


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (b"q", ["q"]),
        (b" +-?", [" ", "+", "-", "?"]),
        (b"\x1b[A\x1bOA", ["up", "up"]),
        (b"\x1b[B\x1bOB", ["down", "down"]),
        (b"\x1b[5~\x1b[6~", ["pgup", "pgdn"]),
        (b"\x1b[H\x1bOH\x1b[1~\x1b[7~", ["home"] * 4),
        (b"\x1b[F\x1bOF\x1b[4~\x1b[8~", ["end"] * 4),
        (b"\x1b[1;5Cq", ["q"]),  # Ctrl-right: none of ours
        (b"\x1b[200~\x1b[Aq", ["up", "q"]),
        (b"\x1bq", []),  # Alt-q
        ("é€q".encode(), ["q"]),
        (b"", []),
    ],
)
def test_keys(sent: bytes, keys: list[str]) -> None:
    assert decode(sent) == (keys, b"")


@pytest.mark.parametrize("begin", [b"\x1b", b"\x1b[", b"\x1bO", b"\x1b[5", b"\x1b[1;5"])
def test_a_key_that_is_not_all_there_waits(begin: bytes) -> None:
    assert decode(b"q" + begin) == (["q"], begin)


def test_keys_are_the_same_however_they_are_cut() -> None:
    chance = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    known = [b"\x1b[A", b"\x1b[6~", b"\x1bOF", b"\x1b[1~", b"q", b" ", b"+", "ü".encode(), b"\x1b[1;2P"]
    for _ in range(200):
        sent = b"".join(chance.choices(known, k=20))
        keys, rest, place = [], b"", 0
        while place < len(sent):
            size = chance.randrange(1, 8)
            more, rest = decode(rest + sent[place : place + size])
            keys += more
            place += size
        assert (keys, rest) == decode(sent)


def test_any_bytes_are_borne() -> None:
    chance = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    for _ in range(500):
        keys, rest = decode(bytes(chance.choices(b"\x1b[O;~0159AHq \xff\x00", k=30)))
        assert all(keys)
        assert rest[:1] in (b"", b"\x1b")


# what they do


@pytest.mark.parametrize(
    ("key", "first"),
    [
        *[("up", 49), ("k", 49), ("down", 51), ("j", 51), ("pgup", 30), ("pgdn", 70)],
        *[("home", 0), ("g", 0), ("end", 80), ("G", 80), ("x", 50)],
    ],
)
def test_scrolling(key: str, first: int) -> None:
    layout = Layout([[]] * 3, [[]] * 100, 24)  # 20 rows
    assert scrolled(key, 50, layout) == first
    assert 0 <= scrolled(key, 0, layout) <= 80
    assert 0 <= scrolled(key, 80, layout) <= 80
    assert scrolled(key, 0, Layout([], [], 24)) == 0


def test_intervals() -> None:
    assert next_interval(1.0, longer=True) == 2.0
    assert next_interval(1.0, longer=False) == 0.5
    assert next_interval(1.7, longer=True) == 2.0
    assert next_interval(1.7, longer=False) == 1.0
    assert next_interval(0.1, longer=False) == 0.1
    assert next_interval(86400.0, longer=True) == 86400.0


def test_looks_that_were_missed_are_left_out() -> None:
    now = time.monotonic()
    assert next_due(now + 1, 2.0) == now + 3
    assert next_due(now - 1, 1000.0) == now + 999  # a little late: the pace is kept
    assert next_due(now - 1000, 2.0) > time.monotonic() + 1


# the lines of a pipe


def _console() -> Console:
    return make_console()


def _text(lines: Lines, found: Seen, trouble: str | None = None) -> str:
    history = History()
    history.add(found)
    history.trouble = trouble
    return lines.of(history)


def test_a_line_an_arena() -> None:
    lines = Lines(_ALL, _console())
    header, first, second = _text(lines, seen(busy(), arena("other"), rates=busy_rates())).splitlines()
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW))
    assert header.split() == [
        *("time", "arena", "used", "objects", "lookup/s", "read/s", "hits"),
        *("publ/s", "evict/s", "MB/s", "held", "reserved", "dead"),
    ]
    numbers = ["50.0%", "4096", "0", "1000", "99.0%", "0", "5.0", "0", "35", "12", "1"]
    assert first.split() == [*when.split(), "engine", *numbers]
    assert second.split() == [*when.split(), "other", "0.0%", "0", *["-"] * 6, "0", "0", "0"]
    assert len({len(line) for line in (header, first, second)}) == 1


def test_the_header_comes_again() -> None:
    lines = Lines(_ALL, _console())
    text = "".join(_text(lines, seen(arena("kv"))) for _ in range(45))
    headers = [place for place, line in enumerate(text.splitlines()) if line.startswith("time ")]
    assert headers == [0, 21, 42]


def test_what_has_no_numbers_is_said() -> None:
    lines = Lines(_ALL, _console())
    assert _text(lines, seen()).endswith(" no arenas of this user\n")
    assert " cannot look: Too many ?[31m\n" in _text(lines, seen(), "Too many \x1b[31m")
    text = _text(lines, seen(unreadable("worse", HOSTILE)))
    assert " cannot be read: " in text
    assert text.count("\n") == 2
    assert not re.search(r"[^\n -~]", text)
    one = Lines(View("kv", _ALL.draw), _console())
    assert _text(one, seen()).endswith(" kv is not there\n")
    assert _text(one, seen(arena("kv"))).splitlines()[1].split()[2:4] == ["kv", "0.0%"]


def test_a_view_is_drawn_whole_each_time() -> None:
    lines = Lines(View(None, lambda found: Text(f"{len(found.infos)} drawn"), shares=True), _console())
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW))
    assert _text(lines, seen(arena("kv"))) == f"{when}\n1 drawn\n\n"
