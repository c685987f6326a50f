"""The parts of ``tools/replay``: its report from numbers made by hand, its engine in this process, its L2."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arena_support import Join
from processes._packages import need
from storage_support import Gate, MemoryStore, check_idle, eventually

from shmcache import Status
from shmcache.stats import Counters, Stats
from shmcache.storage import L2Adapter, StorageManager
from shmcache_tools.chunks import Pattern, keys_of, words_of
from shmcache_tools.l2 import add_l2_options, opened_l2, remove_stale
from shmcache_tools.program import RunError, UsageError, number, real, size
from shmcache_tools.replay.engine import Engine, Pace
from shmcache_tools.replay.report import JSON_SCHEMA, Outcome, Served, Tally, document, progress, report
from shmcache_tools.samples import Samples
from shmcache_tools.text import make_console
from shmcache_tools.trace import TraceRequest

_CHUNK = 4096  #: bytes; the block of the fixture ``config``


# Samples


def test_a_percentile_counts_every_item_of_a_batch() -> None:
    samples = Samples()
    samples.add(9.0, 9)
    samples.add(10.0)
    assert [samples.percentile(percent) for percent in (50, 90, 91, 100)] == [1.0, 1.0, 10.0, 10.0]


# The report


def _served(**changes: object) -> Served:
    served = Served(
        chunks=10,
        l1_hits=4,
        l2_hits=0,
        written=6,
        there=0,
        wrong=0,
        prefetch_s=0.002,
        first_key_s=0.001,
        late_s=0.0,
        error=None,
    )
    return replace(served, **changes)  # type: ignore[arg-type]


def _tally() -> Tally:
    """Three requests of ten chunks: one had all in L1, one had nothing in L2, one loaded."""
    tally = Tally(requests=3, readers=2, chunk_bytes=10**6, best_hit_rate=0.75)
    tally.add(_served(l1_hits=10, written=0, prefetch_s=0.0003, first_key_s=0.0001))
    tally.add(_served(l1_hits=2, written=7, there=1))
    tally.add(_served(l1_hits=3, l2_hits=6, written=1, prefetch_s=0.04, first_key_s=0.02))
    return tally


def _stats(**counters: int) -> Stats:
    return Stats(
        capacity=2**30,
        block_size=65536,
        used_bytes=2**29,
        resident_bytes=0,
        slots=100,
        objects=60,
        writing=0,
        reserved=0,
        held=0,
        lanes_alive=1,
        lanes_dead=0,
        counters=Counters(**counters),
    )


def _outcome(**counters: int) -> Outcome:
    moved = {"l2_loads": 6, "l2_loaded_bytes": 6 * 10**6, "l2_stores": 8, "l2_stored_bytes": 8 * 10**6}
    stats = _stats(**{**moved, "evictions": 7, "evicted_bytes": 7 * 10**7, **counters})
    return Outcome(_tally(), l2="files", elapsed_s=2.0, flush_s=0.25, stats=stats, problems=[])


def _text(outcome: Outcome) -> str:
    out = io.StringIO()
    make_console(out).print(report(outcome))
    return out.getvalue()


def _rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_good_replay() -> None:
    outcome = _outcome()
    assert outcome.faults == []
    rows = _rows(_text(outcome))
    for row in (
        "requests 3 of 3, each by 2 readers, in 2.0 s",
        "chunks 30, 0.03 GB",
        "hit rate 70.0 %; 75.0 % in an endless cache, empty at first",
        "L1 50.0 %, 15 chunks",
        "L2 20.0 %, 6 chunks",
        "none 26.7 %, 8 chunks",
        "L1, past the prefix 3.3 %, 1 chunk",
        "L2 files",
        "loads 6 chunks, 0.01 GB",
        "stores 8 chunks, 0.01 GB, the last 250 ms after the end",
        "evictions, L1 7 chunks, 0.07 GB",
        "shares left 0",
        "verify() clean",
        "prefetch, all in L1 300 us 300 us 300 us 1",
        "prefetch, nothing loaded 2 ms 2 ms 2 ms 1",
        "prefetch, loads 40 ms 40 ms 40 ms 1",
        "first key, loads 20 ms 20 ms 20 ms 1",
        "All good: every chunk right, no share left, the arena is sound.",
    ):
        assert row in rows
    assert not any("behind the trace" in row for row in rows)


def test_what_is_rare_has_a_row_only_where_it_happened() -> None:
    rare = ("not loaded for want of room", "not stored for want of room", "gone before the load", "failures")
    assert not any(name in _text(_outcome()) for name in rare)
    counters = {"prefetch_no_space": 1, "l2_store_no_space": 2, "l2_load_misses": 3, "l2_load_errors": 4}
    rows = _rows(_text(_outcome(**counters)))
    amounts = ("1 request", "2 chunks", "3 chunks", "4")
    for name, amount in zip(rare, amounts, strict=True):
        assert f"{name} {amount}" in rows


@pytest.mark.parametrize("l2", [None, "files"])
def test_without_l2(l2: str | None) -> None:
    rows = _rows(_text(replace(_outcome(), l2=l2)))
    assert ("L2 none" in rows) == (l2 is None)
    assert any(row.startswith("stores ") for row in rows) == (l2 is not None)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"finished": 2}, "2 of 3 requests finished"),
        ({"wrong": 1}, "1 chunk held wrong bytes"),
        ({"error": "a broken disk"}, "a prefetch failed: a broken disk"),
    ],
)
def test_what_makes_a_replay_bad(change: dict[str, object], fault: str) -> None:
    outcome = _outcome()
    for name, value in change.items():
        setattr(outcome.tally, name, value)
    assert outcome.faults == [fault]
    assert f"FAILED: {fault}" in _text(outcome)


def test_a_bad_arena_or_l2_makes_a_replay_bad() -> None:
    left = _outcome()
    left = replace(left, stats=replace(left.stats, reserved=2, held=1))
    assert left.faults == ["3 shares left"]
    assert replace(_outcome(), problems=["slot 3: torn"]).faults == ["verify(): slot 3: torn"]
    assert _outcome(l2_damaged=2).faults == ["L2 had 2 damaged objects"]
    assert _outcome(l2_timeouts=1, l2_store_drops=2).faults == ["L2 failed 3 times"]


def test_a_paced_replay_says_how_late_it_was() -> None:
    tally = Tally(requests=2, readers=1, chunk_bytes=8, best_hit_rate=0.0, paced=True)
    tally.add(_served(late_s=0.5))
    text = _text(replace(_outcome(), tally=tally))
    assert "submit, behind the trace 500 ms 500 ms 500 ms 1" in _rows(text)


def test_the_document_is_json_and_complete() -> None:
    shown = json.loads(json.dumps(document(_outcome(), {"capacity": "1GiB"})))
    assert shown["schema"] == JSON_SCHEMA
    assert shown["options"] == {"capacity": "1GiB"}
    assert shown["chunks"] == {"total": 30, "l1": 15, "l2": 6, "none": 8, "past_prefix": 1}
    assert shown["hit_rate"] == {"total": 0.7, "l1": 0.5, "l2": 0.2, "endless": 0.75}
    assert shown["l2"]["loads"] == 6
    assert shown["l1"]["evicted_bytes"] == 7 * 10**7
    assert shown["times"]["l2_loaded"]["prefetch"] == {"requests": 1, "p50_s": 0.04, "p99_s": 0.04, "max_s": 0.04}
    assert shown["times"]["late"] is None
    assert (shown["wrong_chunks"], shown["shares_left"], shown["problems"], shown["faults"]) == (0, 0, [], [])


def test_progress_from_the_first_moment_on() -> None:
    out = io.StringIO()
    for tally in (Tally(requests=3, readers=1, chunk_bytes=8, best_hit_rate=0.0), _tally()):
        make_console(out).print(progress(tally, _stats(l2_loads=5, l2_loaded_bytes=5 * 10**9)))
    text = out.getvalue()
    assert "0 of 3" in text
    assert "3 of 3" in text
    assert "5 chunks, 5.00 GB" in text
    assert "70.0 %: L1 50.0 %, L2 20.0 %" in text


# The engine


def _trace(*chains: list[int]) -> list[TraceRequest]:
    return [TraceRequest(0, np.array(chain, dtype=np.uint64)) for chain in chains]


def _objects(hash_ids: Iterable[int]) -> dict[bytes, bytes]:
    """Chunks as L2 has them, by key."""
    keys, pattern = keys_of(np.array(list(hash_ids), dtype=np.uint64)), Pattern(_CHUNK)
    objects = {}
    for key, word in zip(keys, words_of(keys), strict=True):
        chunk = np.empty(_CHUNK // 8, dtype=np.int64)
        pattern.fill(chunk, word)
        objects[key.tobytes()] = chunk.tobytes()
    return objects


def _do_nothing() -> None:
    pass


@contextmanager
def _engine(join: Join, l2: L2Adapter, *, readers: int = 1, in_flight: int = 1) -> Iterator[tuple[Engine, Tally]]:
    """An engine over the test's arena; afterwards nothing is outstanding there."""
    cache = join("replay", None, readers)
    lanes = [join("replay", rank, readers) for rank in range(readers)]
    tally = Tally(requests=0, readers=readers, chunk_bytes=_CHUNK, best_hit_rate=0.0)
    with StorageManager(cache, [l2], max_in_flight=in_flight) as storage:
        yield Engine(cache, lanes, storage, tally, in_flight=in_flight, pace=Pace(None), seed=1), tally
    eventually(lambda: cache.stats().writing == 0, "slots of cancelled loads are given back")
    check_idle(cache)


