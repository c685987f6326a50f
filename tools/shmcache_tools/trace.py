"""Streams of requests, each a chain of KV chunks: read from a trace file, or made up.

A trace file has one JSON object a line, as the traces released with Mooncake: ``timestamp``
(milliseconds) and ``hash_ids``, the request's chain.  Two requests share a prefix where their chains
begin alike; one id never follows two different chains.  Other fields are ignored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ID_LIMIT = 2**64

# The made-up conversations: a few system prompts of very unequal popularity, and many users who talk
# at once, each turn sending the whole conversation so far.
_SYSTEM_PROMPTS = 8
_SYSTEM_CHUNKS = (2, 12)
_ACTIVE_CONVERSATIONS = 100
_TURN_CHUNKS = (1, 8)
_LAST_TURN_PROBABILITY = 0.15
_CHAIN_LIMIT = 128
_REQUEST_INTERVAL_MS = 40


class TraceError(Exception):
    """A line of a trace file that is not a request; the message says which line and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it came, and its chain of chunks."""

    timestamp_ms: int
    hash_ids: NDArray[np.uint64]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first ``limit`` requests of a trace file; TraceError where a line is not one."""
    with path.open("rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        return [_parse(path, number, line) for number, line in islice(numbered, limit)]


def make_conversations(seed: int, requests: int) -> list[TraceRequest]:
    """``requests`` turns of many conversations at once; the same seed gives the same."""
    chains = islice(_chains(random.Random(seed)), requests)
    return [
        TraceRequest(number * _REQUEST_INTERVAL_MS, np.array(chain, dtype=np.uint64))
        for number, chain in enumerate(chains)
    ]


def longest_chain(trace: Iterable[TraceRequest]) -> int:
    """Chunks of the longest request, 0 for an empty trace."""
    return max((len(request.hash_ids) for request in trace), default=0)


def best_hit_rate(trace: Iterable[TraceRequest]) -> float:
    """The share of chunks that an arena without end would have found: all that came before."""
    requests = list(trace)
    total = sum(len(request.hash_ids) for request in requests)
    return 1 - distinct_chunks(requests) / total if total else 0.0


def distinct_chunks(trace: Iterable[TraceRequest]) -> int:
    """How many different chunks the requests name."""
    return len(np.unique(np.concatenate([request.hash_ids for request in trace])))


def _parse(path: Path, number: int, line: bytes) -> TraceRequest:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{path}:{number}: not JSON: {error}") from None
    hash_ids = record.get("hash_ids") if isinstance(record, dict) else None
    if not isinstance(hash_ids, list) or not hash_ids or not all(map(_is_id, hash_ids)):
        raise TraceError(f"{path}:{number}: expected 'hash_ids', a list of integers 0 to 2**64 - 1")
    if len(set(hash_ids)) != len(hash_ids):
        raise TraceError(f"{path}:{number}: the chain names a chunk twice")
    timestamp = record.get("timestamp", 0)
    if not isinstance(timestamp, int | float):
        raise TraceError(f"{path}:{number}: 'timestamp' is not a number of milliseconds")
    return TraceRequest(int(timestamp), np.array(hash_ids, dtype=np.uint64))


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _ID_LIMIT


def _chains(rng: random.Random) -> Iterator[list[int]]:
    """Endless turns; each grows one conversation, which ends by chance or when it is long."""
    fresh = iter(range(_ID_LIMIT))
    prompts = [list(islice(fresh, rng.randint(*_SYSTEM_CHUNKS))) for _ in range(_SYSTEM_PROMPTS)]
    weights = [1 / (rank + 1) for rank in range(_SYSTEM_PROMPTS)]

    def begin() -> list[int]:
        return list(rng.choices(prompts, weights)[0])

    active = [begin() for _ in range(_ACTIVE_CONVERSATIONS)]
    while True:
        place = rng.randrange(_ACTIVE_CONVERSATIONS)
        active[place] += islice(fresh, rng.randint(*_TURN_CHUNKS))
        yield list(active[place])
        if len(active[place]) > _CHAIN_LIMIT or rng.random() < _LAST_TURN_PROBABILITY:
            active[place] = begin()
