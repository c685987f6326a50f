"""What is known of one prefetch: its keys, how far each is, and what came of it.

``ready`` leading keys are GRANTED or PUBLISHED; keys from ``end`` on are given up, and whatever was taken for them
is given back. ``ready`` grows and ``end`` shrinks until they meet: that is the result. Only the prefetch loop's thread
changes a task.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shmcache.batch import WriteBatch
from shmcache.storage.adapter import LayoutLike
from shmcache.storage.channel import Call

__all__ = ["Key", "Piece", "PrefetchResult", "PrefetchTask"]


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """What a prefetch achieved."""

    hits: int  #: leading keys that carry 1 + extra_count shares; 0 once cancelled
    l1_hits: int  #: of these, found in the arena
    l2_hits: int  #: of these, loaded from L2
    error: str | None = None  #: why it ended early, where that was a failure; None for an ordinary miss


class Key(IntEnum):
    """Where a key of a task is on its way."""

    ABSENT = 0  #: not in the arena; to be looked up in L2, or nowhere
    WAITING = 1  #: another writer has it in hand: asked again until it is readable, gone, or ``contend_s`` is over
    GRANTED = 2  #: it was in the arena: 1 + extra_count shares are granted
    FOUND = 3  #: an L2 says that it has it
    LOADING = 4  #: its slot is reserved, and a load call fills it
    PUBLISHED = 5  #: loaded, published with 1 + extra_count shares


class Piece:
    """Consecutive keys of a task whose slots one load call fills."""

    __slots__ = ("batch", "call", "loaded", "start", "stop", "stray")

    def __init__(self, start: int, batch: WriteBatch) -> None:
        self.start = start
        self.stop = start + len(batch)
        self.batch = batch
        self.call: Call | None = None
        self.loaded: int | None = None  # leading keys that are whole; None until the call is back
        self.stray = False  # no task waits for it


class PrefetchTask:
    """A prefetch that was submitted: what ``submit_prefetch_task`` gives, for query, wait and cancel."""

    def __init__(
        self,
        owner: object,
        keys: list[bytes],
        layouts: list[LayoutLike],
        extra_count: int,
        *,
        use_l2: bool,
        temporary: bool,
    ) -> None:
        self.owner: Final = owner
        self.keys: Final = keys
        self.layouts: Final = layouts
        self.sizes: Final = [layout if isinstance(layout, int) else layout.nbytes for layout in layouts]
        self.nbytes: Final = sum(self.sizes)
        self.extra_count: Final = extra_count
        self.use_l2: Final = use_l2
        self.temporary: Final = temporary
        self.submitted: Final = time.monotonic()
        self.states = [Key.ABSENT] * len(keys)
        self.places = [0] * len(keys)  # the adapter that has it, where FOUND or LOADING
        self.ready = 0
        self.end = len(keys)
        self.stirred = False  # there may be keys that are newly ABSENT
        self.cursor = 0  # before it no key is FOUND
        self.tries: Counter[int] = Counter()  # how often each key was looked up
        self.look_up: Call | None = None  # the look-up that the task waits for
        self.looked_at: tuple[int, list[int]] = (0, [])  # its adapter and its keys
        self.waiting_since: dict[int, float] = {}
        self.pieces: dict[int, Piece] = {}  # by their first key
        self.contended: set[int] = set()  # keys that others did not publish in time
        self.short_of_room = False
        self.cancelled_at: float | None = None
        self.error: str | None = None
        self.result: PrefetchResult | None = None
        self.told = False  # whether query gave the result
        self.over = threading.Event()
        self.answers: list[threading.Event] = []  # of those who cancelled it

    def __repr__(self) -> str:
        state = self.result or f"{self.ready} ready"
        return f"<PrefetchTask of {len(self.keys)} keys, extra_count={self.extra_count}: {state}>"

    def indices(self, state: Key) -> list[int]:
        """The keys between ``ready`` and ``end`` that are in a state."""
        return [i for i in range(self.ready, self.end) if self.states[i] is state]

    def fail(self, error: str) -> None:
        """Notes the first thing that went wrong."""
        self.error = self.error or error