@pytest.mark.parametrize(("readers", "in_flight"), [(1, 1), (3, 1), (2, 4)])
def test_the_engine_serves_from_both_tiers(join: Join, readers: int, in_flight: int) -> None:
    chain = list(range(20))
    store = MemoryStore()
    store.objects.update(_objects(range(10)))
    with _engine(join, store, readers=readers, in_flight=in_flight) as (engine, tally):
        engine.replay(_trace(chain, chain, chain[:5]), _do_nothing)
    assert (tally.finished, tally.chunks, tally.wrong) == (3, 45, 0)
    assert tally.written == 10
    assert tally.l1_hits + tally.l2_hits + tally.there == 35
    if in_flight == 1:
        assert (tally.l1_hits, tally.l2_hits) == (25, 10)
        assert [len(times.first_key.items) for times in (tally.l2_loaded, tally.l2_missed, tally.l1_alone)] == [1, 0, 2]
    assert set(store.objects) == {key.tobytes() for key in keys_of(np.array(chain, dtype=np.uint64))}


def test_every_wrong_chunk_is_found_by_one_reader(join: Join) -> None:
    store = MemoryStore()
    store.objects.update(_objects(range(8)))
    keys = list(store.objects)
    for bad in (2, 7):  # the right bytes of another chunk; one wrong bit
        store.objects[keys[bad]] = store.objects[keys[0]]
    flipped = bytearray(store.objects[keys[4]])
    flipped[-1] ^= 1
    store.objects[keys[4]] = bytes(flipped)
    with _engine(join, store, readers=3) as (engine, tally):
        engine.replay(_trace(list(range(8))), _do_nothing)
    assert (tally.l2_hits, tally.wrong) == (8, 3)


