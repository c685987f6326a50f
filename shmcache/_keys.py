"""Keys on their way to the C core: many Python objects become one run of bytes.

On the path of every call, so written for speed: no Python code runs once a key unless a key is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from shmcache import _fast
from shmcache.config import shown

MAX_KEY: Final = 64  #: bytes

BytesLike: TypeAlias = bytes | bytearray | memoryview
Keys: TypeAlias = Sequence[BytesLike] | npt.NDArray[np.uint8]
#: (data, width, ends, n): n keys, one after the other in ``data``. Where all have one length, that is
#: ``width`` and ``ends`` is None; else ``width`` is 0 and ``ends[i]`` is where key i ends. A plain tuple,
#: because making a NamedTuple costs as much as packing one key.
Packed: TypeAlias = tuple["bytes | npt.NDArray[np.uint8]", int, "npt.NDArray[np.uint32] | None", int]

_UINT8: Final = np.dtype(np.uint8)


def pack(keys: Keys) -> Packed:
    """The keys as the core takes them.

    ``keys``: a sequence of bytes-like objects of 1 to 64 bytes, or a C-contiguous uint8 array of shape
    (n, width), 1 <= width <= 64, one row a key; an array is passed on without a copy. No keys are fine.
    TypeError or ValueError names what is wrong, and the index of the key where it is a key.
    """
    packed = _fast.pack(keys)  # None unless a list or tuple of bytes of one length, as nearly all are
    if packed is not None:
        return packed
    if isinstance(keys, np.ndarray):
        return _pack_matrix(keys)
    if type(keys) is not list and type(keys) is not tuple:
        keys = _listed(keys)
    if len(keys) == 0:
        return b"", 0, None, 0
    try:
        return _pack_mixed(keys, b"".join(keys), list(map(len, keys)))
    except (TypeError, BufferError):
        _refuse(keys)


def unpack(packed: Packed) -> list[bytes]:
    """The keys that :func:`pack` took, each as bytes."""
    data, width, ends, n = packed
    joined = data if isinstance(data, bytes) else data.tobytes()
    stops = [width * (i + 1) for i in range(n)] if ends is None else ends.tolist()
    return [joined[start:stop] for start, stop in zip((0, *stops), stops, strict=False)]


def _pack_mixed(keys: Sequence[BytesLike], data: bytes, lengths: list[int]) -> Packed:
    """Keys of several lengths, unless one is wrong."""
    if sum(lengths) != len(data):
        flat = [bytes(key) for key in keys]
        data, lengths = b"".join(flat), list(map(len, flat))
    array = np.array(lengths, dtype=np.int64)
    wrong = (array < 1) | (array > MAX_KEY)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"keys[{index}]: expected 1 to {MAX_KEY} bytes, got {lengths[index]}")
    n = len(lengths)
    if lengths.count(lengths[0]) == n:
        return data, lengths[0], None, n
    return data, 0, array.cumsum(dtype=np.uint32), n


def _pack_matrix(keys: npt.NDArray[np.uint8]) -> Packed:
    if keys.dtype != _UINT8 or keys.ndim != 2 or not keys.flags.c_contiguous:
        raise ValueError(
            "keys: expected a C-contiguous uint8 array of shape (n, width), got "
            f"{'' if keys.flags.c_contiguous else 'non-contiguous '}{keys.dtype} of shape {keys.shape}"
        )
    n, width = keys.shape
    if not 1 <= width <= MAX_KEY:
        raise ValueError(f"keys: expected rows of 1 to {MAX_KEY} bytes, got shape {keys.shape}")
    return keys, width, None, n


def _listed(keys: Sequence[BytesLike]) -> list[BytesLike]:
    """Another sequence as a list. One key where keys are expected is a mistake, though a sequence."""
    if isinstance(keys, (str, bytes, bytearray, memoryview)) or not isinstance(keys, Sequence):
        raise TypeError(
            "keys: expected a sequence of bytes (a single key goes in a list) or a uint8 array of shape "
            f"(n, width), got {shown(keys)}"
        )
    return list(keys)


def _refuse(keys: Sequence[object]) -> NoReturn:
    """TypeError for the key that ``join`` or ``len`` did not take."""
    for index, key in enumerate(keys):
        try:
            b"".join([key])  # type: ignore[list-item] # whether it is one is the question
            len(key)  # type: ignore[arg-type]
        except (TypeError, BufferError):
            raise TypeError(f"keys[{index}]: expected bytes, got {shown(key)}") from None
    raise TypeError("keys: changed by another thread while they were read")
