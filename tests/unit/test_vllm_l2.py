"""The second tier behind the scheduler's side: fetched by request, stored in the background, never waited for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import vllm_support
from arena_support import TIMEOUT_S
from storage_support import Gate, MemoryStore, check_no_thread_stays, eventually, raises
from vllm_support import Request, Sides, check_objects, object_of, prompt, shares

import shmcache
from shmcache import Status
from shmcache.integrations.vllm import hits as hits_module
from shmcache.integrations.vllm import scheduler as scheduler_module
from shmcache.integrations.vllm import tier as tier_module
from shmcache.integrations.vllm.tier import Tier
from shmcache.storage import FileStore

Make = Callable[..., Sides]
BLOCKS = list(range(10, 30))


@pytest.fixture
def make(arena_name: str) -> Iterator[Make]:
    with vllm_support.engines(arena_name) as found:
        yield found
    check_no_thread_stays()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def sides(make: Make, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> Sides:
    """An engine with ``store`` for L2, which has the first five blocks of ``prompt``."""
    monkeypatch.setattr(scheduler_module, "Tier", lambda cache, _: Tier(cache, (store,)))  # type: ignore[arg-type]
    found = make(l2="memory")
    fill(store, found, Request("first", prompt(5)).keys())
    return found


def fill(store: MemoryStore, sides: Sides, keys: list[bytes]) -> None:
    store.objects.update({key: object_of(key, sides.shape) for key in keys})


def granted(sides: Sides, keys: list[bytes]) -> bool:
    expected = {("vllm", rank): Counter(keys) for rank in range(sides.shape.ranks)} if keys else {}
    return shares(sides.arena) == expected


def load(sides: Sides, asked: Request, tokens: int) -> None:
    """All of what was told is loaded, into the right blocks, with the right bytes."""
    sides.scheduler.allocated(asked, BLOCKS, tokens)
    sides.run(sides.step())
    assert sides.tell() == set()
    for rank in sides.ranks:
        assert all(rank.has(BLOCKS[i], asked.all_hashes[i]) for i in range(-(-tokens // 4)))
    assert granted(sides, [])


# Fetching


def test_fetched_from_l2(sides: Sides) -> None:
    asked = Request("a", prompt(6))
    assert sides.match_fetched(asked) == (20, False)
    assert granted(sides, asked.keys(0, 5))
    load(sides, asked, 20)
    assert sides.scheduler.l2_tokens(asked) == 20
    assert sides.match_fetched(Request("b", prompt(5))) == (19, False)
    sides.scheduler.finished("b", [])


def test_nobody_waits_while_it_is_fetched(sides: Sides, store: MemoryStore) -> None:
    asked, other = Request("a", prompt(5)), Request("b", prompt(3, seed=1))
    with Gate() as store.faults["load"]:
        for _ in range(5):
            assert sides.match(asked) == (None, False)
        store.faults["load"].reached()
        assert sides.match_fetched(other) == (0, False)
    assert sides.match_fetched(asked) == (19, False)
    assert granted(sides, asked.keys())
    sides.scheduler.finished("a", [])
    assert granted(sides, [])


def test_asked_again_nothing_is_doubled(sides: Sides, store: MemoryStore) -> None:
    asked = Request("a", prompt(5))
    sides.match_fetched(asked)
    assert {sides.match(asked) for _ in range(5)} == {(19, False)}
    assert granted(sides, asked.keys())
    assert len(store.asked("load")) == 1
    load(sides, asked, 19)


def test_a_bound_on_prefetches(sides: Sides, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond it are asked for when others are through, or over."""
    monkeypatch.setattr(hits_module, "_MOST_PREFETCHES", 2)
    asked = [Request(name, prompt(3 + number)) for number, name in enumerate("abcd")]
    gate = Gate()
    store.faults["load"] = gate
    with gate:
        for _ in range(3):
            assert [sides.match(request)[0] for request in asked] == [None] * 4
        assert sides.scheduler.counters.take()["prefetches"] == 2
        sides.scheduler.finished("a", [])
        assert [sides.match(request)[0] for request in asked[1:]] == [None] * 3
        assert sides.scheduler.counters.take()["prefetches"] == 1
        sides.scheduler.finished("d", [])
    assert [sides.match_fetched(request)[0] for request in asked[1:3]] == [15, 19]
    eventually(lambda: granted(sides, asked[1].keys(0, 4) + asked[2].keys(0, 5)), "only what they were told")
    for request in asked[1:3]:
        sides.scheduler.finished(request.request_id, [])
    assert sides.match_fetched(Request("e", prompt(2, seed=1)))[0] == 0, "all the others are through"


