"""The arena's own counters against the history: what was answered was counted, and no share came from nowhere.

An operation counts what it did after it did it, so one that was killed may have done it uncounted, and one whose end
nobody saw may have counted it: such operations are a tolerance. The other: a grant that was used, and whose object
went, before its granter looked whether the object is still there, is told NOT_FOUND and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from shmcache import Counters, Status
from shmcache_tools.torture.check import Violation
from shmcache_tools.torture.history import Events, History
from shmcache_tools.torture.log import COLLECTIVE, PENDING, Op

_OK: Final = int(Status.OK)


@dataclass(frozen=True, slots=True)
class Count:
    """What the history knows of one counter: least and most."""

    least: int
    most: int


def counts_of(history: History) -> dict[str, Count]:
    """By counter. A grant counts as many as the ranks it was for."""
    events = history.events

    # Of several writers one publishes and grants, for all of them.
    alone = ~events.of(Op.PUBLISH, Op.FINISH_WRITE) | (events.flags & COLLECTIVE == 0)

    def of(ops: tuple[Op, ...], *, ranks: bool = False) -> Count:
        each = events.aux if ranks else np.ones(len(events), np.int64)
        done = events.of(*ops) & (events.status == _OK)
        maybe = events.of(*ops) & np.isin(events.status, (_OK, PENDING))
        return Count(int(each[done & alone].sum()), int(each[maybe].sum()))

    grants = of((Op.RESERVE_READ, Op.PUBLISH, Op.FINISH_WRITE), ranks=True)
    returned = of((Op.FINISH_READ, Op.CANCEL_READ))
    most_returned = of((Op.FINISH_READ,)).most + of((Op.CANCEL_READ,), ranks=True).most
    return {
        "read_hits": of((Op.READ,)),
        "publishes": of((Op.PUBLISH, Op.FINISH_WRITE, Op.PUT)),
        "grants": grants,
        "releases": of((Op.RELEASE,)),
        "reserved_returned": Count(returned.least, most_returned),
        "lookup_hits": of((Op.LOOKUP,)),
    }


def used_too_soon(events: Events) -> int:
    """How many shares may have been used that a ``reserve_read`` granted and then found to be of no object."""
    failed = events.where(events.of(Op.RESERVE_READ) & (events.status != _OK) & (events.status != PENDING))
    used = events.where(events.of(Op.READ, Op.FINISH_READ, Op.CANCEL_READ) & (events.status == _OK))
    meanwhile = (
        bool(((used.key == key) & (used.begin < end) & (used.end > begin)).any())
        for key, begin, end in zip(failed.key, failed.begin, failed.end, strict=True)
    )
    return sum(int(ranks) for ranks, any_used in zip(failed.aux, meanwhile, strict=True) if any_used)


def check_counters(history: History, counters: Counters) -> list[Violation]:
    """What the counters say, once nobody does anything any more, against what the history says."""
    counts = counts_of(history)
    found = [
        Violation(f"counter {name} is {value}, and the history has {count.least} to {count.most}")
        for name, count in counts.items()
        if not count.least <= (value := getattr(counters, name)) <= count.most
    ]
    soon = used_too_soon(history.events)
    unsure = counts["grants"].most - counts["grants"].least + soon
    used = counters.claims + counters.reserved_returned
    if counters.releases > counters.read_hits:
        found.append(Violation(f"{counters.releases} shares were released, and {counters.read_hits} were ever held"))
    if used > counters.grants + unsure:
        found.append(Violation(f"{used} reserved shares were claimed or returned, and {counters.grants} granted"))
    if history.plan.exact and counters.releases != counters.read_hits:
        found.append(Violation(f"{counters.read_hits} shares were held, and {counters.releases} released"))
    if history.plan.exact and not counters.grants <= used <= counters.grants + soon:
        found.append(Violation(f"{counters.grants} shares were granted, and {used} claimed or returned"))
    return found
