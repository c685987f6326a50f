"""The bytes of a segment, as ``native/layout.h`` draws them: to put an arena into the state that a death leaves.

A process that dies between two instructions of the core cannot be had at will. What it leaves can: the lock word
naming it, and what is derived from the slots half changed.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final

from shmcache.segment import path_of

_LOCK: Final = 512
_INDEX_SEQ: Final = 640
_RETIRED: Final = 772
DOOR: Final = 776  #: the byte that is locked by who is in the door; its pid is here
_COUNTS: Final = 900  #: index_tombs, free_blocks, free_slots, block_cursor, slot_cursor
_COUNT_WORDS: Final = 5
_LANE_BYTES: Final = 2048
_REGIONS: Final = 104  #: in the header
_REGION_BYTES: Final = 256
_SLOT_BYTES: Final = 128
_LEASE: Final = 104  #: in a slot
_STATE_MASK: Final = 7
READY: Final = 2
EVICTING: Final = 3

#: Parts that are derived from the slot table, or cost accuracy only.
DERIVED: Final = ("index", "slot_map", "block_map", "owners", "scores", "ghosts", "counts")


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class Segment:
    """The metadata of an arena, mapped writable."""

    def __init__(self, name: str) -> None:
        fd = os.open(path_of(name), os.O_RDWR)
        try:
            self.capacity, self.block_size, self.slots, self.lanes = struct.unpack("<QQII", os.pread(fd, 24, 16))
            (self.regions,) = struct.unpack("<I", os.pread(fd, 4, _REGIONS))
            self._parts, end = self._plan()
            self._bytes = mmap.mmap(fd, end)
        finally:
            os.close(fd)

    def _plan(self) -> tuple[dict[str, tuple[int, int]], int]:
        blocks, slots, index = self.capacity // self.block_size, self.slots, 16
        while index < 4 * slots:
            index *= 2
        sizes = {
            "lanes": self.lanes * _LANE_BYTES,
            "layouts": 1024 * 512,
            "regions": self.regions * _REGION_BYTES,
            "slots": slots * _SLOT_BYTES,
            "scores": slots * 8,
            "ghosts": 2 * slots * 64,
            "shares": self.lanes * _up(slots * 8, 128),
            "since": self.lanes * _up(slots * 4, 128),
            "index": index * 8,
            "slot_map": _up(slots, 64) // 8,
            "block_map": _up((1 + self.regions) * blocks, 64) // 8,
            "owners": (1 + self.regions) * blocks * 4,
        }
        parts, at = {"counts": (_COUNTS, 4 * _COUNT_WORDS)}, 4096
        for part, size in sizes.items():
            parts[part] = (at, size)
            at = _up(at + size, 4096)
        return parts, at

    def _word(self, at: int) -> int:
        return int.from_bytes(self._bytes[at : at + 8], "little")

    def _store(self, at: int, word: int) -> None:
        struct.pack_into("<Q", self._bytes, at, word)

    def incarnation(self, lane: int) -> int:
        """Which life of a lane this is."""
        return self._word(self._parts["lanes"][0] + lane * _LANE_BYTES) & 0xFFFFFFFF

    def holder(self) -> tuple[int, int] | None:
        """Lane and incarnation in the lock word; None where nobody holds it."""
        word = self._word(_LOCK)
        return None if word == 0 else ((word & 0xFFFF) - 1, word >> 32)

    def has_waiters(self) -> bool:
        """Whether the lock word says that somebody waits."""
        return bool(self._word(_LOCK) >> 16 & 1)

    def take_lock(self, lane: int, incarnation: int | None = None) -> None:
        """Writes the arena lock into a lane's name. Nobody may hold or want it."""
        assert self._word(_LOCK) == 0
        self._store(_LOCK, (incarnation or self.incarnation(lane)) << 32 | lane + 1)

    def give_lock(self) -> None:
        """Lets go of the arena lock. Who sleeps looks again after a slice of waiting."""
        self._store(_LOCK, 0)

    def begin_rebuild(self) -> None:
        """The state in which an index is being rebuilt: odd sequence number, entries emptied."""
        self._store(_INDEX_SEQ, self._word(_INDEX_SEQ) | 1)
        self.overwrite("index", b"\0")

    def retire(self) -> None:
        """The state in which who destroyed the arena died before its name was gone."""
        struct.pack_into("<I", self._bytes, _RETIRED, 1)

    def overwrite(self, part: str, content: bytes) -> None:
        """Repeats ``content`` over a whole part."""
        at, size = self._parts[part]
        self._bytes[at : at + size] = (content * -(-size // len(content)))[:size]

    def change_states(self, old: int, new: int) -> int:
        """Sets every slot of one state to another: how many."""
        changed = 0
        for slot in range(self.slots):
            at = self._parts["slots"][0] + slot * _SLOT_BYTES
            if self._word(at) & _STATE_MASK == old:
                self._store(at, self._word(at) & ~_STATE_MASK | new)
                changed += 1
        return changed

    def set_leases(self, until_us: int) -> None:
        """Stores when the read lease of each slot is over (CLOCK_MONOTONIC)."""
        for slot in range(self.slots):
            self._store(self._parts["slots"][0] + slot * _SLOT_BYTES + _LEASE, until_us)

    def overwrite_free_slots(self, content: bytes) -> None:
        """Fills all but the state word of every FREE slot, as a writer that died before it took the slot."""
        assert len(content) == _SLOT_BYTES - 8
        for slot in range(self.slots):
            at = self._parts["slots"][0] + slot * _SLOT_BYTES
            if self._word(at) & _STATE_MASK == 0:
                self._bytes[at + 8 : at + _SLOT_BYTES] = content
