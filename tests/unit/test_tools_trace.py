from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shmcache_tools.trace import (
    TraceError,
    best_hit_rate,
    longest_chain,
    make_conversations,
    read_trace,
)

_GOOD = '{"timestamp": 27, "input_length": 700, "output_length": 5, "hash_ids": [0, 18446744073709551615]}'


def _trace(folder: Path, *lines: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_reads_requests(tmp_path: Path) -> None:
    trace = read_trace(_trace(tmp_path, _GOOD, "", '{"hash_ids": [3]}'))
    assert [request.timestamp_ms for request in trace] == [27, 0]
    assert [request.hash_ids.tolist() for request in trace] == [[0, 2**64 - 1], [3]]
    assert trace[0].hash_ids.dtype == np.uint64
    assert longest_chain(trace) == 2


def test_reads_no_more_than_the_limit(tmp_path: Path) -> None:
    assert len(read_trace(_trace(tmp_path, _GOOD, _GOOD, "broken"), limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[]", "hash_ids"),
        ("{}", "hash_ids"),
        ('{"hash_ids": []}', "hash_ids"),
        ('{"hash_ids": [-1]}', "hash_ids"),
        ('{"hash_ids": [18446744073709551616]}', "hash_ids"),
        ('{"hash_ids": [true]}', "hash_ids"),
        ('{"hash_ids": [1.0]}', "hash_ids"),
        ('{"hash_ids": [1, 2, 1]}', "twice"),
        ('{"hash_ids": [1], "timestamp": "now"}', "timestamp"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(TraceError, match=rf"trace\.jsonl:2: .*{why}"):
        read_trace(_trace(tmp_path, _GOOD, line))


def test_best_hit_rate() -> None:
    assert best_hit_rate([]) == 0
    assert best_hit_rate(make_conversations(1, 1)) == 0
    trace = make_conversations(1, 2000)
    chunks = [chunk for request in trace for chunk in request.hash_ids.tolist()]
    assert best_hit_rate(trace) == pytest.approx(1 - len(set(chunks)) / len(chunks))


def test_conversations_follow_the_seed() -> None:
    def lists(seed: int) -> list[list[int]]:
        return [request.hash_ids.tolist() for request in make_conversations(seed, 50)]

    assert lists(7) == lists(7)
    assert lists(7) != lists(8)


def test_conversations_share_prefixes_only() -> None:
    """An id follows one chain of ids everywhere, as a hash of all before it would."""
    before: dict[int, int | None] = {}
    trace = make_conversations(3, 500)
    for request in trace:
        for previous, chunk in pairwise([None, *request.hash_ids.tolist()]):
            assert chunk is not None
            assert before.setdefault(chunk, previous) == previous
    assert [request.timestamp_ms for request in trace] == sorted(request.timestamp_ms for request in trace)
    assert best_hit_rate(trace) > 0.5
