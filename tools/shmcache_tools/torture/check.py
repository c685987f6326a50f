"""What must hold of a history, key by key.

A key has one object at a time, and each object has a version that no other has. So a key's states follow each other

    absent, being written as version v, ready with version v, absent, being written as version w, ...

and every operation saw, or made, one of them at some moment between its beginning and its end. Where an object comes
from is known: from the reserve_write or put that has its version. When it goes is not: any object without shares may
be evicted at any moment by anybody who needs its room. What is known is in which *windows* of time an object was there
for certain at one moment: that of its reservation, of its publication, of each read that saw it; the very moments at
which a reader that held it began to release it, or was to be killed; the moments when there was a reserved share of it
(``shares``); the moment up to which a writer had not finished, was not to be killed, and had its lease.

An object is there without a gap. So with

    first(v) = the earliest end, last(v) = the latest beginning of all windows of v

it is there in all of [first(v), last(v)], its *must*. From this follows what is a violation, each with its reason:

- two objects, neither of which can have gone before the other came: v is before w if last(v) <= first(w) at least;
- a look, or a deletion, that found the key absent (or made it so) wholly within the must of one object;
- a look that found it being written, wholly within the time in which one object was ready; the other way round alike;
- a look that found it ready, or being written, where no object can have been so: the *may* of v begins when somebody
  begins to publish (to reserve) it, and ends before the first object that certainly came later was there;
- a deletion after which each object that it can have removed was seen;
- bytes that are not whole, of another key, of a version that nobody had begun to publish when the read ended, or
  that changed while they were held;
- a writer that finds its object finished, or, before its lease is over, lost;
- a finish_read that finds no share where there must be one, or more of them than were granted.

An object that several lanes write together has several rows here, one a part, since who joins whom shows only when it
is read. Two parts of one group and of different ranks may be of one object, so of them nothing follows for each other;
a part says less than a whole: it may be lost at any moment by another writer's end, and who has published it knows not
whether the object is ready.

All rules are sound: what they call a violation can be explained by no order of the operations. They are not complete:
they look at two objects at a time, and at a look on its own, unless only one object can have been what it saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shmcache import Status
from shmcache_tools.torture.history import NEVER, Column, Events, History, Mask
from shmcache_tools.torture.log import COLLECTIVE, PENDING, Code, Op, status_text
from shmcache_tools.torture.objects import VERSION_BITS, key_of
from shmcache_tools.torture.plan import Plan
from shmcache_tools.torture.shares import Shares, lives_of, most_granted

_US = 1000
_OK, _NOT_FOUND, _IN_FLIGHT, _EXISTS, _NO_SPACE, _NO_SHARE, _LOCKED, _NOT_OWNER, _ = map(int, Status)
_FINISHES = (Op.PUBLISH, Op.FINISH_WRITE, Op.ABORT, Op.ABORT_WRITE)
_PUBLISHES = (Op.PUBLISH, Op.FINISH_WRITE)
_LOOKS = (Op.READ, Op.RESERVE_READ, Op.FINISH_READ, Op.CANCEL_READ, Op.TOUCH, Op.LOOKUP, Op.STATUS, Op.DELETE)
_RESERVES = (Op.RESERVE_WRITE, Op.PUT)

#: What each operation may answer. Beside these: PENDING and UNSEEN.
_ANSWERS: dict[int, tuple[int, ...]] = {
    Op.RESERVE_WRITE: (_OK, _EXISTS, _IN_FLIGHT, _NO_SPACE, Code.BUSY, Code.UNLIKE),
    Op.PUBLISH: (_OK, _NOT_OWNER),
    Op.FINISH_WRITE: (_OK, _NOT_OWNER),
    Op.ABORT: (_OK, _NOT_OWNER, Code.DROPPED, Code.BUSY),
    Op.ABORT_WRITE: (_OK, _NOT_OWNER, _LOCKED),
    Op.PUT: (_OK, _EXISTS, _IN_FLIGHT, _NO_SPACE, _NOT_OWNER, Code.BUSY),
    Op.READ: (_OK, _NOT_FOUND, _IN_FLIGHT),
    Op.RELEASE: (_OK,),
    Op.RESERVE_READ: (_OK, _NOT_FOUND, _IN_FLIGHT),
    Op.FINISH_READ: (_OK, _NOT_FOUND, _NO_SHARE),
    Op.CANCEL_READ: (_OK, _NOT_FOUND, _NO_SHARE),
    Op.TOUCH: (_OK, _NOT_FOUND, _IN_FLIGHT),
    Op.LOOKUP: (_OK, Code.NOT_READY),
    Op.STATUS: (_OK, _NOT_FOUND, _IN_FLIGHT),
    Op.DELETE: (_OK, _NOT_FOUND, _LOCKED, Code.BUSY),
    Op.STRAY: (_NOT_FOUND, _NOT_OWNER, _EXISTS),
}


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that cannot be, and when it was seen."""

    rule: str
    key: int | None = None
    begin: int = 0
    end: int = 0

    @property
    def text(self) -> str:
        return self.rule if self.key is None else f"key {self.key} ({key_of(self.key).decode()!r}): {self.rule}"


