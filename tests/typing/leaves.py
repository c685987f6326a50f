"""Checked by mypy, never run: the types that callers see, and misuse that a type checker must find.

A ``type: ignore`` here is a test: where mypy finds nothing to ignore it complains (warn_unused_ignores).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

from shmcache._keys import Packed, pack, unpack
from shmcache.config import ArenaConfig, check_extra_count, check_name, parse_size
from shmcache.layout import Layout


def sizes_are_ints_once_stated() -> None:
    config = ArenaConfig("8GiB", block_size=65536, slots=None)
    assert_type(config.capacity, int)
    assert_type(config.block_size, int)
    assert_type(config.slots, int)
    assert_type(parse_size("1KiB", "x"), int)
    assert_type(check_name("a"), str)
    assert_type(check_extra_count(0, 1), int)


def misuse_of_a_config() -> None:
    ArenaConfig(1.5)  # type: ignore[arg-type]
    ArenaConfig("1GiB", lanes="64")  # type: ignore[arg-type]
    ArenaConfig("1GiB", lane=64)  # type: ignore[call-arg]
    ArenaConfig("1GiB").lanes = 3  # type: ignore[misc]


def layouts(buffer: npt.NDArray[np.uint8]) -> None:
    layout = Layout((2, 3), "bfloat16")
    Layout([((2, 3), "bfloat16"), ([4], np.float32)])
    assert_type(layout.nbytes, int)
    assert_type(layout.encode(), bytes)
    assert_type(layout.arrays(buffer), npt.NDArray[Any] | tuple[npt.NDArray[Any], ...])
    Layout((2, 3))  # type: ignore[arg-type]
    Layout("bfloat16", (2, 3))  # type: ignore[arg-type]
    Layout.decode("bfloat16[2]")  # type: ignore[arg-type]


def keys(matrix: npt.NDArray[np.uint8], floats: npt.NDArray[np.float32]) -> None:
    assert_type(pack([b"a", bytearray(b"b"), memoryview(b"c")]), Packed)
    assert_type(unpack(pack((b"a",))), list[bytes])
    pack(matrix)
    pack(floats)  # type: ignore[arg-type]
    pack("key")  # type: ignore[arg-type]
    pack(["key"])  # type: ignore[list-item]
