"""What became of one key of a batch."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """One a key, from every method that takes keys. Ordinary outcomes, not errors."""

    OK = 0  #: done
    NOT_FOUND = 1  #: no object of this key
    IN_FLIGHT = 2  #: being written, not readable yet
    EXISTS = 3  #: published already
    NO_SPACE = 4  #: every run of blocks of that length is being written or has shares
    NO_SHARE = 5  #: this lane has no such share (or as many as it can have)
    LOCKED = 6  #: shares or a writer exist, or the arena lock could not be had for this part of the batch
    NOT_OWNER = 7  #: another lane writes this key, perhaps since this one's write lease ran out
    LOST = 8  #: the object's device region died with its owner


OK = Status.OK
STATUSES: tuple[Status, ...] = (*Status, OK)  #: by the core's codes; SC_PART is OK for whoever did it


def statuses(codes: bytes) -> list[Status]:
    """The statuses that the core wrote as one byte a key."""
    return [STATUSES[code] for code in codes]
