"""What ``shmcache-cleanup`` is going to do with each arena, and why; and how that looks.

Pure: takes what one look at an arena gave, touches none.  Every string that came out of an arena or ``/proc``
passes ``printable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from shmcache.stats import ArenaInfo, LaneInfo, ReapReport
from shmcache_tools.text import age_text, count_text, make_table, plural, printable, size_text

#: What is done with an arena.
DESTROY, REAP, KEEP, REFUSE = "destroy", "reap", "keep", "refuse"

_STYLES = {DESTROY: "bold red", REAP: "yellow", KEEP: "green", REFUSE: "green"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be done with one arena. ``REFUSE`` keeps it, too, though it should have been done away with."""

    info: ArenaInfo
    deed: str
    why: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def does_something(self) -> bool:
        return self.deed in {DESTROY, REAP}

    def reason(self, *, brief: bool = False) -> str:
        """All reasons in one line, or the first alone."""
        return self.why[0] if brief else "; ".join(self.why)


def plan_to_destroy(info: ArenaInfo, now: float, *, force: bool) -> Plan:
    """Nobody may be attached, and it must be readable, so that this is known; unless by force."""
    if info.stale:
        return Plan(info, DESTROY, _why_stale(info, now))
    lanes = live_lanes(info)
    if lanes:
        held = sum(lane.held for lane in lanes)
        why = (f"{plural(len(lanes), 'live lane')}, {plural(held, 'held share')}", *map(_who, lanes))
        remedy = "stop what is attached first, or pass --force"
    else:
        why = (f"cannot be read: {printable(info.problem or '')}",)
        remedy = "pass --force to destroy it nevertheless"
    return Plan(info, DESTROY, why) if force else Plan(info, REFUSE, (*why, remedy))


def plan_to_reap(info: ArenaInfo) -> Plan:
    """Only what dead lanes left."""
    if info.problem is not None:
        return Plan(info, REFUSE, (f"cannot be read: {printable(info.problem)}",))
    dead = _lanes(info, "dead")
    report = _left_by(info, dead)
    if report == ReapReport():
        return Plan(info, KEEP, ("no dead lanes: nothing to reap",))
    return Plan(info, REAP, (reap_text(report), *map(_who, dead)))


def live_lanes(info: ArenaInfo) -> list[LaneInfo]:
    return _lanes(info, "alive")


def reap_text(report: ReapReport) -> str:
    """What a reap takes back, or took back."""
    parts = [
        plural(report.lanes, "dead lane"),
        plural(report.shares, "share"),
        plural(report.writes, "half-written object"),
    ]
    return ", ".join(parts) + (", the arena lock" if report.lock else "")


def plans_table(plans: Sequence[Plan], *, piped: bool) -> Table:
    """A line an arena; on a terminal more where there is more to say of it."""
    numbers = ("size", "objects")
    table = make_table("arena", *numbers, "what", "why", right=numbers)
    for plan in plans:
        info = plan.info
        table.add_row(
            printable(info.name),
            size_text(info.segment_bytes),
            count_text(info.stats.objects) if info.stats else "-",
            Text(KEEP if plan.deed == REFUSE else plan.deed, style=_STYLES[plan.deed]),
            plan.reason() if piped else "\n".join(plan.why),
        )
    return table


def _why_stale(info: ArenaInfo, now: float) -> tuple[str, ...]:
    if info.old:
        return ("stale: made before the last boot",)
    dead = _lanes(info, "dead")
    why = (f"stale: nobody is attached; created {age_text(now - info.created)} ago",)
    return (*why, f"left in it: {reap_text(_left_by(info, dead))}", *map(_who, dead)) if dead else why


def _who(lane: LaneInfo) -> str:
    """Who sits in a lane, or sat there, in few words."""
    who = f"pid {lane.pid} {printable(lane.command)}"
    if lane.group:
        who += f", {'controller' if lane.rank is None else f'rank {lane.rank}'} of {printable(lane.group)}"
    return f"{who}, stopped" if lane.stopped else who


def _lanes(info: ArenaInfo, state: str) -> list[LaneInfo]:
    """Its lanes in that state; of each group the controllers first, then by rank."""
    lanes = [lane for lane in info.lanes if lane.state == state]
    return sorted(lanes, key=lambda lane: (lane.group, -1 if lane.rank is None else lane.rank))


def _left_by(info: ArenaInfo, dead: Sequence[LaneInfo]) -> ReapReport:
    return ReapReport(
        lanes=len(dead),
        shares=sum(lane.reserved + lane.held for lane in dead),
        writes=sum(lane.writing for lane in dead),
        lock=info.lock is not None and not info.lock.alive,
    )
