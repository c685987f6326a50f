"""reserve_write(writers=n): n lanes of a group fill one object together."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from arena_support import Join, contents, pattern

import shmcache
from shmcache import ArenaConfig, Cache, ClosedError, GroupError, Layout, Status, WriteBatch

OK, NOT_FOUND, IN_FLIGHT, EXISTS = Status.OK, Status.NOT_FOUND, Status.IN_FLIGHT, Status.EXISTS
NOT_OWNER, NO_SPACE, LOCKED = Status.NOT_OWNER, Status.NO_SPACE, Status.LOCKED
BLOCK = 4096
PART = 1000  #: bytes of one writer
SHORT_WRITE_LEASE = ArenaConfig("64KiB", block_size="4KiB", lanes=8, write_lease_s=0.05)


@pytest.fixture
def ranks(join: Join) -> list[Cache]:
    return [join("engine", rank, 3) for rank in range(3)]


def fill(batch: WriteBatch, rank: int) -> None:
    """Writes this rank's part of the first object."""
    view = batch.views[0]
    assert view is not None
    view[rank * PART : (rank + 1) * PART] = pattern(bytes([rank]), PART)


def whole(ranks: int) -> bytes:
    return b"".join(pattern(bytes([rank]), PART) for rank in range(ranks))


def reserve(ranks: list[Cache], *, temporary: bool = False) -> list[WriteBatch]:
    """All of them have their part, and have filled it."""
    n = len(ranks)
    batches = [rank.reserve_write([b"k"], n * PART, writers=n, temporary=temporary) for rank in ranks]
    assert [batch.status for batch in batches] == [[OK]] * n
    for rank, batch in enumerate(batches):
        fill(batch, rank)
    return batches


def shares(cache: Cache) -> list[tuple[int, int]]:
    """Reserved and held shares of each rank."""
    lanes = sorted(
        (lane for lane in shmcache.inspect(cache.name).lanes if lane.role == "rank"), key=lambda lane: lane.rank
    )
    return [(lane.reserved, lane.held) for lane in lanes]


def is_sound_and_empty(cache: Cache) -> None:
    stats = cache.stats()
    assert (stats.objects, stats.writing, stats.used_bytes, stats.reserved, stats.held) == (0, 0, 0, 0, 0)
    assert cache.verify() == []


# All goes well


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_last_to_finish_publishes(ranks: list[Cache], order: tuple[int, ...]) -> None:
    batches = reserve(ranks)
    for rank in order:
        assert ranks[0].status([b"k"]) == [IN_FLIGHT]
        assert ranks[0].lookup([b"k"]) == 0
        assert batches[rank].publish() == [OK]
    for rank in ranks:
        with rank.read([b"k"]) as found:
            assert contents(found) == [whole(3)]
    stats = ranks[0].stats()
    assert (stats.objects, stats.counters.publishes, stats.counters.published_bytes) == (1, 1, 3 * PART)
    assert ranks[0].verify() == []


def test_all_writers_have_one_memory(ranks: list[Cache]) -> None:
    batches = reserve(ranks)
    assert ranks[0].stats().used_bytes == BLOCK
    assert ranks[0].stats().writing == 1
    assert [contents_of(batch) == whole(3) for batch in batches] == [True] * 3
    assert [batch.publish() for batch in batches] == [[OK]] * 3


def contents_of(batch: WriteBatch) -> bytes:
    view = batch.views[0]
    assert view is not None
    return bytes(view)


def test_a_writer_may_finish_before_another_joins(ranks: list[Cache]) -> None:
    for number, rank in enumerate(ranks):
        batch = rank.reserve_write([b"k"], 3 * PART, writers=3)
        assert batch.status == [OK]
        fill(batch, number)
        assert batch.publish() == [OK]
    with ranks[1].read([b"k"]) as found:
        assert contents(found) == [whole(3)]


