"""The bytes of a segment through its descriptor, which bears a file that is cut, and the checksum of its header."""

from __future__ import annotations

import os
import struct
from typing import Final

from processes._segment import Segment

HEADER: Final = 512  #: bytes that never change
CHECKSUM: Final = 120
_REGIONS: Final = 104
BOOT_ID: Final = 88  #: offset of its 16 bytes
SLOT_BYTES: Final = 128
_FINGERPRINT: Final = slice(128, 392)  #: of the header; its length and padding included
_PAYLOAD_ALIGN: Final = 2 << 20
_MASK: Final = 2**64 - 1


def checksum(header: bytes) -> int:
    """As ``sc_checksum``: FNV-1a over the constant fields and the fingerprint."""
    found = 0xCBF29CE484222325
    for byte in header[:CHECKSUM] + header[_FINGERPRINT]:
        found = (found ^ byte) * 0x100000001B3 & _MASK
    return found


def size_of(capacity: int, block_size: int, slots: int, lanes: int, regions: int) -> int:
    """Bytes of a segment of this geometry."""
    plan = Segment.__new__(Segment)
    plan.capacity, plan.block_size, plan.slots, plan.lanes, plan.regions = capacity, block_size, slots, lanes, regions
    end = plan._plan()[1] + -(-capacity // block_size // 8 // 4096) * 4096  # the map of backed blocks is the last part
    return -(-end // _PAYLOAD_ALIGN) * _PAYLOAD_ALIGN + capacity


class Bytes:
    """An arena's segment, found by name while it is sound, and kept whatever becomes of it."""

    def __init__(self, path: os.PathLike[str] | str, name: str) -> None:
        plan = Segment(name)
        self.slots, self.lanes, self.block_size = plan.slots, plan.lanes, plan.block_size
        self.parts = plan._parts
        plan._bytes.close()
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size_at_first = self.size

    def close(self) -> None:
        os.close(self._fd)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def word(self, at: int) -> int:
        """0 where the file has ended."""
        return int.from_bytes(os.pread(self._fd, 8, at), "little")

    def store(self, at: int, word: int) -> None:
        """Nothing where the file has ended."""
        if at + 8 <= self.size:
            os.pwrite(self._fd, word.to_bytes(8, "little"), at)

    def patch(self, at: int, content: bytes) -> None:
        """Writes, wherever that is."""
        os.pwrite(self._fd, content, at)

    def content(self) -> bytes:
        """All that is there of the metadata."""
        return os.pread(self._fd, sum(self.parts["owners"]), 0)

    def geometry(self) -> tuple[int, int, int, int, int]:
        """Capacity, block size, slots, lanes and regions, as the header has them now."""
        capacity, block_size, slots, lanes = struct.unpack("<QQII", os.pread(self._fd, 24, 16).ljust(24, b"\0"))
        (regions,) = struct.unpack("<I", os.pread(self._fd, 4, _REGIONS).ljust(4, b"\0"))
        return capacity, block_size, slots, lanes, regions

    def seal(self) -> None:
        """Makes the header's checksum right."""
        self.store(CHECKSUM, checksum(os.pread(self._fd, HEADER, 0).ljust(HEADER, b"\0")))
