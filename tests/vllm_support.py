"""What tests of the vLLM connector share: requests as vLLM has them, and the connector's two sides without vLLM.

What a block holds when it is computed follows from its hash and the rank alone, so whoever looks into a block, or into
an object, can tell whether the bytes are the right ones.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from arena_support import TIMEOUT_S, pattern

import shmcache
from shmcache import Cache
from shmcache.integrations.vllm.copier import HostCopier, part_bytes_of
from shmcache.integrations.vllm.messages import Report, Shape, Step
from shmcache.integrations.vllm.scheduler import Scheduler
from shmcache.integrations.vllm.settings import Settings
from shmcache.integrations.vllm.worker import Worker

TOKENS = 4  #: in a block
LAYERS, PAGE = 2, 24
PART = LAYERS * PAGE
IDENTITY = b"0123456789abcdef"
LEASE_S = 300.0
SMALL = {"capacity": "1MiB", "block_size": "4KiB", "lanes": 16, "populate": False}
RECORD_VARIABLE = "SHMCACHE_RECORD_FOLDER"  #: names the folder that ``vllm_recording`` writes to
SLOW, SLOW_S = "slow", 0.2  #: while this file is in that folder, each load between steps takes so long
RECORDINGS = Path(__file__).parent / "unit/vllm_calls"


class Request:
    """As vLLM has it, as far as the connector looks at it. Only ``known`` of its tokens are known yet."""

    def __init__(self, request_id: str, tokens: Sequence[int], known: int | None = None) -> None:
        self.request_id = request_id
        self.all_hashes = hashes_of(tokens)
        self.num_computed_tokens = 0
        self.num_tokens = len(tokens) if known is None else known
        self.skip_reading_prefix_cache = False

    @property
    def block_hashes(self) -> list[bytes]:
        return self.all_hashes[: self.num_tokens // TOKENS]

    def keys(self, start: int = 0, stop: int | None = None, identity: bytes = IDENTITY) -> list[bytes]:
        """Of its full blocks."""
        return [one + identity for one in self.all_hashes[start:stop]]


def hashes_of(tokens: Sequence[int]) -> list[bytes]:
    """Of the full blocks, each of all tokens until its end."""
    raw = b"".join(token.to_bytes(4, "little") for token in tokens)
    return [hashlib.sha256(raw[: 4 * stop]).digest() for stop in range(TOKENS, len(tokens) + 1, TOKENS)]


def prompt(blocks: int, seed: int = 0, more: int = 0) -> list[int]:
    """Tokens of so many full blocks, and some more."""
    return [seed * 100_000 + i for i in range(blocks * TOKENS + more)]


def part_of(block_hash: bytes, part: int, nbytes: int = PART) -> bytes:
    """The right bytes of a block in one part."""
    return pattern(block_hash + bytes([part]), nbytes)


def object_of(key: bytes, shape: Shape) -> bytes:
    """The right bytes of an object."""
    return b"".join(part_of(key[:32], part, shape.part_bytes) for part in range(shape.parts))


class Rank:
    """One rank's side, and its KV cache."""

    def __init__(self, cache: Cache, rank: int, shape: Shape, blocks: int) -> None:
        self.rank, self.shape, self.cache = rank, shape, cache
        self.kv = torch.zeros((LAYERS, blocks, PAGE), dtype=torch.uint8)
        assert part_bytes_of([self.kv]) == shape.part_bytes
        self.copier = HostCopier([self.kv])
        self.worker = Worker(cache, rank, shape, self.copier)
        self.gate = Gate(self.copier)

    def put(self, block: int, content: bytes) -> None:
        self.kv[:, block] = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(LAYERS, PAGE)

    def get(self, block: int) -> bytes:
        return self.kv[:, block].contiguous().numpy().tobytes()

    def right(self, block_hash: bytes) -> bytes:
        return part_of(block_hash, self.rank // self.shape.replicas)

    def has(self, block: int, block_hash: bytes) -> bool:
        return self.get(block) == self.right(block_hash)


class Gate:
    """Holds a copier's loads or saves up while it is shut."""

    def __init__(self, copier: HostCopier) -> None:
        self.errors: dict[str, Exception] = {}  #: raised by the next such call
        self._open = {"load": True, "save": True}
        self._passes = {"load": 0, "save": 0}
        self._changed = threading.Condition()
        for what in self._open:
            setattr(copier, what, self._held(what, getattr(copier, what)))

    def shut(self, what: str) -> None:
        with self._changed:
            self._open[what], self._passes[what] = False, 0

    def open(self, what: str) -> None:
        with self._changed:
            self._open[what] = True
            self._changed.notify_all()

    def is_open(self, what: str) -> bool:
        return self._open[what]

    def let_through(self, what: str, calls: int = 1) -> None:
        """So many more, while it is shut."""
        with self._changed:
            self._passes[what] += calls
            self._changed.notify_all()

    def _held(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any) -> Any:
            with self._changed:
                assert self._changed.wait_for(lambda: self._open[what] or self._passes[what] > 0, TIMEOUT_S)
                self._passes[what] -= 1
            if what in self.errors:
                raise self.errors.pop(what)
            return call(*args)

        return held


class Sides:
    """The connector of one engine: the scheduler's side, and that of each rank."""

    def __init__(
        self,
        arena: str,
        group: str = "vllm",
        *,
        ranks: int = 2,
        replicas: int = 1,
        blocks: int = 64,
        lease_s: float = LEASE_S,
        block_tokens: int = TOKENS,
        identity_of: Callable[[Any], bytes] = lambda _: IDENTITY,
        loads: bool = True,
        saves: bool = True,
        **settings: Any,
    ) -> None:
        self.arena = arena
        self.shape = Shape(ranks, replicas, PART)
        self.settings = Settings.of({"arena": arena, **settings})
        self.cache = self.settings.attach(group, ranks, ranks + 1)
        self.ranks = [Rank(self.settings.attach(group, r, ranks + 1), r, self.shape, blocks) for r in range(ranks)]
        self.scheduler = Scheduler(
            self.cache,
            self.settings,
            self.shape,
            identity_of,
            block_tokens=block_tokens,
            lease_s=lease_s,
            loads=loads,
            saves=saves,
        )

    def match(self, request: Request, local_blocks: int = 0) -> tuple[int | None, bool]:
        return self.scheduler.match(request, local_blocks * TOKENS)

    def match_fetched(self, request: Request, local_blocks: int = 0) -> tuple[int | None, bool]:
        """Asks until L2 has answered."""
        deadline = time.monotonic() + TIMEOUT_S
        while (found := self.match(request, local_blocks))[0] is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return found

    def step(
        self, computed: Mapping[Request, tuple[int, list[int]]] | None = None, new_blocks: Iterable[int] = ()
    ) -> Step:
        """A step that computes so many tokens of each request, which has these blocks; on no rank yet."""
        computed = computed or {}
        blocks = {request.request_id: blocks for request, (_, blocks) in computed.items()}
        scheduled = {request.request_id: tokens for request, (tokens, _) in computed.items()}
        return self.scheduler.step(scheduled, new_blocks, blocks.__getitem__)

    def run(self, step: Step, computed: Mapping[Request, tuple[int, list[int]]] | None = None) -> None:
        """The step on every rank, in vLLM's order; what it computes is right."""
        for rank in self.ranks:
            rank.worker.before(step)
            rank.worker.load(step)
        for request, (tokens, blocks) in (computed or {}).items():
            compute(self.ranks, request, tokens, blocks)
        for rank in self.ranks:
            rank.worker.save(step)

    def compute(self, request: Request, blocks: list[int], tokens: int | None = None) -> Step:
        """One whole step that computes the rest of a request, or so many tokens of it."""
        tokens = request.num_tokens - request.num_computed_tokens if tokens is None else tokens
        computed = {request: (tokens, blocks)}
        step = self.step(computed)
        self.run(step, computed)
        request.num_computed_tokens += tokens
        return step

    def settle(self) -> None:
        """Whatever is on its way in the ranks is done there."""
        for rank in self.ranks:
            wait([*rank.worker._saves.values(), *rank.worker._loads.values()], TIMEOUT_S)

    def report(self) -> tuple[Report, set[str], set[int]]:
        """What all ranks have to say, and is not told yet: reports, requests received by all, and bad blocks."""
        total = Report()
        received, bad = [], set[int]()
        for rank in self.ranks:
            received.append(rank.worker.received())
            bad |= rank.worker.load_errors()
            total.add(rank.worker.report())
        return total, set.intersection(*received), bad

    def tell(self) -> set[int]:
        """All that is on its way is done, and the scheduler's side hears of it. The bad blocks."""
        self.settle()
        report, _, bad = self.report()
        self.scheduler.done(report)
        return bad

    def drain(self) -> list[str]:
        """Steps without requests, until there is nothing left to do; what was closed."""
        closed: list[str] = []
        deadline = time.monotonic() + TIMEOUT_S
        while self.scheduler.has_work:
            assert time.monotonic() < deadline, "it always has work"
            step = self.step()
            closed += step.closed
            self.run(step)
            self.tell()
        return closed

    def save(self, request: Request, blocks: list[int]) -> None:
        """Computes and saves a request from its begin to its end."""
        self.match(request)
        self.scheduler.allocated(request, blocks, 0)
        self.compute(request, blocks)
        self.tell()
        assert not self.scheduler.finished(request.request_id, blocks)
        self.drain()

    def close(self) -> None:
        for rank in self.ranks:
            for what in ("load", "save"):
                rank.gate.open(what)
            rank.worker.close()
            rank.cache.close()
        self.scheduler.close()
        self.cache.close()


class _Texts(logging.Filter):
    """Leaves nothing of an error but its text: pytest keeps what is logged, and an error would keep views alive."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            record.exc_text, record.exc_info = "".join(traceback.format_exception(*record.exc_info)), None
        record.msg, record.args = record.getMessage(), ()
        return True


@contextmanager
def texts_of_errors() -> Iterator[None]:
    """What is logged meanwhile holds no errors, but their texts."""
    log, texts = logging.getLogger("vllm.shmcache"), _Texts()
    log.addFilter(texts)
    try:
        yield
    finally:
        log.removeFilter(texts)


@contextmanager
def engines(arena: str) -> Iterator[Callable[..., Sides]]:
    """Makes sides of engines in a small arena, and closes them. Nothing is left of them in it then."""
    made: list[Sides] = []

    def make(**how: Any) -> Sides:
        made.append(Sides(arena, **{**SMALL, **how}))
        return made[-1]

    with texts_of_errors():
        try:
            yield make
        finally:
            for one in made:
                one.close()
    if made:
        with shmcache.attach(arena) as cache:
            check_idle(cache)


def compute(ranks: Sequence[Rank], request: Request, tokens: int, blocks: Sequence[int]) -> None:
    """Fills the blocks that these tokens make full. As every layer's result is added up over the ranks, what one rank
    computes from a bad block makes the blocks of all of them bad."""
    begin, end = request.num_computed_tokens, request.num_computed_tokens + tokens
    good = all(rank.has(blocks[i], request.all_hashes[i]) for rank in ranks for i in range(begin // TOKENS))
    for rank in ranks:
        for i in range(begin // TOKENS, end // TOKENS):
            rank.put(blocks[i], rank.right(request.all_hashes[i]) if good else b"\xbd" * PART)


def shares(arena: str) -> dict[tuple[str, int], Counter[bytes]]:
    """How many shares each rank of a group has of each key; ranks without any are not there."""
    seen = shmcache.inspect(arena, shares=True)
    lanes = {lane.index: lane for lane in seen.lanes}
    found: dict[tuple[str, int], Counter[bytes]] = {}
    for share in seen.shares or ():
        lane = lanes[share.lane]
        if share.kind != "writing" and lane.rank is not None:
            found.setdefault((lane.group, lane.rank), Counter())[share.key] += share.count
    return found


def check_objects(cache: Cache, shape: Shape) -> list[bytes]:
    """Whatever is readable, and an engine's, has the right bytes; the keys."""
    objects = shmcache.inspect(cache.name, objects=True).objects or ()
    keys = [one.key for one in objects if one.standing != "writing" and len(one.key) == 48]
    with cache.read(keys) as batch:
        for key, view in zip(keys, batch.views, strict=True):
            assert view is None or bytes(view) == object_of(key, shape), f"wrong bytes under {key.hex()}"
    return keys


def check_idle(cache: Cache) -> None:
    """Nobody has a share, or writes; the arena is sound."""
    stats = cache.stats()
    assert (stats.reserved, stats.held, stats.writing) == (0, 0, 0)
    assert cache.verify() == []
