"""What somebody should do about an arena, if anything, with the command that does it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from shmcache.stats import ArenaInfo, LaneInfo, RegionInfo
from shmcache_tools.text import plural, printable, size_text

_INDENT: Final = "  "
_MOST_PIDS: Final = 8  #: in one command


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence and its command, which stays in one piece for a shell: it is there to be copied."""

    sentence: str
    command: str
    style: str = "yellow"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if cell_len(self.sentence) + 2 + cell_len(self.command) <= width:
            yield Text.assemble((f"{self.sentence}: ", self.style), (self.command, "bold"))
            return
        yield Text(f"{self.sentence}:", style=self.style)
        if len(_INDENT) + cell_len(self.command) <= width:
            yield Text(_INDENT + self.command, style="bold")
        else:
            *words, last = self.command.split(" ")
            yield Text(f"{_INDENT}{' '.join(words)} \\\n{_INDENT}{last}", style="bold", overflow="fold")


def remarks_of(infos: Iterable[ArenaInfo]) -> list[Remark]:
    """What is to be done about these arenas; what is merely stale comes last."""
    ordered = sorted(infos, key=lambda info: info.stale)
    found = [remark for info in ordered for remark in _remarks(info)]
    if sum(info.stale for info in ordered) > 1:
        found.append(Remark("to remove all that are stale", "shmcache-cleanup --stale"))
    return found


def _remarks(info: ArenaInfo) -> list[Remark]:
    """What is to be done about one arena."""
    name = printable(info.name)
    if info.stale:
        why = "was made before the last boot" if info.old else "is stale, nobody is attached"
        return [Remark(f"{name} {why}; to remove it", _cleanup("", name))]
    if info.problem is not None:
        return [_unreadable(name, printable(info.problem))]
    found: list[Remark] = []
    if info.stats is not None and info.stats.lanes_dead:
        kept = f", and {size_text(info.stats.dead_bytes)} kept by the dead only" if info.stats.dead_bytes else ""
        dead = f"{name} has {plural(info.stats.lanes_dead, 'dead lane')}{kept}"
        found.append(Remark(f"{dead}; to reap", _cleanup("--reap", name), "red"))
    found += _stopped(name, [lane for lane in info.lanes if lane.stopped])
    return found + [remark for region in info.regions if region.state == "lost" for remark in _lost(info, region, name)]


def _unreadable(name: str, problem: str) -> Remark:
    command = _cleanup("--force", name)
    why = problem.removesuffix(command).rstrip()  # most problems tell it themselves
    if not why.endswith((" remove it", " with")):
        why += "; to remove it, if nobody uses it"
    return Remark(f"{name} cannot be read: {why}", command, "red")


def _stopped(name: str, lanes: list[LaneInfo]) -> list[Remark]:
    """A stopped process keeps what it has, be it the arena lock."""
    if not lanes:
        return []
    pids = " ".join(str(lane.pid) for lane in lanes[:_MOST_PIDS])
    more = f" ({_MOST_PIDS} of them here)" if len(lanes) > _MOST_PIDS else ""
    return [
        Remark(f"{name} has {plural(len(lanes), 'stopped lane')}{more}; to continue", f"kill -CONT {pids}"),
        Remark("or to end, and then reap", f"kill -KILL {pids}"),
    ]


def _lost(info: ArenaInfo, region: RegionInfo, name: str) -> Iterator[Remark]:
    """Who keeps a region whose owner is gone. Where nobody does, it goes as soon as somebody reaps."""
    sharers = {share.lane for share in info.shares or () if share.region == region.number}
    keepers = [lane for lane in info.lanes if lane.state == "alive" and lane.index in sharers.union(region.opened)]
    lost = f"region {region.number} of {name} is lost, but kept by {_lanes_text(keepers) if keepers else 'shares'}"
    if region.opened:
        lost += f" ({size_text(region.capacity)} of its GPU stays taken while it is open)"
    # Of what may be only the dead's there is no more to say yet than that it is to be reaped.
    kept = keepers or (region.used_bytes and not (info.stats and info.stats.lanes_dead))
    if info.shares is None and kept:
        yield Remark(f"{lost}; to see whose shares", _command("shmcache-stat", name, "--shares"), "red")
    elif keepers:
        pids = " ".join(str(lane.pid) for lane in keepers[:_MOST_PIDS])
        yield Remark(f"{lost}; to end who does not let go", f"kill {pids}", "red")


def _lanes_text(lanes: list[LaneInfo]) -> str:
    """A few lanes by number, many by their count."""
    if len(lanes) > _MOST_PIDS:
        return plural(len(lanes), "lane")
    return f"lane{'s' if len(lanes) > 1 else ''} {', '.join(str(lane.index) for lane in lanes)}"


def _cleanup(option: str, name: str) -> str:
    return _command("shmcache-cleanup", name, option)


def _command(program: str, name: str, option: str) -> str:
    """The command, ready for a shell: a name may begin with a dash."""
    return shlex.join([program, *([option] if option else []), *(["--"] if name.startswith("-") else []), name])