class _EndedError(Exception):
    pass


def test_an_interrupted_engine_gives_everything_back(join: Join) -> None:
    gate = Gate()
    store = MemoryStore()
    store.objects.update(_objects(range(40)))
    store.faults["load"] = gate

    def tick() -> None:
        gate.reached()
        raise _EndedError

    with _engine(join, store, in_flight=4) as (engine, tally), gate, pytest.raises(_EndedError):
        engine.replay(_trace(*(list(range(10 * i, 10 * i + 10)) for i in range(4))), tick)
    assert tally.finished == 0


def test_the_first_error_of_a_thread_ends_the_replay(join: Join) -> None:
    with _engine(join, MemoryStore(), in_flight=3) as (engine, tally):
        tally.late = None  # type: ignore[assignment]
        tally.paced = True
        with pytest.raises(AttributeError, match="add"):
            engine.replay(_trace(*([i] for i in range(50))), _do_nothing)
    assert tally.finished <= 3


def test_a_pace_follows_the_trace() -> None:
    first, later = TraceRequest(500, np.zeros(1, np.uint64)), TraceRequest(2500, np.zeros(1, np.uint64))
    assert Pace(None).due_s(later, first) == 0.0
    assert Pace(1.0).due_s(later, first) == 2.0
    assert Pace(10.0).due_s(later, first) == pytest.approx(0.2)


