"""Keys and bytes of made-up KV chunks: both follow from the chunk's hash id alone.

So every process can tell, without being told, what bytes an object must hold, and a reader that was
given another object's memory, or half-written memory, finds out.  Word i of a chunk is a mix of its
key plus i times an odd constant: no two words of a chunk are equal, and no two chunks are alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shmcache import Layout

KEY_BYTES = 8
WORD_BYTES = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keys_of(hash_ids: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The keys of these chunks as a matrix, one row of ``KEY_BYTES`` a key."""
    return hash_ids.astype(">u8").view(np.uint8).reshape(-1, KEY_BYTES)


def words_of(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The first word of each key's chunk (splitmix64 of the id)."""
    word: NDArray[np.uint64] = np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1)
    word = (word + np.uint64(1)) * _GOLDEN
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word.view(np.int64)


class Pattern:
    """Fills and verifies chunks of one size."""

    def __init__(self, chunk_bytes: int) -> None:
        """``chunk_bytes``: a multiple of ``WORD_BYTES``."""
        words = chunk_bytes // WORD_BYTES
        self.layout = Layout((words,), "int64")
        self._ramp = (np.arange(words, dtype=np.uint64) * _GOLDEN).view(np.int64)
        self._expected = np.empty_like(self._ramp)
        self._equal = np.empty(words, dtype=np.bool_)

    def fill(self, chunk: NDArray[np.int64], word: np.int64) -> None:
        """Write the whole chunk whose first word is ``word``."""
        np.add(self._ramp, word, out=chunk)

    def matches(self, chunk: NDArray[np.int64], word: np.int64) -> bool:
        """Compare the whole chunk with what ``fill`` wrote."""
        np.add(self._ramp, word, out=self._expected)
        np.equal(chunk, self._expected, out=self._equal)
        return bool(self._equal.all())
