"""Arenas made by hand with fixed times, how views of them are drawn, and the files that say how they must look.

``SHMCACHE_GOLDEN=write pytest tests/unit`` writes those files anew: look at the difference before it is committed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console, RenderableType
from rich.style import Style

from shmcache.stats import (
    ArenaInfo,
    Counters,
    Gauges,
    Histogram,
    Histograms,
    LaneInfo,
    LockInfo,
    ObjectInfo,
    RegionInfo,
    ShareInfo,
    Stats,
)
from shmcache_tools.look import Seen
from shmcache_tools.rates import Rates
from shmcache_tools.text import PIPED_WIDTH

CREATED: Final = 1_700_000_000.0
NOW: Final = CREATED + 3 * 3600 + 120
#: What must never reach a terminal: a title, a colour, a line break, a bell, a C1 control, text that runs backwards.
HOSTILE: Final = "\x1b]0;owned\x07\x1b[31m\nx\r\x00\x9b2J\u202eevil\udcff[red]"

_GOLDEN: Final = Path(__file__).parent / "unit" / "golden"
_WRITE: Final = os.environ.get("SHMCACHE_GOLDEN") == "write"


def draw(what: RenderableType, width: int = PIPED_WIDTH, *, colour: bool = False) -> str:
    """As a terminal of that width shows it: in 256 colours, or without any."""
    out = io.StringIO()
    system: Literal["256"] | None = "256" if colour else None
    console = Console(
        file=out,
        width=width,
        markup=False,
        highlight=False,
        color_system=system,
        force_terminal=colour,
        no_color=not colour,
    )
    for cached in (
        Style.parse,
        Style._add,
    ):  # rich's styles keep the codes of the terminal that they were first used on
        cached.cache_clear()
    console.print(what)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().split("\n")[:-1])


def check_golden(name: str, text: str) -> None:
    """``text`` is what the file ``name`` holds. AssertionError tells how to write it anew."""
    path = _GOLDEN / name
    if _WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    expected = path.read_bytes().decode() if path.exists() else ""
    assert text == expected, f"{path} differs; if it is meant to: SHMCACHE_GOLDEN=write pytest tests/unit"


def rows(text: str) -> list[str]:
    """The lines, with one space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def row(text: str, first: str) -> str:
    """The line that begins with the words ``first``."""
    (found,) = [line for line in rows(text) if line.startswith(f"{first} ")]
    return found


def seen(*infos: ArenaInfo, rates: dict[str, Rates] | None = None) -> Seen:
    """What a look found at ``NOW``."""
    return Seen(infos, rates or {}, NOW, 1000.0)


def lane(index: int, **fields: Any) -> LaneInfo:
    """A rank of ``engine-0`` that is alive and does nothing."""
    made = LaneInfo(
        index=index,
        role="rank",
        state="alive",
        group="engine-0",
        rank=index,
        world_size=4,
        incarnation=1,
        pid=4000 + index,
        command="python",
        started=CREATED,
        reserved=0,
        held=0,
        writing=0,
        counters=Counters(),
    )
    return replace(made, **fields)


def arena(name: str, stats: Stats | None = None, lanes: Sequence[LaneInfo] = (), **fields: Any) -> ArenaInfo:
    """An arena of 512 MiB that nobody has used yet; ``stats`` tells how many lanes are alive and dead, too."""
    stats = stats or Stats(
        capacity=512 * 2**20,
        block_size=65536,
        used_bytes=0,
        resident_bytes=2 * 2**20,
        slots=8192,
        objects=0,
        writing=0,
        reserved=0,
        held=0,
        lanes_alive=sum(one.state == "alive" for one in lanes),
        lanes_dead=sum(one.state == "dead" for one in lanes),
        counters=Counters(),
    )
    made = ArenaInfo(
        name=name,
        path=f"/dev/shm/shmcache.0.{name}",  # noqa: S108 # a text, not a file that is opened
        segment_bytes=520 * 2**20,
        inode=7,
        fingerprint="llama-8b/bf16/v1",
        created=CREATED,
        read_lease_s=300.0,
        write_lease_s=600.0,
        eviction_window_s=180.0,
        lock_timeout_s=5.0,
        lane_limit=64,
        layouts=1,
        stats=stats,
        lanes=tuple(lanes),
    )
    return replace(made, **fields)


def stale(name: str) -> ArenaInfo:
    """An arena that nobody is attached to."""
    return arena(name)


def unreadable(name: str, problem: str) -> ArenaInfo:
    return ArenaInfo(name, f"/dev/shm/shmcache.0.{name}", 4096, problem=problem, inode=9)  # noqa: S108


