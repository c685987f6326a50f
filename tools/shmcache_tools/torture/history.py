"""The history of a round: all logs as columns of numbers, and what of it concerns one key.

Times are nanoseconds of CLOCK_MONOTONIC. An operation that never ended, since its process was killed in it, ends for
this purpose when the process was gone; what it did, if anything, it had done by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shmcache_tools.torture.log import (
    COLLECTIVE,
    FORCE,
    MOST_KEYS,
    PENDING,
    PREFIX,
    RECORD_WORDS,
    TEMPORARY,
    Op,
    status_text,
)
from shmcache_tools.torture.plan import Plan

NEVER: Final = 1 << 62

Column = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(slots=True)
class Records:
    """One entry a record, of all logs one after the other."""

    slot: Column
    number: Column  #: in its log
    op: Column
    keys: Column
    flags: Column
    aux: Column
    ref: Column
    begin: Column
    end: Column
    done: Mask  #: it came to its end
    cut: Column  #: when its process closed or was to be killed next
    killed: Column  #: from when on its process may be dead
    hold_end: Column  #: of a read: until when at least its shares were held

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(slots=True)
class Events:
    """One entry a record and key."""

    record: Column  #: in Records
    slot: Column
    op: Column
    flags: Column
    aux: Column
    begin: Column
    end: Column
    done: Mask
    cut: Column
    killed: Column
    hold_end: Column
    key: Column
    status: Column
    version: Column

    def __len__(self) -> int:
        return len(self.record)

    def where(self, mask: Mask | Column) -> Events:
        """Some of them."""
        return Events(*(getattr(self, column.name)[mask] for column in fields(self)))

    def of(self, *ops: Op) -> Mask:
        """Which are of these operations."""
        return np.isin(self.op, ops)


@dataclass(frozen=True, slots=True)
class Audit:
    """What was seen while nobody did anything: when, and by slot the reserved shares of its lane."""

    time: int
    reserved: dict[int, int]


@dataclass(slots=True)
class History:
    """All that is known of a round."""

    plan: Plan
    records: Records
    events: Events  #: sorted by key
    audits: Sequence[Audit] = ()

    def of_key(self, key: int) -> Events:
        """What concerns one key."""
        first, last = np.searchsorted(self.events.key, [key, key + 1])
        return self.events.where(np.arange(first, last))


def history_of(plan: Plan, logs: Sequence[bytes], audits: Sequence[Audit] = ()) -> History:
    """The history that these logs tell, one log a seat."""
    raw = [np.frombuffer(log, np.uint64).reshape(-1, RECORD_WORDS).astype(np.int64) for log in logs]
    words = np.concatenate(raw)
    heads = words[:, 2]
    records = Records(
        slot=np.repeat(np.arange(len(raw)), [len(log) for log in raw]),
        number=np.concatenate([np.arange(len(log)) for log in raw]),
        op=heads & 0xFF,
        keys=heads >> 8 & 0xFF,
        flags=heads >> 16 & 0xFFFF,
        aux=heads >> 32,
        ref=words[:, 3],
        begin=words[:, 0],
        end=words[:, 1].copy(),
        done=words[:, 1] > 0,
        cut=np.full(len(words), NEVER),
        killed=np.full(len(words), NEVER),
        hold_end=np.full(len(words), NEVER),
    )
    first = 0
    for log in raw:
        _cut(records, first, first + len(log))
        first += len(log)
    return History(plan, records, _events_of(records, words[:, 4:]), audits)


def _cut(records: Records, first: int, last: int) -> None:
    """Of one log: which process each record is of, when that closed or died, and what was held until when."""
    if first == last:
        return
    here = slice(first, last)
    op, begin = records.op[here], records.begin[here]
    positions = np.arange(last - first)
    for column, ops in ((records.cut, (Op.CLOSE, Op.DEATH)), (records.killed, (Op.DEATH,))):
        at = np.flatnonzero(np.isin(op, ops))
        following = np.searchsorted(at, positions, side="right")
        known = following < len(at)
        column[here][known] = begin[at[following[known]]]
    deaths = np.flatnonzero(op == Op.DEATH)
    following = np.searchsorted(deaths, positions)
    unfinished = ~records.done[here] & (following < len(deaths))
    end = records.end[here]
    end[~records.done[here]] = NEVER
    end[unfinished] = end[deaths[following[unfinished]]]
    records.hold_end[here] = records.cut[here]
    releases = np.flatnonzero(op == Op.RELEASE)
    records.hold_end[here][records.ref[here][releases]] = begin[releases]


def _events_of(records: Records, key_words: Column) -> Events:
    parts = [np.flatnonzero(records.keys > i) for i in range(MOST_KEYS)]
    record = np.concatenate(parts)
    word = np.concatenate([key_words[part, i] for i, part in enumerate(parts)])
    order = np.lexsort((records.begin[record], word & 0xFF))
    record, word = record[order], word[order]
    same = ("slot", "op", "flags", "aux", "begin", "end", "done", "cut", "killed", "hold_end")
    columns: dict[str, Any] = {name: getattr(records, name)[record] for name in same}
    status = word >> 8 & 0xFF
    status[~columns["done"]] = PENDING
    return Events(record=record, key=word & 0xFF, status=status, version=word >> 16, **columns)


def history_text(history: History, key: int, begin: int, end: int, most: int = 200) -> list[str]:
    """What everybody did with a key in some time, in words, one line an operation, by their beginning."""
    events = history.of_key(key)
    cuts = np.flatnonzero(np.isin(history.records.op, (Op.ATTACH, Op.CLOSE, Op.DEATH, Op.EVICT, Op.CLEAR, Op.REAP)))
    lines = [
        (int(events.begin[i]), _event_text(history, events, i, begin))
        for i in np.flatnonzero((events.begin <= end) & (events.end >= begin)).tolist()
    ]
    records = history.records
    lines += [
        (int(records.begin[i]), _record_text(history, i, begin))
        for i in cuts.tolist()
        if records.begin[i] <= end and records.end[i] >= begin
    ]
    lines.sort()
    shown = [line for _, line in lines]
    if len(shown) > most:
        half = most // 2
        shown = [*shown[:half], f"  ... {len(shown) - 2 * half} more ...", *shown[-half:]]
    return shown


def _record_text(history: History, i: int, origin: int) -> str:
    records = history.records
    begin = (records.begin[i] - origin) / 1000
    end = (records.end[i] - origin) / 1000
    what = Op(int(records.op[i])).name.lower()
    note = "" if records.done[i] else "  KILLED IN IT"
    if records.op[i] == Op.DEATH:
        note = ""
    seat = history.plan.seats[int(records.slot[i])]
    return f"  {begin:12.1f} .. {end:12.1f} us  {seat.text:18}  {what}{note}"


def _event_text(history: History, events: Events, i: int, origin: int) -> str:
    text = _record_text(history, int(events.record[i]), origin)
    version = f" version {events.version[i]:x}" if events.version[i] else ""
    ranks = f" for {events.aux[i]} ranks" if events.aux[i] else ""
    names = ((TEMPORARY, "temporary"), (FORCE, "force"), (PREFIX, "prefix"), (COLLECTIVE, "collective"))
    flags = "".join(f" {name}" for bit, name in names if events.flags[i] & bit)
    return f"{text}{version}{ranks}{flags} -> {status_text(int(events.status[i]))}"