def test_queued_prefetches_time_out(sides: Sides, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take what the arena has, as those that run."""
    monkeypatch.setattr(hits_module, "_MOST_PREFETCHES", 1)
    first, queued = Request("a", prompt(5)), Request("b", prompt(5))
    with Gate() as gate:
        store.faults["load"] = gate
        assert sides.match(first)[0] is None
        assert sides.match(queued)[0] is None
        sides.scheduler._hits._timeout_s = 0.0
        time.sleep(0.01)
        assert [sides.match(request)[0] for request in (queued, first)] == [0, 0]
        assert sides.scheduler.counters.take() == {"prefetches": 1, "prefetch_timeouts": 2}
        sides.scheduler._hits._timeout_s = TIMEOUT_S
        for name in "ab":
            sides.scheduler.finished(name, [])
    eventually(lambda: granted(sides, []), "given back")


def test_l2_is_not_asked_for_what_the_arena_has(sides: Sides, store: MemoryStore) -> None:
    sides.match_fetched(Request("a", prompt(5)))
    before = len(store.calls)
    assert sides.match(Request("b", prompt(5))) == (19, False)
    assert len(store.calls) == before
    for name in "ab":
        sides.scheduler.finished(name, [])


def test_some_from_the_arena_and_some_from_l2(sides: Sides, store: MemoryStore) -> None:
    keys = Request("x", prompt(5)).keys()
    store.objects = {key: store.objects[key] for key in keys[2:4]}
    for key in keys[:2]:
        assert sides.cache.put(key, object_of(key, sides.shape)) is Status.OK
    asked = Request("a", prompt(5))
    assert sides.match_fetched(asked) == (16, False)
    assert granted(sides, asked.keys(0, 4))
    load(sides, asked, 16)
    assert sides.scheduler.l2_tokens(asked) == 8
    assert sides.scheduler.counters.take()["l2_hit_blocks"] == 2


def test_vllm_takes_a_part_of_what_was_fetched(sides: Sides) -> None:
    asked = Request("a", prompt(5))
    sides.match_fetched(asked)
    load(sides, asked, 8)
    assert sides.scheduler.l2_tokens(asked) == 8


def test_loaded_once_means_from_l2_once(sides: Sides) -> None:
    """vLLM tells again of a request whose loads between steps are through."""
    asked = Request("a", prompt(5))
    sides.match_fetched(asked)
    load(sides, asked, 19)
    sides.scheduler.allocated(asked, BLOCKS, 0)
    assert sides.scheduler.l2_tokens(asked) == 0
    assert sides.scheduler.counters.take()["hit_blocks"] == 5


def test_an_object_of_another_size_is_no_hit(sides: Sides, store: MemoryStore) -> None:
    keys = Request("x", prompt(5)).keys()
    store.objects[keys[1]] = store.objects[keys[1]][:-1]
    assert sides.match_fetched(Request("a", prompt(5))) == (4, False)
    sides.scheduler.finished("a", [])


# When it fails


@pytest.mark.parametrize("method", ["lookup", "load"])
def test_l2_fails(sides: Sides, store: MemoryStore, method: str) -> None:
    key = Request("x", prompt(5)).keys()[0]
    assert sides.cache.put(key, object_of(key, sides.shape)) is Status.OK
    store.faults[method] = raises(OSError("no disk"))
    asked = Request("a", prompt(5))
    assert sides.match_fetched(asked) == (4, False)
    assert granted(sides, asked.keys(0, 1))
    load(sides, asked, 4)


@pytest.mark.parametrize("method", ["lookup", "load"])
def test_l2_does_not_answer_in_time(
    make: Make, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(scheduler_module, "Tier", lambda cache, _: Tier(cache, (store,)))  # type: ignore[arg-type]
    sides = make(l2="memory", prefetch_timeout_s=0.05)
    keys = Request("x", prompt(5)).keys()
    fill(store, sides, keys)
    for key in keys[:2]:
        assert sides.cache.put(key, object_of(key, sides.shape)) is Status.OK
    asked = Request("a", prompt(5))
    with Gate() as gate:
        store.faults[method] = gate
        assert sides.match(asked)[0] is None
        gate.reached()
        began = time.monotonic()
        assert sides.match_fetched(asked) == (8, False), "what the arena has"
        assert time.monotonic() - began < TIMEOUT_S / 2
        assert sides.scheduler.counters.take()["prefetch_timeouts"] == 1
        sides.match(asked)
    eventually(lambda: granted(sides, asked.keys(0, 2)), "only what it was told")
    load(sides, asked, 8)
    eventually(lambda: granted(sides, []), "a late prefetch leaves nothing")


@pytest.mark.parametrize("method", ["lookup", "load"])
def test_an_abort_while_it_is_fetched(sides: Sides, store: MemoryStore, method: str) -> None:
    asked = Request("a", prompt(5))
    with Gate() as gate:
        store.faults[method] = gate
        assert sides.match(asked)[0] is None
        gate.reached()
        began = time.monotonic()
        assert not sides.scheduler.finished("a", [])
        assert time.monotonic() - began < 0.5, "the scheduler waits for nobody"
    eventually(lambda: granted(sides, []) and sides.cache.stats().writing == 0, "all is given back")
    assert sides.match_fetched(Request("b", prompt(5))) == (19, False)
    sides.scheduler.finished("b", [])


def test_an_abort_when_it_is_fetched_and_nobody_has_asked(sides: Sides, store: MemoryStore) -> None:
    asked = Request("a", prompt(5))
    assert sides.match(asked)[0] is None
    eventually(lambda: granted(sides, asked.keys()), "fetched")
    sides.scheduler.finished("a", [])
    eventually(lambda: granted(sides, []), "given back")
    assert len(store.asked("load")) == 1


def test_vllm_has_some_itself_while_it_is_fetched(sides: Sides, store: MemoryStore) -> None:
    asked = Request("a", prompt(5))
    with Gate() as store.faults["load"]:
        assert sides.match(asked)[0] is None
        assert sides.match(asked, 2)[0] is None
    assert sides.match_fetched(asked, 2) == (11, False)
    eventually(lambda: granted(sides, asked.keys(2, 5)), "only what it was told")
    sides.scheduler.finished("a", [])
    eventually(lambda: granted(sides, []), "given back")


def test_close_while_it_is_fetched(sides: Sides, store: MemoryStore) -> None:
    with Gate() as gate:
        store.faults["load"] = gate
        assert sides.match(Request("a", prompt(5)))[0] is None
        gate.reached()
        gate.open()
        sides.scheduler.close()
    assert granted(sides, [])
    assert store.closed


# Storing


def test_what_is_stored_comes_into_l2(sides: Sides, store: MemoryStore) -> None:
    asked = Request("a", prompt(4, seed=3))
    sides.match_fetched(asked)
    sides.scheduler.allocated(asked, BLOCKS, 0)
    sides.compute(asked, BLOCKS)
    assert not store.asked("store"), "nothing before it is published"
    sides.tell()
    eventually(lambda: set(asked.keys()) <= set(store.objects), "stored")
    assert [store.objects[key] for key in asked.keys(0)] == [object_of(key, sides.shape) for key in asked.keys(0)]
    sides.scheduler.finished("a", BLOCKS)


def test_a_job_that_failed_does_not_come_into_l2(sides: Sides, store: MemoryStore) -> None:
    asked = Request("a", prompt(4, seed=3))
    sides.match_fetched(asked)
    sides.scheduler.allocated(asked, BLOCKS, 0)
    sides.ranks[1].gate.errors["save"] = RuntimeError("no copy")
    sides.compute(asked, BLOCKS)
    sides.tell()
    sides.scheduler.finished("a", [])
    sides.save(Request("b", prompt(1, seed=4)), BLOCKS)
    eventually(lambda: Request("b", prompt(1, seed=4)).keys()[0] in store.objects, "stored")
    assert not set(asked.keys()) & set(store.objects)


def test_l2_that_does_not_keep_up(make: Make, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_BACKLOG", 1)
    monkeypatch.setattr(scheduler_module, "Tier", lambda cache, _: Tier(cache, (store,)))  # type: ignore[arg-type]
    sides = make(l2="memory")
    assert sides.scheduler._tier is not None
    manager = sides.scheduler._tier._manager
    entered, opened, store_to_l2 = threading.Event(), threading.Event(), manager.store

    def slow(keys: list[bytes]) -> None:
        entered.set()
        assert opened.wait(TIMEOUT_S)
        store_to_l2(keys)

    monkeypatch.setattr(manager, "store", slow)
    sides.scheduler.counters.take()
    for seed in range(5, 9):
        sides.match_fetched(Request("r", prompt(2, seed=seed)))
        sides.save(Request("r", prompt(2, seed=seed)), BLOCKS)
        if seed == 5:
            assert entered.wait(TIMEOUT_S)
    # one is at it, one waits, two are not taken
    dropped = sides.scheduler.counters.take()["l2_dropped_blocks"]
    opened.set()
    assert dropped == 4
    eventually(lambda: len(store.objects) == 4, "what was taken is stored")


# A real one


def test_files_outlive_the_arena(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    first = make(l2=str(tmp_path / "kv"))
    asked = Request("a", prompt(6))
    assert first.match_fetched(asked) == (0, False)
    first.scheduler.allocated(asked, BLOCKS, 0)
    first.compute(asked, BLOCKS)
    first.tell()
    first.scheduler.finished("a", BLOCKS)
    files = FileStore(tmp_path / "kv")
    eventually(lambda: all(files.lookup(asked.keys())), "stored")
    files.close()
    eventually(lambda: first.cache.clear() >= 0 and first.cache.stats().objects == 0, "nobody reads them")
    second = make(group="second", l2=[str(tmp_path / "kv")])
    again = Request("b", prompt(6))
    assert second.match_fetched(again) == (23, False)
    load(second, again, 23)
    assert len(check_objects(second.cache, second.shape)) == 6


def test_a_damaged_file_is_no_hit(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    sides = make(l2=str(tmp_path / "kv"))
    sides.match_fetched(Request("a", prompt(3)))
    sides.save(Request("a", prompt(3)), BLOCKS)
    files: list[Path] = []
    key = object_of(Request("a", prompt(3)).keys()[1], sides.shape)

    def stored() -> bool:
        files[:] = [path for path in (tmp_path / "kv").rglob("*") if path.is_file() and key in path.read_bytes()]
        return len(files) == 1 and sides.cache.stats().held == 0

    eventually(stored, "stored")
    sides.scheduler._tier._manager.flush(TIMEOUT_S)  # type: ignore[union-attr]
    content = files[0].read_bytes()
    files[0].write_bytes(content.replace(key, key[:-1] + b"\0"))
    sides.cache.clear()
    assert sides.match_fetched(Request("b", prompt(3))) == (4, False)
    sides.scheduler.finished("b", [])


def test_urls_that_name_nothing(cache: shmcache.Cache) -> None:
    with pytest.raises(ValueError, match="l2: expected a path, or a URL of"):
        Tier(cache, ("nothing://there",))
    check_no_thread_stays()