def busy() -> ArenaInfo:
    """An arena where everything that can be shown is there to see: lanes that live, are stopped, are dead."""
    lanes = (
        lane(0, role="controller", rank=None, pid=3999, command="scheduler", writing=3),
        lane(1, held=30, held_bytes=30 * 2**20, oldest_held=NOW - 75, incarnation=2),
        lane(2, held=4, held_bytes=2**22, oldest_held=NOW - 7300, reserved=12, state="dead", incarnation=5),
        lane(3, held=1, held_bytes=2**20, oldest_held=NOW - 4000, stopped=True),
        lane(4, role="private", group="", rank=None, command="notebook", started=NOW - 30),
        lane(5, state="vacant", pid=0, command="", started=0.0),
    )
    counters = Counters(
        read_hits=3_000_000,
        read_misses=1_000_000,
        publishes=12_345,
        published_bytes=5 * 10**10,
        evictions=7777,
        evicted_bytes=3 * 2**34,
        no_space=12,
        prefetch_requests=3,
        prefetch_keys=20,
        prefetch_l1_hits=5,
        prefetch_l2_hits=10,
        l2_loads=11,
        l2_loaded_bytes=123_456_789,
        l2_damaged=1,
    )
    stats = Stats(
        capacity=512 * 2**20,
        block_size=65536,
        used_bytes=256 * 2**20,
        resident_bytes=300 * 2**20,
        slots=8192,
        objects=4096,
        writing=3,
        reserved=12,
        held=35,
        lanes_alive=4,
        lanes_dead=1,
        counters=counters,
        groups=1,
        ready_bytes=200 * 2**20,
        reserved_bytes=16 * 2**20,
        writing_bytes=3 * 2**20,
        held_bytes=33 * 2**20,
        dead_bytes=4 * 2**20,
        gauges=Gauges(prefetch_queued=2, prefetch_in_flight=1, l2_backlog_bytes=2**21),
        histograms=Histograms(l2_load=Histogram(0.5, (0, 98, *[0] * 20, 1))),
    )
    lock = LockInfo(lane=2, incarnation=5, pid=4002, alive=False)
    return arena("engine", stats, lanes, lock=lock, shares=_shares(), objects=_objects())


def busy_rates() -> dict[str, Rates]:
    """What went on in ``busy`` within two seconds."""
    stats = busy().stats
    assert stats is not None
    after = stats.counters
    before = replace(after, read_hits=after.read_hits - 2000, read_misses=after.read_misses - 20, evictions=7767)
    return {"engine": Rates(2.0, before, after)}


def _shares() -> tuple[ShareInfo, ...]:
    found = [
        *(ShareInfo("held", 2, b"prompt-%03d" % number, 2**20, 1, NOW - 7300 + number) for number in range(3)),
        ShareInfo("reserved", 2, b"prompt-000", 2**20, 12, NOW - 7200),
        ShareInfo("held", 3, bytes(range(32)), 2**20, 1, NOW - 4000),
        *(ShareInfo("held", 1, b"step-%d" % number, 2**20, 1 + number, NOW - 75) for number in range(5)),
        ShareInfo("writing", 0, b"\x1b[2J new", 1000, 1, NOW - 61),
        ShareInfo("reserved", 1, b"step-6", 2**20, 1, NOW - 2),
    ]
    return tuple(sorted(found, key=lambda share: share.since))


def _objects() -> tuple[ObjectInfo, ...]:
    return (
        ObjectInfo(b"prompt-000", 2**20, 0, 16, "dead", NOW - 9000, 0, 12, 1),
        ObjectInfo(bytes(range(32)), 2**20, 16, 16, "held", NOW - 9000, 0, 0, 1),
        ObjectInfo(b"\x1b[2J new", 1000, 32, 1, "writing", NOW - 61, 0, 0, 0),
    )


def huge() -> ArenaInfo:
    """The largest numbers and the longest texts that there can be."""
    lanes = [
        lane(
            number,
            group="group-" + "g" * 58,
            rank=number,
            pid=4_194_304,
            command="c" * 24,
            incarnation=2**32 - 1,
            reserved=2**20 * 3,
            held=2**20,
            held_bytes=2**42,
            writing=2**20,
            oldest_held=CREATED,
            started=NOW - 400 * 86400,
        )
        for number in range(256)
    ]
    counters = Counters(**dict.fromkeys(Counters.__slots__, 2**64 - 1))
    stats = Stats(
        capacity=2**44,
        block_size=2**30,
        used_bytes=2**44 - 2**30,
        resident_bytes=2**44 + 2**39,
        slots=2**20,
        objects=2**20,
        writing=2**20,
        reserved=3 * 2**28,
        held=2**28,
        lanes_alive=256,
        lanes_dead=0,
        counters=counters,
        groups=256,
        held_bytes=2**44 - 2**30,
    )
    shares = tuple(ShareInfo("held", n % 256, n.to_bytes(64, "big"), 2**40, 2**16, CREATED + n) for n in range(100))
    name = "kv-" + "n" * 58 + "-01"
    return arena(name, stats, lanes, segment_bytes=2**44 + 2**39, lane_limit=256, layouts=64, shares=shares)