def test_by_key_as_by_batch(ranks: list[Cache]) -> None:
    kept = reserve(ranks)
    assert [rank.finish_write([b"k"]) for rank in ranks] == [[OK]] * 3
    assert [rank.finish_write([b"k"]) for rank in ranks] == [[EXISTS]] * 3
    assert [batch.publish() for batch in kept] == [[EXISTS]] * 3
    assert ranks[0].lookup([b"k"]) == 1


def test_a_part_is_finished_once(ranks: list[Cache]) -> None:
    kept = reserve(ranks)
    assert ranks[0].finish_write([b"k"]) == [OK]
    assert ranks[0].finish_write([b"k"]) == [NOT_OWNER]
    assert ranks[0].abort_write([b"k"]) == [NOT_OWNER], "what is done is not given up"
    assert kept[0].publish() == [NOT_OWNER]
    assert ranks[0].status([b"k"]) == [IN_FLIGHT]
    assert [ranks[1].finish_write([b"k"]), ranks[2].finish_write([b"k"])] == [[OK], [OK]]
    assert ranks[0].lookup([b"k"]) == 1


def test_a_batch_has_parts_in_many_writes_with_layouts(ranks: list[Cache]) -> None:
    keys = [f"key {i}".encode() for i in range(40)]
    layout = Layout((4, 3, 5), "bfloat16")
    batches = [rank.reserve_write(keys, layout, writers=3) for rank in ranks]
    for number, batch in enumerate(batches):
        for tensor in batch.tensors():
            tensor[number] = number
            if number == 0:
                tensor[3] = 9
        del tensor
        assert batch.publish() == [OK] * 40
    with ranks[2].read(keys) as found:
        for tensor in found.tensors():
            assert tensor.amax(dim=(1, 2)).tolist() == [0.0, 1.0, 2.0, 9.0]
        del tensor


@pytest.mark.parametrize(
    ("asked", "expected"),
    [((None, None, None), 0), ((2, 2, 2), 3), ((1, None, None), 2), ((None, 0, None), 1), ((0, 2, 1), 3)],
)
def test_shares_are_granted_once_for_the_most_ranks_that_were_asked_for(
    ranks: list[Cache], asked: tuple[int | None, ...], expected: int
) -> None:
    for batch, extra in zip(reserve(ranks), asked, strict=True):
        found = batch.publish() if extra is None else batch.publish_and_reserve_read(extra)
        assert found == [OK]
    assert shares(ranks[0]) == [(1, 0)] * expected + [(0, 0)] * (3 - expected)
    assert ranks[0].stats().counters.grants == expected


def test_granted_shares_keep_the_object_and_the_last_frees_a_temporary_one(ranks: list[Cache]) -> None:
    for batch in reserve(ranks, temporary=True):
        assert batch.publish_and_reserve_read(2) == [OK]
    assert ranks[0].delete([b"k"]) == [LOCKED]
    for rank in ranks:
        with rank.read([b"k"]) as found:
            assert contents(found) == [whole(3)]
    is_sound_and_empty(ranks[0])


def test_fewer_writers_than_ranks(ranks: list[Cache]) -> None:
    two = [ranks[2], ranks[0]]
    batches = reserve(two)
    assert ranks[1].reserve_write([b"k"], 2 * PART, writers=2).status == [IN_FLIGHT], "both parts are taken"
    assert [batch.publish() for batch in batches] == [[OK], [OK]]
    assert ranks[1].reserve_write([b"k"], 2 * PART, writers=2).status == [EXISTS]


# Who may join


def test_a_writer_joins_once(ranks: list[Cache]) -> None:
    first = ranks[0].reserve_write([b"k", b"k"], PART, writers=3)
    assert first.status == [OK, IN_FLIGHT]
    assert ranks[0].reserve_write([b"k"], PART, writers=3).status == [IN_FLIGHT]
    assert first.publish() == [OK, IN_FLIGHT]
    assert ranks[0].reserve_write([b"k"], PART, writers=3).status == [IN_FLIGHT], "its part is done"


def test_only_the_group_may_join(ranks: list[Cache], join: Join) -> None:
    batches = reserve(ranks[:2])
    stranger = join("another", 0, 3)
    assert stranger.reserve_write([b"k"], 2 * PART, writers=2).status == [IN_FLIGHT]
    assert stranger.put(b"k", b"x") == IN_FLIGHT
    assert [batch.publish() for batch in batches] == [[OK], [OK]]


