"""Sizes, names, extra_count and the configuration: what is taken, what is refused, and how it says so."""

from __future__ import annotations

import dataclasses
import pickle
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcache.config import ArenaConfig, check_extra_count, check_name, parse_size, shown

HUGE = pytest.param(10**5000, id="huge")  # Python refuses to print it
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("17B", 17),
        ("64KiB", 64 * KIB),
        ("64 KiB", 64 * KIB),
        ("512MiB", 512 * MIB),
        ("8GiB", 8 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("0.25TiB", TIB // 4),
        ("2TiB", 2 * TIB),
        ("1KB", 1000),
        ("1.001KB", 1001),
        ("3MB", 3 * 10**6),
        ("8GB", 8 * 10**9),
        ("1TB", 10**12),
        ("007B", 7),
    ],
)
def test_sizes_as_text(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("value", [1, 4096, 2**63, Number.ONE])
def test_sizes_as_int(value: int) -> None:
    size = parse_size(value, "x")
    assert size == value
    assert type(size) is int


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "KiB",
        "-1",
        "+1",
        "1e9",
        "0x10",
        "1_000",
        "1,5GiB",
        ".5GiB",
        "1.GiB",
        "1  KiB",
        " 1KiB",
        "1KiB ",
        "1kib",
        "1K",
        "1G",
        "1PiB",
        "1iB",
        "1KiBs",
        "1KiB\n",
        "nan",
        "inf",
        "1.5",
        "0.3KiB",
        "١KiB",
        "1" * 21,
        "1." + "0" * 21,
        "1\x00",
    ],
)
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^capacity: expected .* got "):
        parse_size(text, "capacity")


@pytest.mark.parametrize("value", [0, -1, "0", "0GiB", "0.0B", -(2**70)])
def test_sizes_below_one_byte(value: int | str) -> None:
    with pytest.raises(ValueError, match="^capacity: expected at least 1 byte, got"):
        parse_size(value, "capacity")


@pytest.mark.parametrize("value", [True, False, None, 1.0, b"1KiB", [1], Fraction(1), np.int64(4096)])
def test_sizes_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="^capacity: expected bytes as int or text"):
        parse_size(value, "capacity")


@given(
    st.integers(1, 10**15),
    st.sampled_from([("B", 1), ("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB), ("MB", 10**6)]),
    st.sampled_from(["", " "]),
)
def test_whole_sizes_round_trip(number: int, unit: tuple[str, int], gap: str) -> None:
    assert parse_size(f"{number}{gap}{unit[0]}", "x") == number * unit[1]


@given(st.from_regex(r"[0-9]{1,6}\.[0-9]{1,6}", fullmatch=True), st.sampled_from(["KiB", "GiB", "MB"]))
def test_fractions_are_exact_or_refused(number: str, unit: str) -> None:
    exact = Fraction(number) * {"KiB": KIB, "GiB": GIB, "MB": 10**6}[unit]
    if exact.denominator == 1 and exact >= 1:
        assert parse_size(number + unit, "x") == exact
    else:
        with pytest.raises(ValueError, match="^x: expected"):
            parse_size(number + unit, "x")


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text, "x") >= 1
    except ValueError as error:
        assert str(error).startswith("x: expected ")  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("name", ["a", "engine-0", "A.b_c-9", "_", "-", "--all", "0", "x" * 64, "a..b", "a.", "-."])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../x",
        "/a",
        "a b",
        "a\n",
        "a\0b",
        "é",
        "а",
        "x" * 65,
        "a:b",
        "a%",
        "٣",
    ],
)
def test_names_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name of an arena: expected 1 to 64 .* got "):
        check_name(name)


@pytest.mark.parametrize("name", [None, b"a", 1, ["a"], np.array("a")])
def test_names_of_another_type(name: Any) -> None:
    with pytest.raises(TypeError, match="^name of an arena: expected str, got"):
        check_name(name)


@given(st.text())
def test_an_accepted_name_is_one_harmless_file_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert name.isascii()
    assert not set(name) & set("/\0\n ")
    assert not name.startswith(".")
    assert 1 <= len(name) <= 64


@pytest.mark.parametrize(("extra_count", "world_size"), [(0, 1), (0, 4), (3, 4), (255, 256)])
def test_extra_count(extra_count: int, world_size: int) -> None:
    assert check_extra_count(extra_count, world_size) == extra_count


def test_extra_count_of_a_subclass_becomes_int() -> None:
    assert type(check_extra_count(Number.ONE, 2)) is int


@pytest.mark.parametrize("extra_count", [-1, 4, 5, 2**64, -(2**64), HUGE])
def test_extra_count_out_of_range(extra_count: int) -> None:
    with pytest.raises(ValueError, match="^extra_count: expected 0 to 3, as world_size is 4, got"):
        check_extra_count(extra_count, 4)


@pytest.mark.parametrize("extra_count", [True, False, None, 1.0, "1", np.int64(1), [1], float("nan")])
def test_extra_count_of_another_type(extra_count: Any) -> None:
    with pytest.raises(TypeError, match="^extra_count: expected int, got"):
        check_extra_count(extra_count, 4)