def hostile() -> ArenaInfo:
    """An arena all of whose texts are meant to do harm."""
    lanes = [lane(1, group=HOSTILE, command=HOSTILE, held=1, oldest_held=NOW - 9)]
    lanes += [lane(2, group=HOSTILE, command=HOSTILE, state="dead"), lane(3, stopped=True)]
    shares: tuple[ShareInfo, ...] = (ShareInfo("held", 1, HOSTILE.encode(errors="replace"), 10, 1, NOW - 9),)
    shares += (ShareInfo("held", 99, b"of no lane", 10, 1, NOW + 100),)
    regions = (region(1, uuid=HOSTILE, opened=(1, 200)), region(2, uuid=HOSTILE, state=HOSTILE, owner=99, capacity=0))
    made = arena(HOSTILE, None, lanes, path=HOSTILE, fingerprint=HOSTILE, shares=shares)
    return replace(made, regions=regions, region_limit=2)


def region(number: int, **fields: Any) -> RegionInfo:
    """1 GiB of the first GPU that lane 1 has allocated, a quarter of it used."""
    made = RegionInfo(
        number=number,
        state="live",
        owner=1,
        device=0,
        uuid=f"GPU-{number:08x}-84ba-6c97-c49f-cf006933a4ac",
        capacity=2**30,
        used_bytes=2**28,
        block_size=65536,
        incarnation=1,
    )
    return replace(made, **fields)


def with_gpus() -> ArenaInfo:
    """``busy``, with regions that are in use, empty, and lost in all ways, and with lanes that have page-locked it."""
    regions = (
        region(1, opened=(2, 3, 4), incarnation=2),
        region(2, owner=3, device=1, used_bytes=0, capacity=24 * 2**30, block_size=2**20),
        # its owner is dead, not yet reaped
        region(3, owner=2, incarnation=5, device=2, state="lost", used_bytes=2**20, opened=(1,)),
        # another is in its owner's lane by now
        region(4, owner=0, state="lost", capacity=3 * 2**29, used_bytes=2**21),
    )
    made = busy()
    pinned = {1: 512 * 2**20, 4: 2**20}
    lanes = [replace(one, gauges=Gauges(pinned_bytes=pinned.get(one.index, 0))) for one in made.lanes]
    lanes[0] = replace(lanes[0], incarnation=2)
    shares = (
        *(made.shares or ()),
        ShareInfo("held", 1, b"on-the-gpu", 2**20, 1, NOW - 50, region=1),
        ShareInfo("held", 4, b"lost", 2**20, 1, NOW - 40, region=4),
        ShareInfo("writing", 3, b"new on the gpu", 2**20, 1, NOW - 3, region=2),
    )
    objects = (
        *(made.objects or ()),
        ObjectInfo(b"on-the-gpu", 2**20, 0, 16, "held", NOW - 100, 1, 0, 1, region=1),
        ObjectInfo(b"ready-there", 2**28, 1024, 4096, "ready", NOW - 1000, 1, 0, 0, region=1),
        ObjectInfo(b"new on the gpu", 2**20, 5, 1, "writing", NOW - 3, 3, 0, 0, region=2),
        ObjectInfo(b"lost", 2**20, 100, 16, "held", NOW - 100, 0, 0, 1, region=4),
        ObjectInfo(b"nowhere", 2**20, 0, 16, "held", NOW - 100, 0, 0, 1, region=7),
    )
    return replace(made, lanes=tuple(lanes), regions=regions, region_limit=8, shares=shares, objects=objects)


def huge_gpus() -> ArenaInfo:
    """``huge``, with as many and as large regions as there can be, open everywhere and in every second lane."""
    regions = tuple(
        region(
            number,
            owner=255 - number,
            incarnation=2**32 - 1,
            device=2**32 - 1,
            uuid="GPU-" + "f" * 32,
            state="live" if number % 2 else "lost",
            capacity=2**31 * 2**50,
            used_bytes=2**31 * 2**50 - 1,
            block_size=2**50,
            opened=tuple(range(0, 256, 1 + number % 2)),
        )
        for number in range(1, 32)
    )
    lanes = tuple(replace(one, gauges=Gauges(pinned_bytes=2**44)) for one in huge().lanes)
    return replace(huge(), regions=regions, region_limit=31, lanes=lanes, objects=())
