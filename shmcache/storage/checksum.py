"""The checksum of stored objects: xxHash, 64 bits of XXH3.

In a server a seal stands beside each object::

    bytes 0 to 3     "shmc"
          4 to 7     version of this format, 1
          8 to 15    bytes of the payload
          16 to 23   XXH3 of the key and the payload: an object under another's key is damaged, too

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xxhash import xxh3_64

__all__ = ["SEAL_BYTES", "checksum", "hasher", "seal"]

_SEAL: Final = struct.Struct("<4sIQQ")
_MAGIC: Final = b"shmc"
_VERSION: Final = 1
SEAL_BYTES: Final = _SEAL.size


def hasher() -> xxh3_64:
    """An empty hash; ``update`` it with the object's bytes in their order, then ask its ``intdigest``."""
    try:
        from xxhash import xxh3_64  # noqa: PLC0415 # an extra, imported where it is needed
    except ImportError:
        raise ImportError(
            "an L2 store needs xxhash for its checksums: pip install xxhash, or an extra of shmcache"
        ) from None
    return xxh3_64()


def checksum(view: memoryview | bytes) -> int:
    """The hash of one object."""
    of = hasher()
    of.update(view)
    return of.intdigest()


def seal(key: bytes, payload: memoryview) -> bytes:
    """What is stored beside an object's payload: the same bytes again, or the object is damaged."""
    of = hasher()
    of.update(key)
    of.update(payload)
    return _SEAL.pack(_MAGIC, _VERSION, payload.nbytes, of.intdigest())