# L2 for the time of a run


def _options(*arguments: str, chunk_bytes: int = _CHUNK) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_l2_options(parser, "1MiB")
    return argparse.Namespace(**vars(parser.parse_args(arguments)), chunk_bytes=chunk_bytes)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where directories for L2 are made."""
    need("xxhash")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_the_default_l2_is_gone_after_the_run(scratch: Path) -> None:
    with opened_l2(_options("--l2-capacity", "3MiB"), chunks=1) as l2:
        (adapter,) = l2.adapters
        assert adapter.store([b"key"], [memoryview(b"bytes")]) == [Status.OK]
        assert [path.is_dir() for path in scratch.iterdir()] == [True]
        assert l2.text == f"files in {scratch}, at most 3 MiB"
    assert list(scratch.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_is_in_use_is_not(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = scratch / "shmcache-l2-left"
    (left / "00").mkdir(parents=True)
    (left / "00" / "file").touch()
    other = scratch / "other"
    other.mkdir()
    (scratch / "shmcache-l2-link").symlink_to(other)
    with opened_l2(_options(), chunks=1):
        (used,) = {path.name for path in scratch.iterdir()} - {"other", "shmcache-l2-link"}
        assert str(left) in capsys.readouterr().err
        remove_stale()
        assert {path.name for path in scratch.iterdir()} == {used, "other", "shmcache-l2-link"}


def test_a_disk_that_is_too_full(scratch: Path) -> None:
    chunks = shutil.disk_usage(scratch).total // _CHUNK
    options = _options("--l2-capacity", "1000000TiB")
    with pytest.raises(RunError, match="free: pass a smaller --l2-capacity"), opened_l2(options, chunks):
        pytest.fail("a directory was made")
    assert list(scratch.iterdir()) == []


def test_l2_that_is_nowhere() -> None:
    with pytest.raises(UsageError, match="nowhere"), opened_l2(_options("--l2", "nowhere://host"), chunks=1):
        pytest.fail("it was opened")


def test_l2_that_is_named(tmp_path: Path) -> None:
    need("xxhash")
    with opened_l2(_options("--l2", str(tmp_path / "kept")), chunks=10**12) as l2:
        (adapter,) = l2.adapters
        assert l2.text == repr(adapter)
        adapter.close()
    assert (tmp_path / "kept").is_dir()


def test_no_l2() -> None:
    with opened_l2(_options("--no-l2"), chunks=1) as l2:
        assert (l2.adapters, l2.text) == ([], None)


# Options


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(number(1, 5), "5", 5), (real(0.5, 2, "times"), "0.5", 0.5), (size, "2KiB", 2048)],
)
def test_options(kind: object, text: str, value: float) -> None:
    assert callable(kind)
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (number(1, 5), "6", "expected 1 to 5, got 6"),
        (real(0.5, 2, "times"), "nan", "expected 0.5 to 2 times, got nan"),
        (size, "much", "expected a number"),
    ],
)
def test_wrong_options(kind: object, text: str, why: str) -> None:
    assert callable(kind)
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        kind(text)
