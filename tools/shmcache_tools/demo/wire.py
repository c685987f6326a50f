"""What the demo's scheduler and workers say to each other over a pipe: keys, and what became of them.

Never payload: the bytes of a chunk stay in the arena.  Each message is one frame of a
``multiprocessing.connection.Connection``; the first byte of a worker's message says which it is.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from shmcache_tools.chunks import KEY_BYTES

_TASK = struct.Struct("<Q")
_DONE = struct.Struct("<QIIIddd")
_READY_TAG, _DONE_TAG, _FAILED_TAG = b"R", b"D", b"F"


@dataclass(frozen=True, slots=True)
class Task:
    """Scheduler to worker: read the chain of this request and verify it."""

    request: int
    keys: NDArray[np.uint8]

    def encode(self) -> bytes:
        return _TASK.pack(self.request) + self.keys.tobytes()

    @classmethod
    def decode(cls, message: bytes) -> Task:
        (request,) = _TASK.unpack_from(message)
        keys = np.frombuffer(message, dtype=np.uint8, offset=_TASK.size)
        return cls(request, keys.reshape(-1, KEY_BYTES))


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to scheduler: attached."""

    def encode(self) -> bytes:
        return _READY_TAG


@dataclass(frozen=True, slots=True)
class Done:
    """Worker to scheduler: the chain has been read, verified and released."""

    request: int
    chunks: int  #: read in place
    missing: int  #: not readable; the scheduler has to write them again
    mismatches: int  #: chunks with other bytes than their key says
    read_s: float  #: for the whole chain, as the others
    arrays_s: float
    release_s: float

    def encode(self) -> bytes:
        return _DONE_TAG + _DONE.pack(*astuple(self))


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker to scheduler: an error that ends the run."""

    text: str

    def encode(self) -> bytes:
        return _FAILED_TAG + self.text.encode()


Answer = Ready | Done | Failed


def decode_answer(message: bytes) -> Answer:
    """A worker's message."""
    tag, body = message[:1], message[1:]
    if tag == _READY_TAG:
        return Ready()
    if tag == _DONE_TAG:
        return Done(*_DONE.unpack(body))
    if tag == _FAILED_TAG:
        return Failed(body.decode())
    raise ValueError(f"unknown message {tag!r}")