def test_one_writer_and_several_do_not_mix(ranks: list[Cache]) -> None:
    alone = ranks[0].reserve_write([b"k"], PART)
    assert ranks[1].reserve_write([b"k"], PART, writers=2).status == [IN_FLIGHT]
    assert alone.abort() == [OK]
    together = ranks[1].reserve_write([b"k"], PART, writers=2)
    assert ranks[0].reserve_write([b"k"], PART).status == [IN_FLIGHT]
    assert together.abort() == [OK]


@pytest.mark.parametrize(
    "call",
    [
        lambda rank: rank.reserve_write([b"other", b"k"], PART, writers=2),
        lambda rank: rank.reserve_write([b"other", b"k"], PART + 1, writers=3),
        lambda rank: rank.reserve_write([b"other", b"k"], Layout((PART,), "uint8"), writers=3),
        lambda rank: rank.reserve_write([b"other", b"k"], PART, writers=3, temporary=True),
    ],
)
def test_other_terms_are_an_error_that_leaves_nothing(ranks: list[Cache], call: Callable[[Cache], object]) -> None:
    first = ranks[0].reserve_write([b"k"], PART, writers=3)
    with pytest.raises(GroupError, match=f"group 'engine' is writing key {b'k'.hex()} with other terms"):
        call(ranks[1])
    assert ranks[0].stats().writing == 1
    assert ranks[0].status([b"other", b"k"]) == [NOT_FOUND, IN_FLIGHT]
    others = [rank.reserve_write([b"k"], PART, writers=3) for rank in ranks[1:]]
    assert [batch.publish() for batch in (first, *others)] == [[OK]] * 3


def test_a_controller_may_be_a_writer(ranks: list[Cache], join: Join) -> None:
    controller = join("engine", None, 3)
    batches = reserve([ranks[0], controller])
    assert [batch.publish() for batch in batches] == [[OK], [OK]]


# One gives up


