"""The logs of a torture run: what each process did and saw, in memory that outlives it.

A log is anonymous shared memory, made before its processes are forked: one process after the other, as they are
killed and replaced, appends to the same log. All numbers are 64-bit words:

    words 0 .. 7      the head: records begun, and what the process last said of itself (see HEAD_*)
    then records of 16 words:
        0   begin     CLOCK_MONOTONIC, ns; stored last of all that is known at the beginning, so that a record whose
                      begin is 0 was never begun, whatever stands in its other words
        1   end       stored last of all; 0: the process died in it, or is still in it
        2   op | keys << 8 | flags << 16 | aux << 32
        3   ref       of a release: the record of its read; of an operation without keys: its result
        4 - 15        one a key: key | status << 8 | version << 16

Between the stores of one process and its death nothing is lost, so a killed process leaves at most one record
without an end: the operation it died in.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from shmcache import Status

RECORD_WORDS: Final = 16
MOST_KEYS: Final = 12
MOST_NEW: Final = 4  #: keys of an operation that gives versions
_WORD_BYTES: Final = 8
_TEXT_BYTES: Final = 8192  #: at the end of a log: what its process had to complain of

MOST_RECORDS: Final = 1 << 17  #: of one log

HEAD_COUNT: Final = 0  #: records begun
HEAD_SERIAL: Final = 1  #: the last command that the process has followed
HEAD_HELD: Final = 2  #: then: the shares it holds
HEAD_WRITING: Final = 3  #: then: the objects it is writing alone
HEAD_LANE: Final = 4  #: then: its lane
HEAD_TEXT: Final = 5  #: bytes of text at the end


class Op(IntEnum):
    """What a record is of."""

    ATTACH = 1
    CLOSE = 2
    RESERVE_WRITE = 3
    PUBLISH = 4
    FINISH_WRITE = 5
    ABORT = 6
    ABORT_WRITE = 7
    PUT = 8
    READ = 9
    RELEASE = 10
    RESERVE_READ = 11
    FINISH_READ = 12
    CANCEL_READ = 13
    TOUCH = 14
    LOOKUP = 15
    STATUS = 16
    DELETE = 17
    EVICT = 18
    CLEAR = 19
    REAP = 20
    VERIFY = 21
    STATS = 22
    STRAY = 23  #: finish_write or abort_write of a key that the process does not write
    DEATH = 24  #: written by the supervisor: from before the SIGKILL until the process was gone


class Code(IntEnum):
    """What a record says of a key, where no :class:`shmcache.Status` says it."""

    PENDING = 0xFF  #: the operation never came to its end
    UNSEEN = 0xFE  #: it did not look at this key
    BUSY = 0xFD  #: ArenaBusyError: nothing was done
    WRONG = 0xFC  #: OK, but the bytes are not those of any version of this key
    NOT_READY = 0xFB  #: lookup stopped here
    DROPPED = 0xFA  #: the batch was dropped, which tells nobody what became of it
    UNLIKE = 0xF9  #: GroupError: others of the group are writing it, on other terms


#: Flags of a record.
TEMPORARY: Final = 1
FORCE: Final = 2
PREFIX: Final = 4
COLLECTIVE: Final = 8  #: by several writers

PENDING: Final = int(Code.PENDING)


def status_text(code: int) -> str:
    """A status, or a code, by its name."""
    return Status(code).name if code < len(Status) else Code(code).name


class Log:
    """One log, as its processes write it and as the supervisor reads it."""

    def __init__(self, slot: int, records: int = MOST_RECORDS) -> None:
        self.slot = slot
        self.most = records
        self._memory = mmap.mmap(-1, (records + 1) * RECORD_WORDS * _WORD_BYTES + _TEXT_BYTES)
        self.words = memoryview(self._memory).cast("Q")

    # The process

    def begin(
        self,
        op: int,
        keys: Sequence[int] = (),
        *,
        flags: int = 0,
        aux: int = 0,
        ref: int = 0,
        versions: Sequence[int] = (0,) * MOST_KEYS,
    ) -> int:
        """A new record; where its words begin."""
        words = self.words
        count = words[HEAD_COUNT]
        at = (count + 1) * RECORD_WORDS
        words[at + 2] = op | len(keys) << 8 | flags << 16 | aux << 32
        words[at + 3] = ref
        word = at + 4
        for key, version in zip(keys, versions, strict=False):
            words[word] = key | PENDING << 8 | version << 16
            word += 1
        words[at] = time.monotonic_ns()
        words[HEAD_COUNT] = count + 1
        return at

    def end(self, at: int, codes: Sequence[int] = (), result: int | None = None) -> None:
        """The record's end is now; what became of each key."""
        now = time.monotonic_ns()
        words = self.words
        word = at + 4
        for code in codes:
            words[word] = words[word] & ~0xFF00 | code << 8
            word += 1
        if result is not None:
            words[at + 3] = result
        words[at + 1] = now

    def saw(self, at: int, i: int, code: int, version: int) -> None:
        """Of a record that has ended: the version that key ``i`` turned out to have."""
        words = self.words
        words[at + 4 + i] = words[at + 4 + i] & 0xFF | code << 8 | version << 16

    def next_version(self, i: int) -> int:
        """A version that no other object of the round has, of 24 bits: of key ``i`` of the next record."""
        return self.slot << 19 | (int(self.words[HEAD_COUNT]) + 1) * MOST_NEW + i

    @property
    def full(self) -> bool:
        """Whether the process must do nothing more. Some records are kept for the end of a round."""
        return self.words[HEAD_COUNT] > self.most - 2000

    def report(self, serial: int, held: int, writing: int, lane: int) -> None:
        """Says that a command was followed."""
        self.words[HEAD_HELD] = held
        self.words[HEAD_WRITING] = writing
        self.words[HEAD_LANE] = lane
        self.words[HEAD_SERIAL] = serial

    def complain(self, text: str) -> None:
        """What the process died of, in words."""
        data = text.encode("utf-8", "replace")[-_TEXT_BYTES:]
        begin = len(self._memory) - _TEXT_BYTES
        self._memory[begin : begin + len(data)] = data
        self.words[HEAD_TEXT] = len(data)

    # The supervisor

    def settle(self) -> None:
        """After its process died: counts the record that was begun but not counted yet."""
        if self.words[(self.words[HEAD_COUNT] + 1) * RECORD_WORDS]:
            self.words[HEAD_COUNT] += 1
        self.words[HEAD_SERIAL] = 0

    def pending(self) -> tuple[int, int] | None:
        """Op and begin of the operation that the process is in, or died in."""
        at = int(self.words[HEAD_COUNT]) * RECORD_WORDS
        if at == 0 or self.words[at + 1]:
            return None
        return int(self.words[at + 2]) & 0xFF, int(self.words[at])

    def last_ns(self) -> int:
        """When its process did the last that is known."""
        at = int(self.words[HEAD_COUNT]) * RECORD_WORDS
        return max(int(self.words[at]), int(self.words[at + 1])) if at else time.monotonic_ns()

    def note_death(self, after_ns: int) -> None:
        """Appends the death of its process, which came after ``after_ns`` (0: unknown) and all that the log tells."""
        began_ns = max(after_ns, self.last_ns())  # a signal may take its time
        at = self.begin(Op.DEATH)
        self.words[at] = began_ns
        self.end(at)

    def text(self) -> str:
        """The complaint."""
        begin = len(self._memory) - _TEXT_BYTES
        return self._memory[begin : begin + int(self.words[HEAD_TEXT])].decode("utf-8", "replace")

    def data(self) -> bytes:
        """All records."""
        used = (int(self.words[HEAD_COUNT]) + 1) * RECORD_WORDS * _WORD_BYTES
        return self._memory[RECORD_WORDS * _WORD_BYTES : used]

    def clear(self) -> None:
        """Makes the log empty."""
        used = (int(self.words[HEAD_COUNT]) + 2) * RECORD_WORDS * _WORD_BYTES
        self._memory[:used] = bytes(used)
