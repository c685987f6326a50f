"""What people see of arenas, from ``ArenaInfo`` built by hand."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from shmcache.stats import ArenaInfo, Counters, Gauges, Histogram, Histograms, LaneInfo, LockInfo, Stats
from shmcache_tools.render import arena_in_full, arenas_table, lane_text, shares_table
from shmcache_tools.stat import JSON_SCHEMA, json_document
from shmcache_tools.text import make_console

_CREATED = 1_700_000_000.0
_NOW = _CREATED + 3 * 3600 + 120


def _lane(index: int, **fields: object) -> LaneInfo:
    lane = LaneInfo(
        index=index,
        role="rank",
        state="alive",
        group="engine-0",
        rank=index,
        world_size=4,
        incarnation=1,
        pid=4000 + index,
        command="python",
        started=_CREATED,
        reserved=0,
        held=0,
        writing=0,
        counters=Counters(),
    )
    return replace(lane, **fields)  # type: ignore[arg-type]


def _arena(name: str = "engine", **fields: object) -> ArenaInfo:
    stats = Stats(
        capacity=512 * 2**20,
        block_size=65536,
        used_bytes=256 * 2**20,
        resident_bytes=300 * 2**20,
        slots=8192,
        objects=4096,
        writing=3,
        reserved=12,
        held=34,
        lanes_alive=2,
        lanes_dead=1,
        counters=Counters(read_hits=3, read_misses=1, evictions=7777),
    )
    lanes = (
        _lane(0, role="controller", rank=None),
        _lane(1, held=30, writing=3),
        _lane(2, state="dead", held=4, reserved=12, incarnation=5),
        _lane(3, state="vacant", pid=0, command=""),
    )
    info = ArenaInfo(
        name=name,
        path=f"/dev/shm/shmcache.0.{name}",  # noqa: S108 # a text, not a file that is opened
        segment_bytes=520 * 2**20,
        fingerprint="llama-8b",
        created=_CREATED,
        read_lease_s=300.0,
        write_lease_s=600.0,
        lock_timeout_s=5.0,
        lane_limit=64,
        layouts=1,
        stats=stats,
        lanes=lanes,
    )
    return replace(info, **fields)  # type: ignore[arg-type]


def _damaged() -> ArenaInfo:
    return ArenaInfo("bad", "/dev/shm/shmcache.0.bad", 4096, problem="no arena: wrong magic \x1b[2J")  # noqa: S108


def _plain(what: RenderableType) -> str:
    out = io.StringIO()
    make_console(out).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _rows(text: str) -> list[str]:
    """The lines, with one space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def _row(text: str, first: str) -> str:
    """The line that begins with the word ``first``."""
    (row,) = [row for row in _rows(text) if row.startswith(f"{first} ")]
    return row


def test_no_arenas() -> None:
    assert _plain(arenas_table([], _NOW)) == "no arenas of this user"


def test_one_line_an_arena() -> None:
    text = _plain(arenas_table([_arena(), _arena("other")], _NOW))
    assert "engine 512 MiB 50.0 % 4,096 2 1 12 34 75.0 % 3 h 2 min in use" in _rows(text)
    assert "engine has 1 dead lane; to reap: shmcache-cleanup --reap engine" in text


def test_a_stale_arena_names_the_command_that_removes_it() -> None:
    lanes = tuple(replace(lane, state="dead") for lane in _arena().lanes)
    text = _plain(arenas_table([_arena(lanes=lanes)], _NOW))
    assert "stale" in text
    assert "to remove it: shmcache-cleanup engine" in text


def test_a_damaged_arena_is_one_line_and_its_problem() -> None:
    text = _plain(arenas_table([_damaged(), _arena()], _NOW))
    assert "bad - - - - - - - - - unreadable" in _rows(text)
    assert "bad cannot be read: no arena: wrong magic ?[2J" in text
    full = _plain(arena_in_full(_damaged(), _NOW))
    assert "unreadable" in full
    assert "wrong magic ?[2J" in full


def test_an_arena_in_full() -> None:
    lock = LockInfo(lane=2, incarnation=5, pid=4002, alive=False)
    text = _plain(arena_in_full(_arena(lock=lock), _NOW))
    for part in (
        "3 h 2 min ago",
        "256 MiB, 50.0 %",
        "4,096 readable, 3 being written, at most 8,192",
        "12 reserved, 34 held",
        "75.0 % of the keys asked of read",
        "held by lane 2, incarnation 5, pid 4002 (dead)",
        "read 300 s, write 600 s; lock timeout 5 s",
        "llama-8b",
    ):
        assert part in text
    assert _row(text, "0") == "0 controller engine-0 - 4000 python alive 1 0 0 0"
    assert _row(text, "2") == "2 rank engine-0 2 4002 python dead 5 12 4 0"
    assert "61 lanes of 64 vacant" in text
    assert "7,777" in text


