"""The checksum of stored objects: xxHash, 64 bits of XXH3."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xxhash import xxh3_64

__all__ = ["checksum", "hasher"]


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