class Objects:
    """The objects of one key, by their versions: one column a fact, see above."""

    def __init__(self, events: Events, plan: Plan) -> None:
        lease = int(plan.write_lease_s * 1e9)
        born = events.of(*_RESERVES) & np.isin(events.status, (_OK, PENDING))
        born |= events.of(Op.PUT) & (events.status == _NOT_OWNER)
        rows = events.where(born)
        rows = rows.where(np.argsort(rows.version))
        n = len(rows)
        self.version: Column = rows.version
        self.begin: Column = rows.begin  #: of the reservation
        self.end: Column = rows.end
        #: Of parts: by whom, as 2 * group + rank; -1 where one wrote it alone.
        self.part: Column = np.where(rows.flags & COLLECTIVE > 0, _writers(plan)[rows.slot], -1)
        self.first: Column = np.full(n, NEVER)
        self.last: Column = np.full(n, -1)
        self.ready_first: Column = np.full(n, NEVER)  #: of windows in which it was ready
        self.written_last: Column = np.full(n, -1)  #: of windows in which it was being written
        self.ready_from: Column = np.full(n, NEVER)  #: its may
        self.ready_to: Column = np.full(n, NEVER)
        self.written_to: Column = np.full(n, NEVER)
        self.lease_over: Column = rows.begin + lease - _US
        puts = rows.of(Op.PUT)
        self.ready_from[puts] = rows.begin[puts]
        ended = puts & (rows.status != PENDING)  # what a killed one was writing is there until somebody reaps it
        self.written_to[ended] = rows.end[ended]
        at = np.flatnonzero(rows.status != PENDING)
        self.written(at, rows.begin[at], rows.end[at])
        at = np.flatnonzero(puts & (rows.status == _OK))
        self.ready(at, rows.begin[at], rows.end[at])
        #: until when nobody but time can take the write from its writer
        self.kept: Column = np.where(
            (rows.status == _OK) & ~puts & (self.part < 0), np.minimum(self.lease_over, rows.cut), -1
        )

    def __len__(self) -> int:
        return len(self.version)

    def find(self, versions: Column) -> tuple[Column, Mask]:
        """Where these versions are, and which of them are there at all."""
        if not len(self):
            return np.zeros(len(versions), np.int64), np.zeros(len(versions), np.bool_)
        at = np.minimum(np.searchsorted(self.version, versions), len(self) - 1)
        return at, self.version[at] == versions

    def written(self, at: Column, begin: Column, end: Column) -> None:
        """Windows in which these were being written at one moment."""
        np.minimum.at(self.first, at, end)
        np.maximum.at(self.last, at, begin)
        np.maximum.at(self.written_last, at, begin)

    def ready(self, at: Column, begin: Column, end: Column) -> None:
        """Windows in which these were ready at one moment."""
        np.minimum.at(self.first, at, end)
        np.maximum.at(self.last, at, begin)
        np.minimum.at(self.ready_first, at, end)

    def bound(self) -> None:
        """Where the may of each ends: before the first that certainly came later was there."""
        for part in np.unique(self.part):
            others = np.flatnonzero(~self.alike(part, self.part))
            self._bound(np.flatnonzero(self.part == part), others)

    @staticmethod
    def alike(part: Column | int, other: Column | int) -> Mask:
        """Whether these may be parts of one object."""
        alike: Mask = np.asarray((part >= 0) & (other >= 0) & (part >> 1 == other >> 1) & (part != other))
        return alike

    def _bound(self, these: Column, others: Column) -> None:
        """Of these, which are among the others."""
        order = others[np.argsort(self.begin[others])]
        least = np.append(np.minimum.accumulate(self.first[order][::-1])[::-1], NEVER)
        latest = np.minimum(self.first[these], self.end[these])  # it was there by then, or never
        later = least[np.searchsorted(self.begin[order], latest)]
        by_first = others[np.argsort(self.first[others])]
        place = np.empty(len(self), np.int64)
        place[by_first] = np.arange(len(by_first))
        following = np.append(by_first, by_first[-1])[place[these] + 1]
        certain = (self.last[following] > self.first[these]) & (self.first[following] >= self.first[these])
        certain &= following != these
        later = np.where(certain, np.minimum(later, self.first[following]), later)
        self.ready_to[these] = np.minimum(self.ready_to[these], later)