def test_every_counter_is_shown() -> None:
    counters = Counters(*range(1001, 1001 + len(Counters.__slots__)))
    stats = _arena().stats
    assert stats is not None
    text = _plain(arena_in_full(_arena(stats=replace(stats, counters=counters)), _NOW))
    for name in Counters.__slots__:
        assert f"{name.replace('_', ' ')} " in text
        assert f"{getattr(counters, name):,}" in text


def test_times_are_shown_where_there_are_any() -> None:
    stats = _arena().stats
    assert stats is not None
    assert "p99" not in _plain(arena_in_full(_arena(stats=stats), _NOW))
    load = Histogram(0.5, (0, 98, *[0] * 20, 1))  # 98 of at most 32 us, and one of more than 33 s
    text = _plain(arena_in_full(_arena(stats=replace(stats, histograms=Histograms(l2_load=load))), _NOW))
    assert _row(text, "l2") == "l2 load 99 5.05 ms 32 us above 33.6 s"
    assert load.quantile_s(0.98) == 32e-6
    assert Histogram().quantile_s(0.5) is None


def test_prefetches_and_l2_are_told_in_words_once_there_are_any() -> None:
    stats = _arena().stats
    assert stats is not None
    assert "prefetch  " not in _plain(arena_in_full(_arena(stats=stats), _NOW)).split("lookup hits", maxsplit=1)[0]
    counters = Counters(prefetch_requests=3, prefetch_keys=20, prefetch_l1_hits=5, prefetch_l2_hits=10, l2_loads=11)
    busy = replace(stats, counters=counters, gauges=Gauges(prefetch_queued=2, prefetch_in_flight=1))
    text = _plain(arena_in_full(_arena(stats=busy), _NOW))
    assert (
        _row(text, "prefetch")
        == "prefetch 3 requests of 20 keys: 25.0 % from L1, 50.0 % from L2; 1 in flight, 2 queued"
    )
    assert _row(text, "L2") == "L2 11 objects loaded, 0.00 GB; 0 stored, 0.00 GB; 0 failures, 0 damaged"


def test_a_vacant_lane_with_reserved_shares_is_shown() -> None:
    lanes = (_lane(0, state="vacant", pid=0, command="", reserved=9),)
    text = _plain(arena_in_full(_arena(lanes=lanes), _NOW))
    assert _row(text, "0") == "0 rank engine-0 0 - - vacant 1 9 0 0"


def test_a_private_lane_has_no_rank() -> None:
    lanes = (_lane(0, role="private", group="", rank=0),)
    text = _plain(arena_in_full(_arena(lanes=lanes), _NOW))
    assert _row(text, "0").startswith("0 private - - 4000 ")


def test_shares_are_sorted_by_held() -> None:
    assert _rows(_plain(shares_table([_arena()])))[1:] == [
        "engine 30 0 1 engine-0 1 4001 python alive",
        "engine 4 12 2 engine-0 2 4002 python dead",
    ]
    assert _plain(shares_table([])) == "no shares"


def test_a_command_cannot_command_the_terminal() -> None:
    lane = _lane(1, command="x\x1b]0;title\x07", group="g\n[red]")
    assert lane_text(lane) == "lane 1 (rank 1 of group g?[red]): pid 4001, x?]0;title?"
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200, markup=False).print(arena_in_full(_arena(lanes=(lane,)), _NOW))
    assert "\x1b]" not in out.getvalue()


def test_json_has_a_stable_shape() -> None:
    document = json_document([_arena(), _damaged()])
    assert document["schema"] == JSON_SCHEMA == 1
    first, second = document["arenas"]
    assert set(first) == {
        *("name", "path", "segment_bytes", "problem", "old", "fingerprint", "created", "read_lease_s"),
        *("write_lease_s", "lock_timeout_s", "lane_limit", "layouts", "lock", "stats", "lanes", "stale"),
    }
    assert set(first["stats"]) == {
        *("capacity", "block_size", "used_bytes", "resident_bytes", "slots", "objects", "writing"),
        *("reserved", "held", "lanes_alive", "lanes_dead", "counters", "gauges", "histograms", "hit_rate"),
    }
    assert set(first["lanes"][0]) == {
        *("index", "role", "state", "group", "rank", "world_size", "incarnation", "pid", "command"),
        *("started", "reserved", "held", "writing", "counters", "gauges", "histograms"),
    }
    assert first["stats"]["hit_rate"] == 0.75
    assert first["stale"] is False
    assert second["stats"] is None
    assert second["problem"].startswith("no arena")
