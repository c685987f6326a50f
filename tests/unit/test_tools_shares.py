"""Who holds what, since when: the leak hunter's view, from ``ArenaInfo`` made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from seen_support import NOW, arena, busy, check_golden, draw, hostile, huge, lane, rows, seen, stale, unreadable

from shmcache.stats import ShareInfo
from shmcache_tools.look import Seen
from shmcache_tools.stat.shares_view import key_text, shares_table

_WIDTHS = (80, 500)


def _several() -> Seen:
    leak = [ShareInfo("held", 0, b"leak-%04d" % number, 4096, 1, NOW - 9000 + number) for number in range(100)]
    gone = arena("gone", lanes=[lane(0, state="dead", group="engine-1")], shares=(leak[0],))
    leaky = arena("leaky", lanes=[lane(0, command="leaker")], shares=tuple(leak))
    return seen(busy(), leaky, gone, stale("left"), unreadable("bad", "why"))


def _shown(*shares: ShareInfo, limit: int | None = None) -> str:
    return draw(shares_table(seen(arena("engine", lanes=[lane(0), lane(1)], shares=shares)), limit))


def _keys(text: str, keys: Sequence[bytes]) -> list[bytes]:
    """Which of the keys are shown, in that order."""
    listed = text[text.index("kind") :]
    places = {key: listed.find(f" {key.decode()} ") for key in keys}
    return sorted((key for key in keys if places[key] >= 0), key=places.__getitem__)


@pytest.mark.parametrize("width", _WIDTHS)
def test_golden_shares_of_one_arena(width: int) -> None:
    check_golden(f"shares-{width}.txt", draw(shares_table(seen(busy()), None), width))


@pytest.mark.parametrize("width", _WIDTHS)
def test_golden_shares_of_several_arenas(width: int) -> None:
    check_golden(f"shares-several-{width}.txt", draw(shares_table(_several(), 12), width))


def test_golden_shares_of_other_kinds() -> None:
    check_golden("shares-80.ansi", draw(shares_table(seen(busy()), None), 80, colour=True))
    check_golden("shares-huge-80.txt", draw(shares_table(seen(huge()), 5), 80))
    check_golden("shares-hostile-80.txt", draw(shares_table(seen(hostile()), None), 80))


def test_no_shares() -> None:
    for nothing in (seen(), seen(arena("engine", lanes=[lane(0)], shares=()))):
        assert draw(shares_table(nothing, None)) == "no shares\n"


def test_an_unreadable_arena_is_told() -> None:
    text = draw(shares_table(seen(unreadable("bad", "why")), None))
    assert "no shares" in text
    assert "bad cannot be read: why" in text


def test_what_only_its_holder_ends_comes_first_and_longest_first() -> None:
    shares = (
        ShareInfo("reserved", 0, b"reserved-old", 10, 1, NOW - 500),
        ShareInfo("held", 0, b"held-young", 10, 1, NOW - 5),
        ShareInfo("writing", 0, b"written", 10, 1, NOW - 50),
        ShareInfo("held", 1, b"held-old", 10, 1, NOW - 100),
        ShareInfo("reserved", 0, b"reserved-young", 10, 1, NOW - 299),
    )
    text = _shown(*shares)
    order = [b"held-old", b"written", b"held-young", b"reserved-old", b"reserved-young"]
    assert _keys(text, order) == order
    assert "1 reserved share past the read lease" in text


def test_arenas_are_merged() -> None:
    text = draw(shares_table(_several(), 4))
    last = [line for line in rows(text) if " held 2 h " in line]
    assert [line.split()[0] for line in last] == ["gone", "leaky", "leaky", "leaky"]
    assert "109 more shares; --limit 0 shows all" in text
    assert "arena" not in draw(shares_table(seen(busy()), None)).splitlines()[0]


def test_a_holder_is_one_line_with_what_it_keeps() -> None:
    shares = (
        ShareInfo("held", 0, b"a", 100, 3, NOW - 70),
        ShareInfo("held", 0, b"b", 1000, 1, NOW - 60),
        ShareInfo("reserved", 0, b"a", 100, 1, NOW - 5),
        ShareInfo("writing", 1, b"c", 10, 1, NOW - 5),
    )
    lines = rows(_shown(*shares))
    assert lines[:3] == [
        "lane group rank pid command state held writing reserved bytes oldest",
        "0 engine-0 0 4000 python alive 2 0 1 1.1 KiB 1 min 10 s",
        "1 engine-0 1 4001 python alive 0 1 0 10 B 5 s",
    ]
    assert lines[4] == "kind age key size count lane group rank pid command state"
    assert lines[5] == "held 1 min 10 s a 100 B 3 0 engine-0 0 4000 python alive"


@pytest.mark.parametrize(("limit", "shown"), [(None, 40), (7, 7), (100, 100), (101, 100), (0, 100)])
def test_limit(limit: int | None, shown: int) -> None:
    shares = tuple(ShareInfo("held", 0, b"key-%d" % number, 10, 1, NOW - 100 + number) for number in range(100))
    text = _shown(*shares, limit=limit)
    assert _keys(text, [share.key for share in shares]) == [share.key for share in shares[:shown]]
    assert (f"{100 - shown} more shares; --limit 0 shows all" in text) is (shown < 100)
    assert "more share" not in _shown(*shares[:shown], limit=limit)


def test_holders_are_limited_too() -> None:
    lanes = [lane(number) for number in range(3)]
    shares = tuple(ShareInfo("held", number, b"key", 10, 1, NOW - number) for number in range(3))
    text = draw(shares_table(seen(arena("engine", lanes=lanes, shares=shares)), 2))
    assert "1 more holder; --limit 0 shows all" in text


def test_what_helps_against_the_holder() -> None:
    text = draw(shares_table(seen(busy()), None))
    assert "shmcache-cleanup --reap engine\n" in text
    assert "kill -CONT 4003\n" in text
    assert "to end a holder: kill PID" in text
    dead = arena("engine", lanes=[lane(0, state="dead"), lane(1)], shares=(ShareInfo("held", 0, b"a", 1, 1, NOW),))
    text = draw(shares_table(seen(dead), None))
    assert "kill" not in text
    assert "shmcache-cleanup --reap engine\n" in text


def test_what_is_idle_elsewhere_is_no_remark_here() -> None:
    assert "left" not in draw(shares_table(_several(), None))


def test_a_share_of_a_lane_that_went_away_meanwhile() -> None:
    share = ShareInfo("held", 200, b"key", 10, 1, NOW - 1)
    assert "held 1 s key 10 B 1 200 - - - - -" in rows(_shown(share))


def test_keys() -> None:
    assert key_text(b"layer.0/chunk-7~") == "layer.0/chunk-7~"
    assert key_text(b"a b") == "0x612062"
    assert key_text(b"\x00\xff") == "0x00ff"
    assert key_text("é".encode()) == "0xc3a9"
    assert key_text(b"\x1b[2J") == "0x1b5b324a"


def test_keys_are_whole_when_piped_and_have_two_ends_on_a_terminal() -> None:
    key = bytes(range(64))
    view = shares_table(seen(arena("a", lanes=[lane(0)], shares=(ShareInfo("held", 0, key, 1, 1, NOW),))), None)
    assert f" 0x{key.hex()} " in draw(view)
    (cut,) = [line for line in draw(view, 80).splitlines() if "0x00" in line]
    shown = next(word for word in cut.split() if word.startswith("0x"))
    left, right = shown.split("…")
    assert f"0x{key.hex()}".startswith(left)
    assert key.hex().endswith(right)
    assert min(len(left), len(right)) >= 7
    assert len(cut) <= 80


@pytest.mark.parametrize("width", [80, 100, 500])
def test_no_text_commands_the_terminal(width: int) -> None:
    view = shares_table(seen(hostile(), replace(hostile(), problem="\x1b[2J")), None)
    assert all(char.isprintable() for char in draw(view, width).replace("\n", ""))
    assert "\x1b]" not in draw(view, width, colour=True)


@pytest.mark.parametrize("width", range(1, 80, 7))
def test_no_width_is_too_small(width: int) -> None:
    for some in (_several(), seen(huge()), seen(hostile())):
        assert draw(shares_table(some, 3), width)