def _writers(plan: Plan) -> Column:
    """By slot: the writer of parts, as 2 * group + rank."""
    teams = sorted({seat.team for seat in plan.seats})
    return np.array([2 * teams.index(seat.team) + (seat.rank or 0) for seat in plan.seats], np.int64)


def _within(first: Column, last: Column, events: Events) -> Mask:
    """Which events lie wholly within one of these intervals."""
    order = np.argsort(first)
    first, last = first[order], np.maximum.accumulate(last[order])
    at = np.searchsorted(first, events.begin) - 1
    return (at >= 0) & (np.append(last, -1)[at] > events.end)


def _outside(begin: Column, end: Column, events: Events) -> Mask:
    """Which events touch none of these intervals."""
    order = np.argsort(begin)
    begin, end = begin[order], np.maximum.accumulate(end[order])
    at = np.searchsorted(begin, events.end, side="right") - 1
    return (at < 0) | (np.append(end, -1)[at] < events.begin)


class KeyCheck:
    """Checks one key. ``violations`` is what it found."""

    def __init__(self, history: History, key: int, shares: Shares, events: Events) -> None:
        self.history = history
        self.key = key
        self.events = events
        self.violations: list[Violation] = []
        self.objects = Objects(events, history.plan)
        self._answers()
        self._finishes()
        self._reads()
        self.objects.bound()
        self._certain_looks()
        self._pins(shares.pins)
        self.objects.bound()
        self._deletions()
        self._pairs()
        self._looks()
        for i, since in shares.lost:
            seat = history.plan.seats[events.slot[i]].text
            rule = f"a reserved share was lost: finish_read of {seat} found none, and there must be one"
            self.violations.append(Violation(rule, key, since, int(events.end[i])))
        self._doubled()

    def _found(self, rule: str, events: Events, at: Iterable[int] | Mask | Column) -> None:
        """Each of these events breaks the rule."""
        where = np.flatnonzero(at) if isinstance(at, np.ndarray) and at.dtype == np.bool_ else at
        for i in where:
            what = f"{Op(int(events.op[i])).name.lower()} -> {status_text(int(events.status[i]))}"
            version = f" of version {events.version[i]:x}" if events.version[i] else ""
            text = f"{rule} ({self.history.plan.seats[events.slot[i]].text}: {what}{version})"
            self.violations.append(Violation(text, self.key, int(events.begin[i]), int(events.end[i])))

    def _of_objects(self, rule: str, i: int, begin: int, end: int) -> None:
        self.violations.append(Violation(f"version {self.objects.version[i]:x} {rule}", self.key, begin, end))

    # What is known of each object

    def _answers(self) -> None:
        events = self.events
        for op, answers in _ANSWERS.items():
            allowed = (*answers, PENDING, Code.UNSEEN, Code.WRONG)
            self._found("no answer of this operation", events, (events.op == op) & ~np.isin(events.status, allowed))
        self._found("bytes of no version of this key, or of several", events, events.status == Code.WRONG)

    def _finishes(self) -> None:
        objects = self.objects
        events = self.events.where(self.events.of(*_FINISHES))
        at, known = objects.find(events.version)
        self._found("finished what was never reserved", events, ~known)
        events, at = events.where(known), at[known]
        publishes, ok = events.of(*_PUBLISHES), events.status == _OK
        begun = publishes & np.isin(events.status, (_OK, PENDING))
        np.minimum.at(objects.ready_from, at[begun], events.begin[begun])
        whole = objects.part[at] < 0
        ended = np.isin(events.status, (_OK, _NOT_OWNER)) & (whole | ~publishes | ~ok)
        np.minimum.at(objects.written_to, at[ended], events.end[ended])
        objects.written(at[ok], events.begin[ok], events.end[ok])
        published = publishes & ok & whole
        objects.ready(at[published], events.begin[published], events.end[published])
        early = (events.status == _NOT_OWNER) & (events.end < objects.lease_over[at]) & whole
        self._found("a write was taken from its writer before its lease was over", events, early)
        final = ~np.isin(events.status, (Code.BUSY, _LOCKED))
        np.minimum.at(objects.kept, at[final], events.begin[final])
        kept = np.flatnonzero(objects.kept > objects.end)
        objects.written(kept, objects.kept[kept], objects.kept[kept])

    def _reads(self) -> None:
        objects = self.objects
        events = self.events.where(self.events.of(Op.READ) & (self.events.status == _OK) & (self.events.version > 0))
        first, second = events.version >> VERSION_BITS, events.version & ((1 << VERSION_BITS) - 1)
        collective = first > 0
        self._check_parts(events.where(collective), first[collective], second[collective])
        events = events.where(np.concatenate([np.arange(len(events)), np.flatnonzero(collective)]))
        at, known = objects.find(np.concatenate([second, first[collective]]))
        known &= (objects.part[at] >= 0) == (events.version >> VERSION_BITS > 0) if len(objects) else False
        self._found("read a version that nobody wrote under this key", events, ~known)
        events, at = events.where(known), at[known]
        self._found("read a version that nobody had begun to publish", events, objects.ready_from[at] > events.end)
        objects.ready(at, events.begin, events.end)
        objects.ready(at, events.hold_end, events.hold_end)

    def _check_parts(self, events: Events, first: Column, second: Column) -> None:
        """Each part belongs to one object, and its parts to one group."""
        objects = self.objects
        pairs, at = np.unique(np.stack([first, second], axis=1), axis=0, return_index=True)
        for column in pairs.T:
            twice = np.isin(column, [part for part, count in Counter(column.tolist()).items() if count > 1])
            self._found("one part was read in two objects", events, at[twice])
        (left, known), (right, known_too) = objects.find(first), objects.find(second)
        known &= known_too
        foreign = np.zeros(len(events), np.bool_)
        foreign[known] = ~objects.alike(objects.part[left[known]], objects.part[right[known]])
        self._found("read parts of two groups, or of one rank", events, foreign)

    def _certain_looks(self) -> None:
        """What saw an object of unknown version, where there can have been only one."""
        events = self.events.where(self._saw_ready())
        at = self._only(events.begin, events.end)
        self._only_at = dict(zip(events.record.tolist(), at.tolist(), strict=True))
        events, at = events.where(at >= 0), at[at >= 0]
        self.objects.ready(at, events.begin, events.end)

    def _saw_ready(self) -> Mask:
        events = self.events
        ok: Mask = events.of(*_LOOKS) & (events.status == _OK) & (events.version == 0)
        exists: Mask = events.of(*_RESERVES) & (events.status == _EXISTS)
        return ok | exists

    def _only(self, begin: Column, end: Column) -> Column:
        """The one object that can have been ready at a moment of each window; -1 where there are others."""
        objects = self.objects
        may = np.flatnonzero(objects.ready_from <= objects.ready_to)
        may = may[np.argsort(objects.ready_from[may])]
        begins, ends = objects.ready_from[may], np.sort(objects.ready_to[may])
        upto = np.searchsorted(begins, end, side="right")
        count = upto - np.searchsorted(ends, begin)
        at = may[np.maximum(upto - 1, 0)] if len(may) else np.zeros(len(begin), np.int64)
        certain = (count == 1) & (upto > 0)
        if len(may):
            certain &= (objects.ready_to[at] >= begin) & (objects.part[at] < 0)
        return np.where(certain, at, -1)

    def _pins(self, pins: Sequence[tuple[int, int]]) -> None:
        """An object with a share stays ready: the same one, all the time."""
        events = self.events
        unseen = events.of(Op.READ) & (events.status == _OK) & (events.version == 0)
        held = zip(events.end[unseen].tolist(), events.hold_end[unseen].tolist(), strict=True)
        times = np.array([*pins, *held], np.int64).reshape(-1, 2)
        begin, end = times[:, 0], times[:, 1]
        objects = self.objects
        order = np.argsort(objects.ready_from)
        begins, ends = objects.ready_from[order], np.maximum.accumulate(objects.ready_to[order])
        upto = np.searchsorted(begins, begin, side="right") - 1
        gone = (upto < 0) | (np.append(ends, -1)[upto] < end)
        for i in np.flatnonzero(gone):
            rule = "an object left, or came, while there must have been a share of it"
            self.violations.append(Violation(rule, self.key, int(begin[i]), int(end[i])))
        # In its first moment and in its last there was an object; where only one can have been there, it was that.
        for moment in (begin[~gone], end[~gone]):
            at = self._only(moment, moment)
            known = at >= 0
            objects.ready(at[known], moment[known], moment[known])

    # What cannot be

    def _deletions(self) -> None:
        """Each removed an object that was not seen afterwards; one that can only have been removed by it is gone."""
        objects = self.objects
        events = self.events.where(self.events.of(Op.DELETE) & (self.events.status == _OK))
        only = self._only(events.begin, events.end)
        known = only >= 0
        survived = known & (np.append(objects.last, -1)[only] > events.end)
        self._found("deleted an object that was there afterwards", events, survived)
        _, counts = np.unique(only[known], return_counts=True)
        if np.any(counts > 1):
            twice = np.isin(only, np.unique(only[known])[counts > 1])
            self._found("deleted the same object twice", events, twice)
        np.minimum.at(objects.ready_to, only[known & ~survived], events.end[known & ~survived])

    def _pairs(self) -> None:
        objects = self.objects
        order = np.argsort(objects.first)
        order = order[objects.first[order] < NEVER]
        first, last = objects.first[order], objects.last[order]
        before = np.maximum.accumulate(last)
        for i in np.flatnonzero(before[:-1] > first[1:]) + 1:
            begin = int(np.searchsorted(before, first[i], side="right"))
            for j in range(begin, i):
                alike = objects.alike(int(objects.part[order[i]]), int(objects.part[order[j]]))
                if last[j] > first[i] and last[i] > first[j] and not alike:
                    other = f"and version {objects.version[order[j]]:x} were there at the same time"
                    self._of_objects(other, order[i], int(first[i]), int(min(last[i], last[j])))

    def _looks(self) -> None:
        objects, events = self.objects, self.events
        done = events.where(events.done & (events.version == 0) | events.of(*_RESERVES))
        absent = done.where(done.of(*_LOOKS) & (done.status == _NOT_FOUND))
        gone = done.where(done.of(Op.DELETE) & (done.status == _OK))
        ready = done.where((done.of(*_LOOKS) & (done.status == _OK)) | (done.of(*_RESERVES) & (done.status == _EXISTS)))
        writing = done.where(np.isin(done.status, (_IN_FLIGHT, Code.UNLIKE)))
        unready = done.where(np.isin(done.status, (_IN_FLIGHT, Code.NOT_READY)))
        there = done.where(done.of(*_LOOKS) & np.isin(done.status, (_LOCKED, _NO_SHARE)))

        self._found("not found, and it was there all the time", absent, _within(objects.first, objects.last, absent))
        self._found("deleted, and it was there all the time", gone, _within(objects.first, objects.last, gone))
        seen = objects.ready_first < NEVER
        within = _within(objects.ready_first[seen], objects.last[seen], unready)
        self._found("not readable, and it was ready all the time", unready, within)
        looks = ready.where(~ready.of(Op.FINISH_READ, Op.CANCEL_READ))  # which may see grants before READY
        within = _within(objects.first, objects.written_last, looks)
        self._found("found ready, and it was being written all the time", looks, within)

        may = objects.ready_from <= objects.ready_to
        outside = _outside(objects.ready_from[may], objects.ready_to[may], ready)
        self._found("found ready, and no object can have been", ready, outside)
        outside = _outside(objects.begin, objects.ready_to, there)
        self._found("found locked or without share, and no object can have been there", there, outside)
        self._look_for_writers(writing)

    def _look_for_writers(self, writing: Events) -> None:
        """Who wants to write does not wait for a writer whose lease is over; others may see it still."""
        objects = self.objects
        written_to = np.minimum(objects.written_to, objects.ready_to)
        reserves = writing.of(*_RESERVES)
        for events, until in (
            (writing.where(~reserves), written_to),
            (writing.where(reserves), np.minimum(written_to, objects.end + self._lease())),
        ):
            outside = _outside(objects.begin, until, events)
            self._found("found in flight, and no object can have been being written", events, outside)

    def _lease(self) -> int:
        return int(self.history.plan.write_lease_s * 1e9) + 2 * _US

    def _doubled(self) -> None:
        """No more reserved shares of an object are given back by a rank than were granted to it."""
        objects = self.objects
        events = self.events.where(self.events.of(Op.FINISH_READ) & (self.events.status == _OK))
        at = np.array([self._only_at.get(record, -1) for record in events.record.tolist()], np.int64)
        pairs, counts = np.unique(np.stack([events.slot, at], axis=1), axis=0, return_counts=True)
        for (slot, i), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            if i < 0:
                continue
            begin, end = int(objects.ready_from[i]), int(objects.ready_to[i])
            granted = most_granted(self.history, self.events, slot, begin, end)
            if count > granted:
                seat = self.history.plan.seats[slot].text
                rule = f"of which {seat} gave back {count} reserved shares, was granted to it {granted} times at most"
                self._of_objects(rule, i, begin, min(end, int(events.end.max())))


def check(history: History) -> list[Violation]:
    """All violations of a round's history, the earliest first."""
    lives = lives_of(history)
    audits: list[dict[int, int]] = [{} for _ in history.audits]
    violations: list[Violation] = []
    for key in range(history.plan.keys):
        events = history.of_key(key)
        if len(events):
            shares = Shares(history, events, lives, audits)
            violations += KeyCheck(history, key, shares, events).violations
    for audit, least in zip(history.audits, audits, strict=True):
        for slot, seen in audit.reserved.items():
            if seen < least.get(slot, 0):
                seat = history.plan.seats[slot].text
                rule = f"{seat} has {seen} reserved shares, and there must be {least[slot]} at least"
                violations.append(Violation(rule, None, audit.time))
    return sorted(violations, key=lambda violation: violation.begin)
