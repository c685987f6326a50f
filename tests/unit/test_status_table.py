"""Every method against every state that a key can be in; and what every entry refuses, before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from arena_support import Join, contents, pattern

from shmcache import ArenaConfig, Cache, Layout, ReadBatch, Status, WriteBatch

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NO_SHARE, LOCKED, NOT_OWNER = Status.NO_SHARE, Status.LOCKED, Status.NOT_OWNER


@dataclass
class Engine:
    """A controller and two ranks; rank 0 is whose statuses are looked at."""

    controller: Cache
    ranks: tuple[Cache, Cache]
    kept: list[WriteBatch | ReadBatch]

    @property
    def own(self) -> Cache:
        return self.ranks[0]


@pytest.fixture
def engine(join: Join) -> Engine:
    return Engine(join("engine", None, 2), (join("engine", 0, 2), join("engine", 1, 2)), [])


def absent(engine: Engine, key: bytes = b"k") -> None:
    """No object of this key, and there was one."""
    engine.own.put(key, b"x")
    engine.own.delete([key])


def ready(engine: Engine, key: bytes = b"k") -> None:
    """An object without shares."""
    engine.own.put(key, b"data")


def written(engine: Engine, key: bytes = b"k") -> None:
    engine.kept.append(engine.own.reserve_write([key], 4))


def written_by_another(engine: Engine, key: bytes = b"k") -> None:
    engine.kept.append(engine.ranks[1].reserve_write([key], 4))


def reserved(engine: Engine, key: bytes = b"k") -> None:
    """A share is reserved for this lane."""
    ready(engine, key)
    engine.controller.reserve_read([key])


def reserved_for_another(engine: Engine, key: bytes = b"k") -> None:
    ready(engine, key)
    engine.controller.reserve_read([key], 1)
    engine.own.finish_read([key])


def held(engine: Engine, key: bytes = b"k") -> None:
    ready(engine, key)
    engine.kept.append(engine.own.read([key]))


def held_by_another(engine: Engine, key: bytes = b"k") -> None:
    ready(engine, key)
    engine.kept.append(engine.ranks[1].read([key]))


def held_and_reserved(engine: Engine, key: bytes = b"k") -> None:
    held(engine, key)
    engine.controller.reserve_read([key])


State = Callable[..., None]  #: of an engine and a key: brings the key into it
Call = Callable[[Cache, Sequence[bytes]], "list[Status]"]

METHODS: dict[str, Call] = {
    "reserve_write": lambda cache, keys: discard(cache.reserve_write(keys, 8)),
    "put": lambda cache, keys: [cache.put(key, b"new") for key in keys],
    "finish_write": lambda cache, keys: cache.finish_write(keys),
    "finish_write_and_reserve_read": lambda cache, keys: cache.finish_write_and_reserve_read(keys, 1),
    "abort_write": lambda cache, keys: cache.abort_write(keys),
    "status": lambda cache, keys: cache.status(keys),
    "touch": lambda cache, keys: cache.touch(keys),
    "reserve_read": lambda cache, keys: cache.reserve_read(keys, 1),
    "read": lambda cache, keys: discard(cache.read(keys)),
    "read prefix": lambda cache, keys: discard(cache.read(keys, prefix=True)),
    "finish_read": lambda cache, keys: cache.finish_read(keys),
    "cancel_read": lambda cache, keys: cache.cancel_read(keys, 1),
    "delete": lambda cache, keys: cache.delete(keys),
    "delete by force": lambda cache, keys: cache.delete(keys, force=True),
}


def discard(batch: WriteBatch | ReadBatch) -> list[Status]:
    """The statuses of a batch, which is ended."""
    found = batch.status
    if isinstance(batch, ReadBatch):
        batch.release()
    else:
        batch.abort()
    return found


# A row a state; what is not named gives the state's "else".
SHARED = {"else": OK, "reserve_write": EXISTS, "put": EXISTS, "finish_write": EXISTS}
SHARED |= {"finish_write_and_reserve_read": EXISTS, "abort_write": EXISTS, "delete": LOCKED}
TABLE: list[tuple[State, dict[str, Status]]] = [
    (absent, {"else": NOT_FOUND, "reserve_write": OK, "put": OK}),
    (ready, SHARED | {"finish_read": NO_SHARE, "cancel_read": NO_SHARE, "delete": OK}),
    (
        written,
        {"else": IN_FLIGHT, "finish_write": OK, "finish_write_and_reserve_read": OK, "abort_write": OK}
        | {"finish_read": NO_SHARE, "cancel_read": NO_SHARE, "delete": LOCKED, "delete by force": LOCKED},
    ),
    (
        written_by_another,
        {"else": IN_FLIGHT, "finish_write": NOT_OWNER, "finish_write_and_reserve_read": NOT_OWNER}
        | {"abort_write": NOT_OWNER, "finish_read": NO_SHARE, "cancel_read": NO_SHARE}
        | {"delete": LOCKED, "delete by force": LOCKED},
    ),
    (reserved, SHARED),
    (reserved_for_another, SHARED | {"finish_read": NO_SHARE}),
    (held, SHARED | {"finish_read": NO_SHARE, "cancel_read": NO_SHARE, "delete by force": LOCKED}),
    (held_by_another, SHARED | {"finish_read": NO_SHARE, "cancel_read": NO_SHARE, "delete by force": LOCKED}),
    (held_and_reserved, SHARED | {"delete by force": LOCKED}),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("state", "row"), TABLE, ids=[state.__name__ for state, _ in TABLE])
def test_every_method_in_every_state(engine: Engine, state: State, row: dict[str, Status], method: str) -> None:
    state(engine)
    expected = row.get(method, row["else"])
    assert METHODS[method](engine.own, [b"k"]) == [expected]
    assert engine.own.verify() == []
    for batch in engine.kept:
        discard(batch)


@pytest.mark.parametrize(("state", "row"), TABLE, ids=[state.__name__ for state, _ in TABLE])
def test_lookup_in_every_state(engine: Engine, state: State, row: dict[str, Status]) -> None:
    state(engine)
    engine.own.put(b"before", b"x")
    engine.own.put(b"after", b"x")
    found = 3 if row["else"] == OK else 1
    assert engine.own.lookup([b"before", b"k", b"after"]) == found
    assert engine.own.lookup([b"k", b"before"]) == (2 if found == 3 else 0)
    for batch in engine.kept:
        discard(batch)


# What a method changes besides its status


def shares(cache: Cache) -> tuple[int, int]:
    stats = cache.stats()
    return stats.reserved, stats.held


def test_a_read_claims_before_it_takes_a_fresh_share(engine: Engine) -> None:
    engine.own.put(b"k", b"data")
    engine.controller.reserve_read([b"k"], 1)
    with engine.own.read([b"k"]):
        assert shares(engine.own) == (1, 1), "rank 1's share is its own"
        with engine.own.read([b"k"]):
            assert shares(engine.own) == (1, 2)
        assert shares(engine.own) == (1, 1)
    assert shares(engine.own) == (1, 0)
    counters = engine.own.stats().counters
    assert (counters.grants, counters.claims, counters.read_hits, counters.releases) == (2, 1, 2, 2)


def test_a_controller_reads_for_itself(engine: Engine) -> None:
    engine.own.put(b"k", b"data")
    engine.controller.reserve_read([b"k"])
    with engine.controller.read([b"k"]):
        assert shares(engine.own) == (1, 1)
    assert engine.controller.finish_read([b"k"]) == [NO_SHARE], "what it granted is rank 0's"
    assert engine.own.finish_read([b"k"]) == [OK]


def test_cancel_read_takes_one_share_from_each_rank(engine: Engine) -> None:
    engine.own.put(b"k", b"data")
    for _ in range(3):
        engine.controller.reserve_read([b"k"], 1)
    with engine.own.read([b"k"]):
        assert engine.controller.cancel_read([b"k"], 1) == [OK]
        assert shares(engine.own) == (3, 1)
        assert engine.controller.cancel_read([b"k"]) == [OK]
        assert engine.controller.cancel_read([b"k"]) == [NO_SHARE], "rank 0 has none unclaimed"
        assert engine.controller.cancel_read([b"k"], 1) == [OK], "rank 1 has"
        assert engine.controller.cancel_read([b"k"], 1) == [OK]
        assert engine.controller.cancel_read([b"k"], 1) == [NO_SHARE]
        assert shares(engine.own) == (0, 1)
    assert engine.own.stats().counters.reserved_returned == 5


@pytest.mark.parametrize("extra_count", [0, 1])
def test_a_grant_goes_to_ranks_0_to_extra_count(engine: Engine, extra_count: int) -> None:
    batch = engine.controller.reserve_write([b"a", b"b"], 8)
    assert batch.status == [OK, OK]
    assert engine.controller.finish_write_and_reserve_read([b"a", b"b", b"c"], extra_count) == [OK, OK, NOT_FOUND]
    assert engine.ranks[0].finish_read([b"a", b"b"]) == [OK, OK]
    assert engine.ranks[1].finish_read([b"a", b"b"]) == [OK if extra_count else NO_SHARE] * 2
    assert shares(engine.own) == (0, 0)
    assert batch.publish() == [EXISTS, EXISTS]


def test_force_takes_reserved_shares_along(engine: Engine) -> None:
    reserved(engine)
    engine.controller.reserve_read([b"k"], 1)
    assert engine.controller.delete([b"k"], force=True) == [OK]
    assert shares(engine.own) == (0, 0)
    assert engine.own.finish_read([b"k"]) == [NOT_FOUND]
    ready(engine)
    assert engine.own.finish_read([b"k"]) == [NO_SHARE], "a share of the object before is none of this one"


def test_a_lane_has_65535_reserved_and_16383_held_shares_of_an_object_at_most(engine: Engine) -> None:
    ready(engine)
    assert engine.controller.reserve_read([b"k"] * 65535) == [OK] * 65535
    assert engine.controller.reserve_read([b"k"]) == [NO_SHARE]
    assert engine.controller.reserve_read([b"k"], 1) == [NO_SHARE], "all ranks or none"
    assert shares(engine.own) == (65535, 0)
    with engine.own.read([b"k"] * 16383) as batch:
        assert batch.status == [OK] * 16383
        assert shares(engine.own) == (65535 - 16383, 16383)
        assert engine.own.read([b"k"]).status == [NO_SHARE], "a reserved share cannot be claimed, either"
        assert engine.controller.reserve_read([b"k"], 1) == [OK]
        assert shares(engine.own) == (65535 - 16383 + 2, 16383)
    assert shares(engine.own) == (65535 - 16383 + 2, 0)
    assert engine.own.verify() == []


# Keys

AWKWARD = [b"\0", b"\0\0", b"a", b"a\0", b"a" * 8, b"a" * 8 + b"\0", b"a" * 31, b"a" * 32, b"a" * 33]
AWKWARD += [b"a" * 63, b"a" * 64, b"\xff" * 64, bytes(64), bytes(63)]


def test_keys_that_differ_in_length_or_trailing_zeros_only(cache: Cache) -> None:
    for key in AWKWARD:
        assert cache.status([key]) == [NOT_FOUND]
        assert cache.put(key, pattern(key, 100)) == OK
    with cache.read(AWKWARD) as batch:
        assert contents(batch) == [pattern(key, 100) for key in AWKWARD]
    assert cache.delete(AWKWARD[::2]) == [OK] * len(AWKWARD[::2])
    assert cache.status(AWKWARD) == [NOT_FOUND, OK] * (len(AWKWARD) // 2)


SHAPES: dict[str, Callable[[list[bytes]], Any]] = {
    "list": list,
    "tuple": tuple,
    "matrix": lambda keys: np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
    "bytearrays": lambda keys: [bytearray(key) for key in keys],
    "mixed types": lambda keys: [
        kind(key) for key, kind in zip(keys, [bytes, bytearray, memoryview] * 27, strict=False)
    ],
}


STATES: dict[State, dict[str, Status]] = dict(TABLE)
IN_TURN: list[State] = [ready, written, reserved, absent]
WITHOUT_PUT = [method for method in METHODS if method != "put"]  #: which takes one key


@pytest.mark.parametrize("method", WITHOUT_PUT)
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_in_every_shape(engine: Engine, shape: str, method: str) -> None:
    """80 keys are more than the core takes at a time."""
    keys = [b"key-%04d" % i for i in range(80)]
    rows = [STATES[IN_TURN[i % 4]] for i in range(80)]
    for i, key in enumerate(keys):
        IN_TURN[i % 4](engine, key)
    expected = [row.get(method, row["else"]) for row in rows]
    if method == "read prefix":
        expected[2:] = [NOT_FOUND] * 78
    assert METHODS[method](engine.own, SHAPES[shape](keys)) == expected
    assert engine.own.verify() == []
    for batch in engine.kept:
        discard(batch)


def test_put_takes_every_kind_of_key(cache: Cache) -> None:
    for i, kind in enumerate([bytes, bytearray, memoryview]):
        assert cache.put(kind(b"%d" % i), b"x") == OK
    assert cache.lookup([b"0", b"1", b"2"]) == 3


@pytest.mark.parametrize("method", WITHOUT_PUT)
@pytest.mark.parametrize("keys", [[], (), np.empty((0, 8), np.uint8)], ids=["list", "tuple", "matrix"])
def test_no_keys(engine: Engine, method: str, keys: Any) -> None:
    assert METHODS[method](engine.own, keys) == []
    assert engine.own.lookup(keys) == 0


DUPLICATES: list[tuple[State, str, list[Status]]] = [
    (absent, "reserve_write", [OK, IN_FLIGHT, IN_FLIGHT]),
    (absent, "put", [OK, EXISTS, EXISTS]),
    (written, "finish_write", [OK, EXISTS, EXISTS]),
    (written, "finish_write_and_reserve_read", [OK, EXISTS, EXISTS]),
    (written, "abort_write", [OK, NOT_FOUND, NOT_FOUND]),
    (reserved, "finish_read", [OK, NO_SHARE, NO_SHARE]),
    (reserved, "cancel_read", [OK, NO_SHARE, NO_SHARE]),
    (ready, "reserve_read", [OK, OK, OK]),
    (ready, "read", [OK, OK, OK]),
    (ready, "touch", [OK, OK, OK]),
    (ready, "delete", [OK, NOT_FOUND, NOT_FOUND]),
    (reserved, "delete by force", [OK, NOT_FOUND, NOT_FOUND]),
]


@pytest.mark.parametrize(("state", "method", "expected"), DUPLICATES, ids=[method for _, method, _ in DUPLICATES])
def test_a_key_three_times_in_a_batch(engine: Engine, state: State, method: str, expected: list[Status]) -> None:
    state(engine)
    assert METHODS[method](engine.own, [b"k", b"k", b"k"]) == expected
    assert engine.own.verify() == []
    for batch in engine.kept:
        discard(batch)


# What is refused

BAD_KEYS: list[Any] = [
    None,
    7,
    b"key",
    "key",
    {b"k": 1},
    iter([b"k"]),
    [b"k", b""],
    [b"k", b"x" * 65],
    [b""],
    [b"x" * 65],
    [b"k", "text"],
    [b"k", None],
    [b"k", 7],
    [[b"k"]],
    np.zeros((2, 0), np.uint8),
    np.zeros((2, 65), np.uint8),
    np.zeros(8, np.uint8),
    np.zeros((2, 2, 2), np.uint8),
    np.zeros((2, 8), np.int8),
    np.zeros((2, 8), np.float32),
    np.zeros((2, 16), np.uint8)[:, ::2],
    np.asfortranarray(np.zeros((2, 8), np.uint8)),
]


@pytest.mark.parametrize("method", [*WITHOUT_PUT, "lookup"])
def test_bad_keys_are_refused_before_anything_is_done(engine: Engine, method: str) -> None:
    reserved(engine)
    before = engine.own.stats()
    for keys in BAD_KEYS:
        with pytest.raises((TypeError, ValueError), match="^keys"):
            engine.own.lookup(keys) if method == "lookup" else METHODS[method](engine.own, keys)
        assert engine.own.stats() == before, keys


@pytest.mark.parametrize("key", [b"", b"x" * 65, "k", None, 7, [b"k"]])
def test_put_refuses_bad_keys(cache: Cache, key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^keys\[0\]"):
        cache.put(key, b"x")


BAD_COUNTS: list[tuple[Any, type[Exception]]] = [
    (True, TypeError),
    (False, TypeError),
    (1.0, TypeError),
    (None, TypeError),
    ("1", TypeError),
    ([1], TypeError),
    (-1, ValueError),
    (2, ValueError),
    (2**63, ValueError),
    (-(2**63), ValueError),
]
GRANTING: dict[str, Callable[[Engine, Any], object]] = {
    "reserve_read": lambda engine, count: engine.own.reserve_read([b"k"], count),
    "reserve_read, by name": lambda engine, count: engine.own.reserve_read([b"k"], extra_count=count),
    "cancel_read": lambda engine, count: engine.own.cancel_read([b"k"], count),
    "finish_write": lambda engine, count: engine.own.finish_write_and_reserve_read([b"k"], count),
    "publish": lambda engine, count: written_batch(engine).publish_and_reserve_read(count),
}


def written_batch(engine: Engine) -> WriteBatch:
    batch = engine.kept[0]
    assert isinstance(batch, WriteBatch)
    return batch


@pytest.mark.parametrize(("count", "error"), BAD_COUNTS)
@pytest.mark.parametrize("entry", GRANTING)
def test_extra_count_is_checked_at_every_entry(engine: Engine, entry: str, count: Any, error: type[Exception]) -> None:
    (written if entry in {"finish_write", "publish"} else reserved)(engine)
    before = engine.own.stats()
    with pytest.raises(error, match="^extra_count: expected"):
        GRANTING[entry](engine, count)
    assert engine.own.stats() == before
    GRANTING[entry](engine, 1)
    assert engine.own.stats().reserved == (0 if entry == "cancel_read" else 3 if entry.startswith("reserve") else 2)
    if entry == "finish_write":
        assert written_batch(engine).publish() == [EXISTS]


def test_extra_count_without_a_group(cache: Cache) -> None:
    cache.put(b"k", b"x")
    assert cache.reserve_read([b"k"], 0) == [OK]
    with pytest.raises(ValueError, match="^extra_count: expected 0 to 0, as world_size is 1, got 1"):
        cache.reserve_read([b"k"], 1)
    assert cache.cancel_read([b"k"], 0) == [OK]


BAD_LAYOUTS: list[Any] = [None, 0, -1, 2**48 + 1, True, 1.0, "8", b"8", {}, [8], [8, 8, 8], [8, 0], [8, None]]
BAD_LAYOUTS += [[8, True], [8, "8"], (8, [8]), ((8,), "uint8"), np.int64(8)]


@pytest.mark.parametrize("layout", BAD_LAYOUTS, ids=range(len(BAD_LAYOUTS)))
def test_bad_layouts_are_refused_before_anything_is_done(cache: Cache, layout: Any) -> None:
    before = cache.stats()
    with pytest.raises((TypeError, ValueError), match="^layout: expected"):
        cache.reserve_write([b"a", b"b"], layout)
    assert cache.stats() == before


@pytest.mark.parametrize("layout", [[8, 5000], (8, 5000), [8, Layout((2500,), "float16")]])
def test_a_layout_a_key(cache: Cache, layout: Any) -> None:
    with cache.reserve_write([b"a", b"b"], layout) as batch:
        assert [len(view) for view in batch.views if view is not None] == [8, 5000]


BAD_OPTIONS: list[tuple[Callable[[Cache, Any], object], str, list[Any]]] = [
    (
        lambda cache, bad: cache.reserve_write([b"a"], 8, region=bad),
        "region",
        ["", "cuda", "cpu", b"", False, -1, 1, 9, 1.0],
    ),
    (lambda cache, bad: cache.reserve_write([b"a"], 8, writers=bad), "writers", [0, 2, -1, None, "1", True]),
    (lambda cache, bad: cache.reserve_write([b"a"], 8, temporary=bad), "temporary", [0, 1, None, "yes"]),
    (lambda cache, bad: cache.delete([b"k"], force=bad), "force", [0, 1, None, "yes"]),
    (lambda cache, bad: cache.evict(bad), "nbytes", [-1, 2**63, True, 1.0, None, "1MiB"]),
    (lambda cache, bad: cache.put(b"a", bad), "data", [b"", bytearray(), None, 7, "text", [1], np.zeros((4, 4))[:, 1]]),
]
BAD_CALLS = [(call, what, bad) for call, what, values in BAD_OPTIONS for bad in values]


@pytest.mark.parametrize(("call", "what", "bad"), BAD_CALLS)
def test_bad_options_are_refused_before_anything_is_done(
    cache: Cache, call: Callable[[Cache, Any], object], what: str, bad: Any
) -> None:
    cache.put(b"k", b"x")
    before = cache.stats()
    with pytest.raises((TypeError, ValueError), match=f"^{what}: expected"):
        call(cache, bad)
    assert cache.stats() == before
    assert cache.status([b"k"]) == [OK]


BUFFERS: list[Any] = [
    b"12345678",
    bytearray(b"12345678"),
    memoryview(b"12345678"),
    np.frombuffer(b"12345678", np.uint8),
]
BUFFERS += [np.frombuffer(b"12345678", np.int64), np.frombuffer(b"12345678", np.uint16).reshape(2, 2)]


@pytest.mark.parametrize("data", BUFFERS, ids=range(len(BUFFERS)))
def test_put_copies_any_contiguous_buffer(cache: Cache, data: Any) -> None:
    assert cache.put(b"k", data) == OK
    if isinstance(data, bytearray):
        data[:] = b"********"
    with cache.read([b"k"]) as batch:
        assert contents(batch) == [b"12345678"]


@pytest.mark.parametrize("config", [ArenaConfig("64KiB", block_size="4KiB", lanes=1)])
def test_one_lane_is_enough(cache: Cache) -> None:
    assert cache.put(b"k", b"x") == OK
    assert cache.reserve_read([b"k"]) == [OK]
    with cache.read([b"k"]) as batch:
        assert batch.status == [OK]
    assert cache.verify() == []
