"""Packing keys: what the C core gets for every kind of sequence, and what is refused, by index."""

from __future__ import annotations

import array
import ctypes
import re
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shmcache._keys import Keys, pack, unpack
from shmcache.config import shown

a_key = st.binary(min_size=1, max_size=64)


def split(keys: Keys) -> list[bytes]:
    """What the core reads out of ``pack(keys)``."""
    data, width, ends, n = pack(keys)
    flat = bytes(data)
    if ends is None:
        assert len(flat) == width * n
        return [flat[i * width : (i + 1) * width] for i in range(n)]
    assert width == 0
    assert ends.dtype == np.uint32
    assert ends.shape == (n,)
    assert ends.flags.c_contiguous
    assert int(ends[-1]) == len(flat)
    return [flat[begin:end] for begin, end in zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)]


@given(st.lists(a_key, max_size=40))
def test_lists(keys: list[bytes]) -> None:
    assert split(keys) == keys
    assert split(tuple(keys)) == keys
    assert unpack(pack(keys)) == keys


@given(st.integers(1, 64).flatmap(lambda width: st.lists(st.binary(min_size=width, max_size=width), min_size=1)))
def test_lists_of_one_length(keys: list[bytes]) -> None:
    data, width, ends, n = pack(keys)
    assert (data, width, ends, n) == (b"".join(keys), len(keys[0]), None, len(keys))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 20), st.integers(1, 64))))
def test_matrices(matrix: npt.NDArray[np.uint8]) -> None:
    rows = [row.tobytes() for row in matrix]
    data, width, ends, n = pack(matrix)
    assert data is matrix, "an array is passed on without a copy"
    assert (width, ends, n) == (matrix.shape[1], None, len(rows))
    assert unpack(pack(matrix)) == rows
    assert split(rows) == rows


@given(st.lists(st.tuples(a_key, st.sampled_from([bytes, bytearray, memoryview])), max_size=10))
def test_every_kind_of_bytes(pairs: list[tuple[bytes, Any]]) -> None:
    keys = [kind(key) for key, kind in pairs]
    assert split(keys) == [key for key, _ in pairs]
    unpacked = unpack(pack(keys))
    assert unpacked == [key for key, _ in pairs]
    assert all(type(key) is bytes for key in unpacked)


def test_no_keys() -> None:
    assert pack([]) == pack(()) == (b"", 0, None, 0)
    assert unpack(pack([])) == unpack(pack(())) == []
    assert pack(np.empty((0, 16), np.uint8))[1:] == (16, None, 0)


def test_unpack_gives_a_list_of_its_own() -> None:
    keys = [b"a", b"b"]
    assert unpack(pack(keys)) is not keys


def test_other_sequences() -> None:
    keys = deque([b"a", b"bc"])
    assert split(keys) == [b"a", b"bc"]
    assert unpack(pack(keys)) == [b"a", b"bc"]


def test_keys_are_copied() -> None:
    key = bytearray(b"abcd")
    data = pack([key])[0]
    key[0] = 0
    assert bytes(data) == b"abcd"


@pytest.mark.parametrize("first", [b"k" * 8, b"k" * 7])
def test_len_is_not_always_bytes(first: bytes) -> None:
    """len() of a memoryview counts its items; the core is told bytes."""
    wide = memoryview(array.array("Q", [1]))
    assert len(wide) == 1
    assert split([first, wide]) == [first, bytes(wide)]
    assert split([wide, b"x"]) == [bytes(wide), b"x"]
    assert split([wide]) == [bytes(wide)]
    assert split([wide, wide]) == [bytes(wide)] * 2


@pytest.mark.parametrize("lengths", [[0], [65], [3, 0], [3, 65, 0], [3, 3, 0], [64, 64, 65], [0, 0], [65, 65], [1000]])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_lengths_refused(lengths: list[int], kind: Any) -> None:
    index = next(i for i, length in enumerate(lengths) if not 1 <= length <= 64)
    with pytest.raises(ValueError, match=rf"^keys\[{index}\]: expected 1 to 64 bytes, got {lengths[index]}$"):
        pack([kind(length) for length in lengths])


def test_a_wide_memoryview_is_measured_in_bytes() -> None:
    nine = memoryview(array.array("Q", [0] * 9))
    with pytest.raises(ValueError, match=r"^keys\[1\]: expected 1 to 64 bytes, got 72$"):
        pack([b"x", nine])


@pytest.mark.parametrize("wrong", ["text", None, 7, 1.5, ["x"], object(), {1: 2}, ctypes.c_int(3)])
@pytest.mark.parametrize("index", [0, 1, 5])
def test_elements_refused(wrong: Any, index: int) -> None:
    keys: list[Any] = [b"key"] * 6
    keys[index] = wrong
    with pytest.raises(TypeError, match=rf"^keys\[{index}\]: expected bytes, got {re.escape(shown(wrong))}$"):
        pack(keys)
    with pytest.raises(TypeError, match=r"^keys\[0\]: expected bytes, got"):
        pack([wrong])


def test_memory_with_gaps_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^keys\[1\]: expected bytes, got .*memoryview"):
        pack([b"a", memoryview(b"abcdef")[::2]])


@pytest.mark.parametrize(
    "keys",
    [
        b"key",
        bytearray(b"key"),
        memoryview(b"key"),
        "key",
        "",
        b"",
        None,
        7,
        {b"k"},
        {b"k": 1},
        iter([b"k"]),
        {b"k": 1}.keys(),
        object(),
    ],
)
def test_no_sequence_of_keys(keys: Any) -> None:
    with pytest.raises(TypeError, match="^keys: expected a sequence of bytes"):
        pack(keys)


@pytest.mark.parametrize(
    "keys",
    [
        np.zeros((2, 16), np.int8),
        np.zeros((2, 2), np.uint64),
        np.zeros((2, 16), np.bool_),
        np.zeros(16, np.uint8),
        np.zeros((1, 2, 16), np.uint8),
        np.zeros((), np.uint8),
        np.array([b"abc", b"def"]),
        np.array([b"abc", b"def"], dtype=object),
        np.zeros((2, 32), np.uint8)[:, ::2],
        np.zeros((4, 16), np.uint8)[::2],
        np.zeros((16, 4), np.uint8).T,
    ],
)
def test_arrays_refused(keys: Any) -> None:
    with pytest.raises(ValueError, match=r"^keys: expected a C-contiguous uint8 array of shape \(n, width\), got"):
        pack(keys)


@pytest.mark.parametrize("width", [0, 65, 1000])
def test_widths_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"^keys: expected rows of 1 to 64 bytes, got shape \(3, \d+\)$"):
        pack(np.zeros((3, width), np.uint8))


def test_many_keys() -> None:
    keys = [b"%d" % i for i in range(100_000)]
    assert split(keys) == keys
