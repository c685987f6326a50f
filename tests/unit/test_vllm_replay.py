"""The connector's two sides are asked what real engines asked them, in that order; see ``vllm_record``.

vLLM's part is the recording's, the answers are ours: what is found, granted, loaded and stored is checked at each call.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest
from arena_support import TIMEOUT_S
from vllm_support import IDENTITY, RECORDINGS, Rank, Request, Sides, check_idle, check_objects, shares

from shmcache.integrations.vllm.messages import Report, Step

SEEN: Counter[str] = Counter()  #: of what happened in all recordings
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.json"))


class Recorded(Request):
    """A request of a recording: its hashes are those of its chain, and more for what the recording does not tell."""

    def __init__(self, number: int, chain: list[int], block_tokens: int) -> None:
        super().__init__(f"request-{number}", [])
        told = [hashlib.sha256(b"block %d" % one).digest() for one in chain]
        rest = [hashlib.sha256(b"request %d, %d" % (number, i)).digest() for i in range(len(told), len(told) + 4)]
        self.all_hashes = told + rest
        self.known = 0
        self.blocks: list[int] = []
        self.block_tokens = block_tokens

    @property
    def block_hashes(self) -> list[bytes]:
        return self.all_hashes[: self.known]


class Replay:
    """An arena, the sides of one engine, and what the ranks must have shares of by now."""

    def __init__(self, recording: dict[str, Any], arena: str, *, slow: bool) -> None:
        settings = {"capacity": "8MiB", "block_size": "4KiB", "populate": False}
        self.calls = recording["calls"]
        self.tokens = recording["block_tokens"]
        self.sides = Sides(
            arena,
            ranks=recording["tp"],
            blocks=recording["blocks"],
            block_tokens=self.tokens,
            sync_load_bytes=recording["sync_load_bytes"],
            **settings,
        )
        self.slow = slow  # loads between steps take as long as they took the engine
        chains = enumerate(recording["requests"])
        self.requests = [Recorded(number, chain, self.tokens) for number, chain in chains]
        self.steps: list[Step] = []
        self.scheduled: list[list[tuple[Recorded, int, int]]] = []
        self.reports: dict[int, Report] = {}
        self.told: dict[int, list[bytes]] = {}
        self.loading: list[dict[int, list[bytes]]] = [{} for _ in self.sides.ranks]
        self.received: list[set[str]] = [set() for _ in self.sides.ranks]
        self.was_reset = False
        self.seen: Counter[str] = Counter()  # what happened
        for rank in self.sides.ranks:
            if slow:
                rank.gate.shut("load")

    # Scheduler

    def match(self, number: int, local: int, tokens: int, known: int, expected: int, between_steps: bool) -> None:
        request = self.requests[number]
        request.num_computed_tokens, request.num_tokens, request.known = 0, tokens, known
        found, found_between_steps = self.sides.scheduler.match(request, local)
        assert found is not None
        if self.was_reset:
            assert found == expected
        assert found >= expected, "what was stored in time for the engine is not found"
        assert expected == 0 or found_between_steps == between_steps
        begin = local // self.tokens
        self.seen["asked again"] += number in self.told
        self.seen["preempted"] += any(request in [row[0] for row in rows] for rows in self.scheduled)
        self.told[number] = request.all_hashes[begin : begin - -found // self.tokens]
        self.seen["found besides vLLM's own"] += bool(found and local)
        self.check_shares()

    def alloc(self, number: int, blocks: list[int], external: int) -> None:
        request = self.requests[number]
        request.blocks = blocks
        self.sides.scheduler.allocated(request, blocks, external)
        told = self.told.pop(number, [])
        if external:
            for loading in self.loading:
                loading[number] = told[: -(-external // self.tokens)]
        self.check_shares()

    def step(self, number: int, scheduled: list[list[Any]], new_blocks: list[int], _has_sync_loads: bool) -> None:
        rows = []
        for name, tokens, computed, all_tokens, known, blocks in scheduled:
            request = self.requests[name]
            request.num_computed_tokens, request.num_tokens, request.known = computed, all_tokens, known
            request.blocks = request.blocks if blocks is None else blocks
            rows.append((request, computed, tokens))
        by_id = {request.request_id: request for request, _, _ in rows}
        tokens_of = {request.request_id: tokens for request, _, tokens in rows}
        step = self.sides.scheduler.step(tokens_of, new_blocks, lambda request_id: by_id[request_id].blocks)
        assert number == len(self.steps)
        assert not step.closed
        self.steps.append(step)
        self.scheduled.append(rows)

    def done(self, number: int, _received: list[int], sent: list[int]) -> None:
        assert not sent
        self.sides.scheduler.done(self.reports.pop(number))
        self.check_shares()

    def finish(self, number: int, blocks: list[int], keeps: bool) -> None:
        self.seen["aborted while waiting"] += number in self.told
        self.seen["aborted while loading"] += any(number in loading for loading in self.loading)
        assert self.sides.scheduler.finished(self.requests[number].request_id, blocks) == keeps
        self.told.pop(number, None)
        self.check_shares()

    def reset(self) -> None:
        self.sides.scheduler.reset()
        self.was_reset = True

    # Ranks

    def before(self, rank: int, number: int) -> None:
        self.sides.ranks[rank].worker.before(self.steps[number])

    def load(self, rank: int, number: int) -> None:
        step, side = self.steps[number], self.sides.ranks[rank]
        if self.slow and any(not load.between_steps for load in step.loads):
            side.gate.let_through("load", len(step.loads))
        side.worker.load(step)
        for load in step.loads:
            self.seen["loads"] += 1
            if not load.between_steps:
                self._has_loaded(rank, load.request_id)
            elif not self.slow:
                wait([side.worker._loads[load.request_id]], TIMEOUT_S)
                self._has_loaded(rank, load.request_id)
        self.check_shares()

    def save(self, rank: int, number: int) -> None:
        side = self.sides.ranks[rank]
        for request, computed, tokens in self.scheduled[number]:
            self._compute(side, request, computed, tokens)
        side.worker.save(self.steps[number])

    def finished(self, rank: int, number: int, _sent: list[int], received: list[int]) -> None:
        del number
        side = self.sides.ranks[rank]
        if self.slow:
            side.gate.let_through("load", len(received))
        for one in received:
            request_id = self.requests[one].request_id
            if request_id in side.worker._loads:
                wait([side.worker._loads[request_id]], TIMEOUT_S)
            self._has_loaded(rank, request_id)
        self.received[rank] |= side.worker.received()
        due = {self.requests[one].request_id for one in received}
        assert due <= self.received[rank]
        self.received[rank] -= due
        assert not side.worker.load_errors()

    def report(self, rank: int, number: int) -> None:
        side = self.sides.ranks[rank]
        wait(side.worker._saves.values(), TIMEOUT_S)  # no later than in the engine
        self.reports.setdefault(number, Report()).add(side.worker.report())

    def ranks(self, number: int) -> None:
        """All calls of the ranks in one step."""
        calls: list[Callable[[int, int], None]] = [self.before, self.load, self.save]
        calls += [functools.partial(self.finished, _sent=[], received=[]), self.report]
        for call, rank in itertools.product(calls, range(len(self.sides.ranks))):
            call(rank, number)

    # What must hold

    def check_shares(self) -> None:
        """Each rank has a share of what it may still load, and of nothing else."""
        found = shares(self.sides.arena)
        for rank, loading in enumerate(self.loading):
            expected = Counter(itertools.chain(*self.told.values(), *loading.values()))
            has = Counter[bytes]()
            for key, count in found.get(("vllm", rank), Counter()).items():
                has[key[:32]] += count
            assert has == expected, f"rank {rank}"

    def check_end(self) -> None:
        assert not self.reports
        assert not self.told
        assert not any(self.loading)
        self.sides.drain()
        check_idle(self.sides.cache)
        keys = check_objects(self.sides.cache, self.sides.shape)
        assert {key[32:] for key in keys} > {IDENTITY}
        assert all(len(key) == 48 for key in keys)

    def _has_loaded(self, rank: int, request_id: str) -> None:
        """The right bytes are in the right blocks of a rank."""
        number = int(request_id.removeprefix("request-"))
        request, side = self.requests[number], self.sides.ranks[rank]
        hashes = self.loading[rank].pop(number, None)
        if hashes is None:
            return
        begin = request.all_hashes.index(hashes[0])
        for i in range(begin, begin + len(hashes)):
            assert side.has(request.blocks[i], request.all_hashes[i]), f"rank {rank}: {request_id}, block {i}"

    def _compute(self, rank: Rank, request: Recorded, computed: int, tokens: int) -> None:
        for i in range(computed // self.tokens):
            assert rank.has(request.blocks[i], request.all_hashes[i]), f"{request.request_id} reads bad block {i}"
        for i in range(computed // self.tokens, -(-(computed + tokens) // self.tokens)):
            whole = (i + 1) * self.tokens <= computed + tokens
            rank.put(request.blocks[i], rank.right(request.all_hashes[i] if whole else b"a part"))


@pytest.fixture(params=[False, True], ids=["quick", "slow"])
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether loads between steps take as long as they took the engine."""
    return bool(request.param)


@pytest.fixture
def replay(request: pytest.FixtureRequest, arena_name: str, slow: bool) -> Iterator[Replay]:
    recording = json.loads((RECORDINGS / f"{request.param}.json").read_text(encoding="utf-8"))
    found = Replay(recording, arena_name, slow=slow)
    yield found
    found.sides.close()


@pytest.mark.parametrize("replay", NAMES, indirect=True)
def test_all_calls_of_a_real_engine(replay: Replay) -> None:
    for what, *said in replay.calls:
        getattr(replay, what)(*said)
    replay.check_end()
    assert min(replay.seen[what] for what in ("loads", "asked again", "found besides vLLM's own", "preempted")) > 0
    if replay.slow:
        SEEN.update(replay.seen)


def test_the_recordings_have_aborts_of_all_kinds() -> None:
    if SEEN:  # else the test above has not run
        assert min(SEEN[what] for what in ("aborted while waiting", "aborted while loading")) > 0
