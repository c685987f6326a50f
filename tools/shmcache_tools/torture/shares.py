"""What the history of a key says of shares: for how long its object could not go, and whether one was lost or doubled.

A held share is known exactly: its reader has it from the end of its read until it begins to release it, to close, or
is killed. A reserved share is taken by whoever claims or cancels it, which the reader that claims it cannot tell from
a fresh one. So of reserved shares this keeps the least number that there must be, for each seat:

- a grant that was answered OK adds one when it ends, if the seat's process had attached before the grant began and
  neither closes nor is killed meanwhile (what is granted to a dead rank is reaped with it);
- whatever may take one, and each takes one at most, counts as having taken one from when it begins: each read of that
  seat that was answered OK or never ended, each finish_read and cancel_read alike;
- time ends one when the read lease since its grant's beginning is over, or the seat's close or death begins. Whoever
  may have taken it counts as having taken another;
- a delete by force that was answered OK or never ended takes all, and those of grants that overlap it;
- but there never are less than none, so the count may begin anew at any moment, with 0, minus those who are at it in
  this moment, or have been while a grant was being made that is still being made. It does where that gives more.

While this number is at least 1, the object may not be removed, and a finish_read that sees nothing of it has lost it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shmcache import Status
from shmcache_tools.torture.history import NEVER, Column, Events, History
from shmcache_tools.torture.log import COLLECTIVE, FORCE, PENDING, Op
from shmcache_tools.torture.plan import Plan

_US = 1000  #: the core's clock has microseconds
_OK = int(Status.OK)
_TAKEN = (_OK, PENDING)
_PUBLISHES = (Op.PUBLISH, Op.FINISH_WRITE)


@dataclass(slots=True)
class Lives:
    """From when until when each process in a seat was attached for certain."""

    attached: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def end_of(self, begin: int, end: int) -> int | None:
        """When the process leaves that was attached all this time; None if none was."""
        i = bisect_right(self.attached, begin) - 1
        return self.left[i] if i >= 0 and self.left[i] > end else None


@dataclass(slots=True)
class Reserved:
    """The least number of reserved shares of one seat, since the count began."""

    ends: list[int] = field(default_factory=list)  #: of the shares granted since: when time ends each
    taken: int = 0  #: how many may have been taken since
    takers: list[int] = field(default_factory=list)  #: until when each who is at it may take one
    since: int = 0  #: when there was none for the last time
    pins: list[tuple[int, int]] = field(default_factory=list)  #: when there was one at least

    @property
    def least(self) -> int:
        return len(self.ends) - self.taken

    def settle(self, now: int) -> None:
        """Forgets what time has ended, and begins anew where that gives more."""
        if self.ends and self.ends[0] <= now:
            least = self.least
            if least > 0 and self.ends[least - 1] <= now:
                self.pins.append((self.since, self.ends[least - 1]))
            self.ends = [end for end in self.ends if end > now]
        if self.takers:
            self.takers = [until for until in self.takers if until >= now]
        if self.least <= -len(self.takers):
            self.ends.clear()
            self.taken = len(self.takers)

    def take(self, now: int, until: int) -> None:
        """Somebody may take one until then."""
        self.settle(now)
        if self.least == 1:
            self.pins.append((self.since, now))
        self.taken += 1
        self.takers.append(until)

    def take_all(self, now: int) -> None:
        """Somebody may take all that are there."""
        self.settle(now)
        if self.least > 0:
            self.pins.append((self.since, now))
        self.ends.clear()
        self.taken = len(self.takers)

    def grant(self, now: int, end: int) -> None:
        """One is there from now on, until ``end`` at most."""
        self.settle(now)
        if end <= now:
            return
        if self.least == 0:
            self.since = now
        insort(self.ends, end)


def lives_of(history: History) -> list[Lives]:
    """By slot."""
    records = history.records
    lives = [Lives() for _ in history.plan.seats]
    attached = np.flatnonzero((records.op == Op.ATTACH) & records.done & (records.ref == _OK))
    for i in attached:
        life = lives[records.slot[i]]
        life.attached.append(int(records.end[i]))
        life.left.append(int(records.cut[i]))
    return lives


class Shares:
    """The reserved shares of one key, in the order of time. ``audits``: by audit and slot, the least number; all keys
    add to it."""

    def __init__(self, history: History, events: Events, lives: list[Lives], audits: list[dict[int, int]]) -> None:
        self.lost: list[tuple[int, int]] = []  #: of events: a finish_read that lost one; since when one must be there
        self._plan = history.plan
        self._events = events
        self._lives = lives
        self._lease = int(history.plan.read_lease_s * 1e9) - _US
        self._forced_until = 0
        self._seats = _seats_by_rank(history.plan)
        self._reserved = {slot: Reserved() for ranks in self._seats.values() for slot in ranks.values()}
        steps = [*self._steps(), *((audit.time, _AUDIT, i) for i, audit in enumerate(history.audits))]
        self._takes_until = self._until()
        for time, kind, i in sorted(steps):
            if kind == _AUDIT:
                for slot, reserved in self._reserved.items():
                    reserved.settle(time)
                    audits[i][slot] = audits[i].get(slot, 0) + max(0, reserved.least)
            else:
                self._step(time, kind, i)
        for reserved in self._reserved.values():
            reserved.settle(NEVER)

    @property
    def pins(self) -> list[tuple[int, int]]:
        """When the object of the key could not go, since it had a reserved share."""
        return sorted(pin for reserved in self._reserved.values() for pin in reserved.pins if pin[0] < pin[1])

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        events = self._events
        ok, taken = events.status == _OK, np.isin(events.status, _TAKEN)
        # What one of several writers asks for is granted by the last of them, whenever that is.
        publishes = events.of(*_PUBLISHES) & (events.aux > 0) & (events.flags & COLLECTIVE == 0)
        grants = ok & (events.of(Op.RESERVE_READ) | publishes)
        forced = taken & events.of(Op.DELETE) & (events.flags & FORCE > 0)
        takes = taken & events.of(Op.READ, Op.FINISH_READ, Op.CANCEL_READ)
        misses = events.of(Op.FINISH_READ) & (events.status == Status.NO_SHARE)
        for kind, mask, times in (
            (_GRANT, grants, events.end),
            (_FORCE, forced, events.begin),
            (_TAKE, takes, events.begin),
            (_MISS, misses, events.end),
        ):
            at = np.flatnonzero(mask)
            yield from zip(times[at].tolist(), [kind] * len(at), at.tolist(), strict=True)

    def _until(self) -> Column:
        """By event: until when it may take a share of a grant that began before it ended."""
        events = self._events
        grants = events.where(events.of(Op.RESERVE_READ, *_PUBLISHES))
        if not len(grants):
            return events.end
        begin, end = grants.begin, np.maximum.accumulate(grants.end)  # events are sorted by their beginning
        at = np.searchsorted(begin, events.end)
        return np.maximum(events.end, np.where(at > 0, end[at - 1], 0))

    def _step(self, time: int, kind: int, i: int) -> None:
        events = self._events
        seat = self._plan.seats[events.slot[i]]
        if kind == _GRANT:
            self._grant(self._seats[seat.team], int(events.aux[i]), int(events.begin[i]), time)
        elif kind == _FORCE:
            self._forced_until = max(self._forced_until, int(events.end[i]))
            for reserved in self._reserved.values():
                reserved.take_all(time)
        elif kind == _TAKE and events.op[i] == Op.CANCEL_READ:
            for rank, slot in self._seats[seat.team].items():
                if rank < events.aux[i]:
                    self._reserved[slot].take(time, int(self._takes_until[i]))
        elif seat.granted_as is not None:
            reserved = self._reserved[seat.slot]
            if kind == _TAKE:
                reserved.take(time, int(self._takes_until[i]))
                return
            reserved.settle(time)
            if reserved.least > 0 and reserved.since < events.begin[i]:
                self.lost.append((i, reserved.since))

    def _grant(self, ranks: dict[int, int], most: int, begun: int, now: int) -> None:
        if begun < self._forced_until:
            return
        for rank, slot in ranks.items():
            left = self._lives[slot].end_of(begun, now) if rank < most else None
            if left is not None:
                self._reserved[slot].grant(now, min(left, begun + self._lease))


#: Steps at one time: those that take come first.
_FORCE, _TAKE, _MISS, _AUDIT, _GRANT = range(5)


def _seats_by_rank(plan: Plan) -> dict[str, dict[int, int]]:
    """By team and rank: the slot."""
    teams: dict[str, dict[int, int]] = {}
    for seat in plan.seats:
        ranks = teams.setdefault(seat.team, {})
        if seat.granted_as is not None:
            ranks[seat.granted_as] = seat.slot
    return teams


def most_granted(history: History, events: Events, slot: int, begin: int, end: int) -> int:
    """How many shares of objects that were there in this time can have been granted to a seat at most."""
    seat = history.plan.seats[slot]
    team = [other.slot for other in history.plan.seats if other.team == seat.team]
    rank = seat.granted_as
    assert rank is not None  # noqa: S101 # only such a seat gives back what was granted
    # A reserve_read that failed may have granted, and lost the object while its share was used.
    granted = (np.isin(events.status, _TAKEN) & events.of(*_PUBLISHES)) | events.of(Op.RESERVE_READ)
    grants = granted & (events.aux > rank) & np.isin(events.slot, team)
    return int(np.count_nonzero(grants & (events.begin <= end) & (events.end >= begin)))
