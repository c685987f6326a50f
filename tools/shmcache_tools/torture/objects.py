"""The objects of a torture run: keys, and bytes that tell of each object which it is, and whether it is whole.

Every object that is ever written has a version, a number that no other has. Length and bytes follow from key and
version: a piece of noise that begins at a place of the version's own, with key and version at its beginning, and the
version again at the beginning of each block and at the end. So a reader tells from an object's head what every byte of
it must be; a byte of another object, of an earlier version, or of one that is half written, is found.

An object that two writers fill together is two such parts, of a length that no other object has. Its version is made
of those of its parts.
"""

from __future__ import annotations

import random
import struct
from typing import Final

BLOCK_BYTES: Final = 4096
#: Of one to three blocks; which one, follows from the version.
SIZES: Final = (24, 500, 4095, 4096, 4097, 8000, 8192, 12288)

WRITERS: Final = 2
PART_BYTES: Final = 3000
VERSION_BITS: Final = 24

_NOISE: Final = random.Random("noise").randbytes(1 << 17)
_HEAD: Final = struct.Struct("<QQ")
_WORD: Final = struct.Struct("<Q")
_MARK: Final = 0x746F7274_00000000
_PART_MARK: Final = 0x70617274_00000000
_PLACES: Final = (1 << 17) - max(SIZES)
_MIX: Final = 0x9E3779B97F4A7C15


def key_of(number: int) -> bytes:
    """Keys of all lengths from 1 to 64 bytes, some of which begin alike."""
    return (b"%d of " % number + b"some length that differs " * 3)[: 1 + number * 21 % 64]


def nbytes_of(version: int) -> int:
    """How long the object of this version is."""
    return SIZES[version * _MIX >> 40 & 7]


def bytes_of(key: int, version: int) -> bytearray:
    """Every byte of an object that has one writer."""
    return _bytes(_MARK | key, version, nbytes_of(version))


def part_of(key: int, version: int) -> bytearray:
    """Every byte of a part of an object that has several."""
    return _bytes(_PART_MARK | key, version, PART_BYTES)


def _bytes(mark: int, version: int, nbytes: int) -> bytearray:
    place = (version * _MIX >> 20) % _PLACES
    data = bytearray(_NOISE[place : place + nbytes])
    for at in range(BLOCK_BYTES, nbytes - _WORD.size, BLOCK_BYTES):
        _WORD.pack_into(data, at, version)
    _WORD.pack_into(data, nbytes - _WORD.size, version)
    _HEAD.pack_into(data, 0, mark, version)
    return data


def version_in(data: memoryview, key: int) -> tuple[int, bool]:
    """The version that an object says it is, and whether each byte of it is of that version of this key."""
    if len(data) == WRITERS * PART_BYTES:
        versions = [_version_at(data, rank * PART_BYTES) for rank in range(WRITERS)]
        whole = bytes(data) == b"".join(part_of(key, version) for version in versions)
        return versions[0] << VERSION_BITS | versions[1], whole
    if len(data) < _HEAD.size:
        return 0, False
    version = _version_at(data, 0)
    return version, bytes(data) == bytes_of(key, version)


def _version_at(data: memoryview, place: int) -> int:
    version: int = _HEAD.unpack_from(data, place)[1]
    return version & ((1 << VERSION_BITS) - 1)
