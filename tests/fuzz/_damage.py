"""What may happen to a segment, from Python: words, ranges, lies, a forged header, a file that is cut.

As in ``damage.c``, and as much is left out: the payload; a word of the slot table twice, since the second damage might
undo the first; state and seal of one slot; and owners that say of a block in use that it is free, since the block map
may say so, too.
"""

from __future__ import annotations

import random
from typing import Final

from fuzz._segment import HEADER, SLOT_BYTES, Bytes, size_of

_WORDS: Final = range(512, 1024, 8)  #: of the header that do change: lock, index_seq, lane_limit, counts
_LOCK_TIMEOUT: Final = 56
_MASK: Final = 2**64 - 1


class Damage:
    """Damages one arena."""

    def __init__(self, segment: Bytes, chance: random.Random) -> None:
        self._segment = segment
        self._chance = chance
        self._touched: set[int] = set()
        self.cut = False  #: whether the file was ever shorter
        self.said: list[str] = []  #: what was done, for a report

    def some(self, *, attached: bool) -> None:
        """Some damage or other; while processes are attached the constant header stays."""
        kinds = [self.word] * 6 + [self.stretch, self.lock, self.index, self.swap, self.flags]
        if not attached:
            kinds += [self.header, self.header, self.size]
        kind = self._chance.choice(kinds)
        self.said.append(kind.__name__)
        kind()

    def word(self) -> None:
        at = self._some_word()
        self._store(at, self._value(self._segment.word(at)))

    def stretch(self) -> None:
        begin = self._some_word()
        other = self._some_word()
        kind = self._chance.randrange(4)
        for i in range(0, 8 * self._chance.randrange(1, 256), 8):
            if begin + i < self._end and other + i < self._end:
                value = (0, _MASK, self._chance.getrandbits(64), self._segment.word(other + i))[kind]
                self._store(begin + i, value)

    def lock(self) -> None:
        lane = self._chance.randrange(self._segment.lanes + 2)
        incarnation = self._chance.randrange(4)
        if lane < self._segment.lanes and self._chance.random() < 0.5:
            incarnation = self._segment.word(self._begin("lanes") + 2048 * lane) & 0xFFFFFFFF
        self._store(512, incarnation << 32 | self._chance.randrange(2) << 16 | lane + 1)

    def index(self) -> None:
        """All entries name one slot, or are tombstones."""
        slot = self._chance.randrange(self._segment.slots + 2)
        begin, size = self._segment.parts["index"]
        for at in range(begin, begin + size, 8):
            entry = self._segment.word(at)
            self._store(at, (entry & ~0xFFFFFF | slot + 2) if entry > 1 else self._chance.randrange(2))

    def swap(self) -> None:
        """Some words of one slot become another's."""
        begin = self._begin("slots")
        one, other = (begin + SLOT_BYTES * self._chance.randrange(self._segment.slots) for _ in range(2))
        first = 8 * self._chance.randrange(16)
        for i in range(first, self._chance.randrange(first, SLOT_BYTES) + 1, 8):
            self._store(one + i, self._segment.word(other + i))

    def flags(self) -> None:
        """States and owners of slots."""
        begin = self._begin("slots")
        at = begin + SLOT_BYTES * self._chance.randrange(self._segment.slots)
        mask = self._chance.choice([7, 0xFF, 0xFFFF0000, 1 << 32])
        self._store(at, self._segment.word(at) & ~mask | self._chance.getrandbits(64) & mask)

    def header(self) -> None:
        """A constant field, with a checksum that fits or not. What asks to wait for ages is left out."""
        at = 8 * self._chance.randrange(HEADER // 8)
        if at == _LOCK_TIMEOUT:
            value = self._chance.choice([0, 1, _MASK, 1 << 63])
        else:
            value = self._value(self._segment.word(at))
        self._segment.store(at, value)
        if self._chance.random() < 0.75:
            self._segment.seal()
        capacity, block_size, slots, lanes, regions = self._segment.geometry()
        small = capacity <= 1 << 24 and block_size >= 4096 and slots <= 4096 and lanes <= 256 and regions <= 31
        if small and self._chance.random() < 0.5:
            size = size_of(capacity, block_size, slots, lanes, regions)
            self.cut = self.cut or size < self._segment.size
            self._segment.resize(size)

    def size(self) -> None:
        """The file cut, or made longer."""
        now = self._segment.size
        begins = [self._begin(part) for part in ("lanes", "slots", "shares", "index", "owners")]
        sizes = [0, 1, 511, 4096, *begins, 1 << 21, now - 1, now - 4096, now + 1, now + 4096, 1 << 40]
        size = max(0, self._chance.choice(sizes))
        self.cut = self.cut or size < now
        self.said.append(f"{now} to {size} bytes")
        self._segment.resize(size)

    @property
    def _end(self) -> int:
        return sum(self._segment.parts["owners"])

    def _begin(self, part: str) -> int:
        return self._segment.parts[part][0]

    def _some_word(self) -> int:
        if self._chance.random() < 0.2:
            return self._chance.choice(_WORDS)
        begin, size = self._segment.parts[self._chance.choice(sorted(self._segment.parts))]
        return begin // 8 * 8 + 8 * self._chance.randrange(max(1, min(size, 1 << 14) // 8))

    def _value(self, old: int) -> int:
        chance = self._chance
        values = (
            0,
            _MASK,
            chance.randrange(16),
            1 << chance.randrange(64),
            chance.getrandbits(64),
            old + 1 & _MASK,
            old - 1 & _MASK,
            old ^ 1 << chance.randrange(64),
            old & ~0xFFFFFFFF | chance.randrange(32),
            old & 0xFFFFFFFF | chance.randrange(32) << 32,
            self._segment.word(self._some_word()),
        )
        return chance.choice(values)

    def _store(self, at: int, value: int) -> None:
        begin, size = self._segment.parts["slots"]
        if begin <= at < begin + size:
            state = (at - begin) // SLOT_BYTES * SLOT_BYTES + begin
            other = {state: state + 8, state + 8: state}.get(at)  # the seal is the state's witness
            if at in self._touched or other in self._touched or self._segment.word(at) == value:
                return
            self._touched.add(at)
        begin, size = self._segment.parts["owners"]
        if begin <= at < begin + size and 0 in (value >> 32, value & 0xFFFFFFFF):
            return
        self._segment.store(at, value)