@pytest.mark.parametrize("how", ["abort", "abort_write", "dropped", "exception", "close"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_one_that_gives_up_ends_it_for_all(ranks: list[Cache], how: str, done: int) -> None:
    batches = [rank.reserve_write([b"k"], 3 * PART, writers=3) for rank in ranks]
    for rank, batch in enumerate(batches[:done]):
        fill(batch, rank)
        assert batch.publish() == [OK]
    give_up(ranks[2], batches.pop(), how)
    assert ranks[0].status([b"k"]) == [NOT_FOUND], "the key is free at once"
    assert (ranks[0].stats().used_bytes == 0) == (done == 2), "the memory when nobody fills it"
    assert ranks[1].put(b"k", b"another") == OK
    for rank, batch in enumerate(batches[done:], start=done):
        fill(batch, rank)  # into memory that is nobody else's yet
        assert batch.publish()[0] in {NOT_OWNER, NOT_FOUND}
    with ranks[0].read([b"k"]) as found:
        assert contents(found) == [b"another"]
    assert ranks[0].delete([b"k"]) == [OK]
    is_sound_and_empty(ranks[0])


def give_up(cache: Cache, batch: WriteBatch, how: str) -> None:
    if how == "abort":
        assert batch.abort() == [OK]
    elif how == "abort_write":
        assert cache.abort_write([b"k"]) == [OK]
    elif how == "dropped":
        with pytest.warns(ResourceWarning, match="was dropped unfinished"):
            batch.__del__()
        assert batch.abort() == [NOT_FOUND if cache.stats().writing == 0 else NOT_OWNER]
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), batch:
            raise ZeroDivisionError
    else:
        cache.close()
        with pytest.raises(ClosedError):
            batch.abort()


def test_all_give_up(ranks: list[Cache]) -> None:
    batches = reserve(ranks)
    assert batches[0].abort() == [OK]
    assert ranks[0].stats().used_bytes == BLOCK
    assert batches[1].abort()[0] in {NOT_OWNER, NOT_FOUND}
    assert ranks[1].abort_write([b"k"]) == [NOT_FOUND]
    assert ranks[2].finish_write([b"k"]) == [NOT_OWNER], "its part is given back by that"
    is_sound_and_empty(ranks[0])


def test_a_part_that_is_done_outlives_its_writer(ranks: list[Cache]) -> None:
    batches = reserve(ranks)
    assert batches[0].publish() == [OK]
    ranks[0].close()
    assert ranks[1].reap() == shmcache.ReapReport(0, 0, 0, False)
    assert [batch.publish() for batch in batches[1:]] == [[OK], [OK]]
    with ranks[1].read([b"k"]) as found:
        assert contents(found) == [whole(3)]


def test_a_successor_does_not_repeat_a_part_that_is_done(ranks: list[Cache], join: Join) -> None:
    batches = reserve(ranks)
    assert batches[0].publish() == [OK]
    ranks[0].close()
    again = join("engine", 0, 3)
    assert again.reserve_write([b"k"], 3 * PART, writers=3).status == [IN_FLIGHT]
    assert again.finish_write([b"k"]) == [NOT_OWNER]
    assert batches[1].publish() == [OK]
    assert again.lookup([b"k"]) == 0
    assert batches[2].publish() == [OK]
    assert again.lookup([b"k"]) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_last_of_a_group_to_go_takes_its_parts_along(join: Join, order: tuple[int, ...]) -> None:
    group = [join("engine", rank, 3) for rank in range(3)]
    for rank in group[:2]:
        assert rank.reserve_write([b"k"], PART, writers=3).publish() == [OK]
    other = join()
    for rank in order:
        assert other.status([b"k"]) == [IN_FLIGHT]
        group[rank].close()
    assert other.status([b"k"]) == [NOT_FOUND]
    is_sound_and_empty(other)


# Leases and room


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
def test_the_write_lease_ends_what_one_holds_up(ranks: list[Cache]) -> None:
    batches = reserve(ranks)
    assert batches[0].publish() == [OK]
    time.sleep(0.08)
    assert ranks[0].put(b"k", b"quick") == OK
    assert ranks[0].stats().used_bytes == 2 * BLOCK
    assert batches[1].publish() == [NOT_OWNER]
    assert ranks[0].stats().used_bytes == 2 * BLOCK, "another still fills it"
    assert batches[2].publish() == [NOT_OWNER]
    with ranks[0].read([b"k"]) as found:
        assert contents(found) == [b"quick"]
    assert ranks[0].stats().used_bytes == BLOCK
    assert ranks[0].verify() == []


@pytest.mark.parametrize("config", [SHORT_WRITE_LEASE])
def test_room_that_waits_for_writers_who_never_come_is_used(ranks: list[Cache]) -> None:
    keys = [bytes([i]) for i in range(16)]
    assert ranks[0].reserve_write(keys, BLOCK, writers=2).publish() == [OK] * 16
    assert ranks[0].put(b"x", b"x") == NO_SPACE
    time.sleep(0.08)
    assert ranks[0].put(b"x", b"x") == OK
    assert ranks[0].verify() == []


def test_no_space_for_one_of_them_is_no_space_for_all(ranks: list[Cache]) -> None:
    statuses = [rank.reserve_write([b"k"], 2 << 20, writers=3).status for rank in ranks]
    assert statuses == [[NO_SPACE]] * 3


@pytest.mark.parametrize("bad", [0, 4, -1, 2**70])
def test_writers_beyond_the_group(ranks: list[Cache], bad: int) -> None:
    with pytest.raises(ValueError, match="writers: expected 1 to 3, as world_size is 3"):
        ranks[0].reserve_write([b"k"], PART, writers=bad)


@pytest.mark.parametrize("bad", [True, None, 1.0, "2"])
def test_writers_is_an_int(ranks: list[Cache], bad: object) -> None:
    with pytest.raises(TypeError, match="writers: expected int"):
        ranks[0].reserve_write([b"k"], PART, writers=bad)  # type: ignore[arg-type]