def test_defaults() -> None:
    config = ArenaConfig("8GiB")
    assert dataclasses.asdict(config) == {
        "capacity": 8 * GIB,
        "block_size": 64 * KIB,
        "slots": 131_072,
        "lanes": 64,
        "regions": 8,
        "fingerprint": "",
        "read_lease_s": 300.0,
        "write_lease_s": 600.0,
        "lock_timeout_s": 5.0,
        "populate": False,
        "eviction": "segmented",
        "eviction_window_s": 180.0,
    }
    assert ArenaConfig(capacity=8 * GIB) == config


def test_everything_stated() -> None:
    config = ArenaConfig(
        capacity=4096,
        block_size="4KiB",
        slots=1,
        lanes=256,
        fingerprint="ü" * 128,
        read_lease_s=1,
        write_lease_s=0.5,
        lock_timeout_s=1e9,
        populate=True,
        eviction="lru",
        eviction_window_s=1,
    )
    assert (config.capacity, config.block_size, config.slots, config.lanes) == (4096, 4096, 1, 256)
    assert type(config.read_lease_s) is float
    assert (config.fingerprint, config.populate) == ("ü" * 128, True)
    assert (config.eviction, config.eviction_window_s) == ("lru", 1.0)


def test_default_slots_are_limited() -> None:
    assert ArenaConfig("8TiB").slots == 2**20
    assert ArenaConfig("8TiB", block_size="1GiB").slots == 8192


def test_most_blocks() -> None:
    assert ArenaConfig("8TiB", block_size=4096).capacity == 2**31 * 4096
    with pytest.raises(ValueError, match=r"^capacity: expected at most 2147483648 blocks of 4096 bytes, got"):
        ArenaConfig(2**31 * 4096 + 4096, block_size=4096)


def test_frozen_hashable_and_copied() -> None:
    config = ArenaConfig("1MiB", fingerprint="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lanes = 3  # type: ignore[misc] # that it cannot be is the test
    assert hash(config) == hash(ArenaConfig(MIB, fingerprint="x"))
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - our own bytes
    assert dataclasses.replace(config, lanes=2) == ArenaConfig("1MiB", lanes=2, fingerprint="x")
    with pytest.raises(ValueError, match="^lanes"):
        dataclasses.replace(config, lanes=0)


WRONG_VALUES = [
    ("capacity", 0),
    ("capacity", -65536),
    ("capacity", 65537),
    ("capacity", "1B"),
    ("capacity", "lots"),
    ("capacity", 2**100),
    ("block_size", 0),
    ("block_size", 2048),
    ("block_size", 65537),
    ("block_size", "48KiB"),
    ("block_size", "2GiB"),
    ("block_size", "64KB"),
    ("slots", 0),
    ("slots", -1),
    ("slots", 2**20 + 1),
    ("slots", 2**400),
    ("lanes", 0),
    ("lanes", 257),
    ("fingerprint", "x" * 257),
    ("fingerprint", "ü" * 129),
    ("fingerprint", "a\0b"),
    ("fingerprint", "\ud800"),
    ("eviction", "fifo"),
    ("eviction", ""),
    ("eviction", "LRU"),
    ("eviction_window_s", 0),
    ("eviction_window_s", 1e8),
    *[
        (lease, seconds)
        for lease in ("read_lease_s", "write_lease_s", "lock_timeout_s")
        for seconds in (0, 0.0, -1, 1e-9, float("inf"), float("-inf"), float("nan"), 10**400, 2e9)
    ],
]


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_wrong_values(field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"capacity": "1GiB", field: value}
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got "):
        ArenaConfig(**arguments)


WRONG_TYPES = [
    *[("capacity", value) for value in (None, True, 1e9, b"1GiB")],
    *[("block_size", value) for value in (None, True, 65536.0)],
    *[("slots", value) for value in (True, 1.0, "1", np.int64(1))],
    *[("lanes", value) for value in (None, True, 1.0, "64")],
    *[("fingerprint", value) for value in (None, b"x", 1)],
    *[(lease, v) for lease in ("read_lease_s", "write_lease_s", "lock_timeout_s") for v in (None, True, "1", 1j)],
    *[("populate", value) for value in (None, 1, 0, "yes")],
    *[("eviction", value) for value in (None, 1, b"lru")],
    *[("eviction_window_s", value) for value in (None, True, "180")],
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_wrong_types(field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"capacity": "1GiB", field: value}
    with pytest.raises(TypeError, match=rf"^{field}: expected .* got "):
        ArenaConfig(**arguments)


def test_unknown_field_and_no_capacity() -> None:
    with pytest.raises(TypeError, match="capcity"):
        ArenaConfig("1GiB", capcity="1GiB")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="capacity"):
        ArenaConfig()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        ArenaConfig("1GiB", 65536)  # type: ignore[call-arg]


def test_shown_is_short_and_never_fails() -> None:
    assert shown(7) == "7"
    assert shown("a") == "'a'"
    assert shown(None) == "None (NoneType)"
    assert shown(True) == "True (bool)"
    assert shown(10**5000) == "something that cannot be printed (int)"
    assert shown((10**5000,)) == "something that cannot be printed (tuple)"
    assert len(shown("x" * 10**6)) <= 100
