"""The scheduler's side of the connector: what each request can load, what each step saves.

All methods are called by the scheduler's thread, and none waits for a copy, for L2, or for a worker to be through. An
arena that fails costs hits, never requests: errors of shmcache end here, and are logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import shmcache
from shmcache.integrations.vllm.counters import Counters
from shmcache.integrations.vllm.digests import digest, fresh_identity
from shmcache.integrations.vllm.hits import Hits
from shmcache.integrations.vllm.messages import Load, Report, Shape, Step
from shmcache.integrations.vllm.saves import Saves
from shmcache.integrations.vllm.settings import Settings
from shmcache.integrations.vllm.tier import Tier

__all__ = ["Request", "Scheduler"]

_log = logging.getLogger("vllm.shmcache")

_IDLE_S = 0.001  #: that a step takes which computes nothing
_PAUSE_S = 30.0  #: no saves for so long after a lock holder that is stopped made one wait in vain


class Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    num_computed_tokens: int
    block_hashes: Sequence[bytes]  #: of the full blocks of all tokens known; grows

    num_tokens: int
    skip_reading_prefix_cache: bool  #: whether the engine must compute it all


@dataclass(slots=True)
class _Chain:
    """A request that is not finished."""

    request: Request
    identity: bytes
    salt: str  # the scheduler's, when it was made
    saves: bool  # False where this engine never does, and once its blocks are not what its keys say
    doubted: bool = False  # once its blocks may come from some that were never loaded
    local: int = 0  # leading blocks that the engine had itself when it was asked for
    between_steps: bool = False  # how vLLM was told that it would be loaded
    asked: int = 0  # blocks that were looked for, and not counted yet
    l2_hits: int = 0  # of the blocks that are loaded
    wanted: int = 0  # leading blocks that are computed, once this step is
    handled: int = 0  # of these, in the arena, or on their way there
    granted: range = range(0)  # blocks that are loaded
    _keys: list[bytes] = field(default_factory=list)

    def keys(self, start: int, stop: int) -> list[bytes]:
        have = len(self._keys)
        if have < stop:
            self._keys += [bytes(one) + self.identity for one in self.request.block_hashes[have:stop]]
        return self._keys[start:stop]

    @property
    def is_behind(self) -> bool:
        """Whether there is something to save."""
        return self.saves and not self.doubted and self.handled < self.wanted

    def note_computed(self, tokens: int, block_tokens: int) -> None:
        """A step computes so many more. Tokens that are not known yet, as drafts, have no hash: so the blocks that are
        wanted stay as the step leaves them."""
        full = (self.request.num_computed_tokens + tokens) // block_tokens
        self.wanted = min(full, len(self.request.block_hashes))


@dataclass(slots=True)
class _Closing:
    """A finished request that keeps its blocks until there is room for them in the arena, or until ``deadline``."""

    chain: _Chain
    blocks: list[int]
    deadline: float


class Scheduler:
    """Made once the workers have said how blocks lie in memory.

    ``identity_of`` gives what a request's keys end with, ``block_tokens`` how many tokens a block has. ``loads``,
    ``saves``: whether this engine does so at all.
    """

    def __init__(
        self,
        cache: shmcache.Cache,
        settings: Settings,
        shape: Shape,
        identity_of: Callable[[Request], bytes],
        *,
        block_tokens: int,
        lease_s: float,
        loads: bool = True,
        saves: bool = True,
    ) -> None:
        self.counters = Counters()
        self.doubted: set[int] = set()  #: blocks that other requests must not use, once a step is made
        self._cache = cache
        self._settings = settings
        self._shape = shape
        self._identity_of = identity_of
        self._block_tokens = block_tokens
        self._loads = loads
        self._saves = saves
        self._tier = Tier(cache, settings.l2) if settings.l2 else None
        self._hits = Hits(
            cache,
            shape,
            self._tier,
            self.counters,
            lease_s=lease_s,
            prefetch_timeout_s=settings.prefetch_timeout_s,
        )
        self._jobs = Saves(cache, shape, self.counters)
        self._chains: dict[str, _Chain] = {}
        self._closing: dict[str, _Closing] = {}
        self._planned: list[Load] = []  # for the next step
        self._written: set[int] = set()  # blocks that the next step, or a load before it, writes over
        self._epoch = 0
        self._salt = ""  # told by the keys since the cache was reset
        self._no_saves_before = 0.0
        self._complaints: set[str] = set()

    # What vLLM asks, in the order of a request's life

    def match(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond the engine's own ``computed_tokens`` can be loaded, and whether between steps; None:
        ask again. At least one token is left to compute."""
        with self._shelter("ask L2"):
            if self._hits.waits(request.request_id):
                return None, False
        chain = self._chain_of(request, computed_tokens // self._block_tokens)
        if self._loads and not request.skip_reading_prefix_cache:
            with self._shelter("look for hits"):
                return self._match(chain)
        return 0, False

    def allocated(self, request: Request, blocks: list[int], external_tokens: int) -> None:
        """The request has its ``blocks``, and ``external_tokens`` of them are to be loaded."""
        chain = self._chains[request.request_id]
        self._written.update(blocks[chain.local :])
        count = -(-external_tokens // self._block_tokens)
        chain.l2_hits = 0
        with self._shelter("keep hits"):
            chain.l2_hits = self._hits.take(request.request_id, count)
        if count:
            stop = chain.local + count
            chain.granted = range(chain.local, stop)
            keys = chain.keys(chain.local, stop)
            self._planned.append(Load(request.request_id, keys, blocks[chain.local : stop], chain.between_steps))
        self.counters.add(asked_blocks=chain.asked, hit_blocks=count, l2_hit_blocks=chain.l2_hits)
        chain.asked = 0

    def l2_tokens(self, request: Request) -> int:
        """How many of the tokens that are to be loaded came from L2."""
        return self._chains[request.request_id].l2_hits * self._block_tokens

    def step(
        self, scheduled: Mapping[str, int], new_blocks: Iterable[int], blocks_of: Callable[[str], list[int]]
    ) -> Step:
        """What the workers have to do in the step that computes ``scheduled`` tokens of these requests.

        ``new_blocks``: what running requests got for it. ``blocks_of`` gives all blocks of a request.
        """
        self._written.update(new_blocks)
        step = Step(self._epoch, self._planned, flush=self._jobs.flushed(self._written))
        self._planned = []
        self._written.clear()
        self.counters.add(flushes=len(step.flush))
        computed = [self._chains[request_id] for request_id in scheduled if request_id in self._chains]
        for chain in computed:
            chain.note_computed(scheduled[chain.request.request_id], self._block_tokens)
        doubted = [chain.request.request_id for chain in computed if chain.doubted]
        self.doubted = {block for request_id in doubted for block in blocks_of(request_id)}
        if time.monotonic() > self._no_saves_before:
            with self._shelter("save blocks"):
                self._jobs.abort_failed()
                for chain in computed:
                    if chain.is_behind:
                        self._save(step, chain, blocks_of(chain.request.request_id))
                for closing in self._closing.values():
                    if closing.chain.is_behind:
                        self._save(step, closing.chain, closing.blocks)
        self._close_late(step)
        if not scheduled and not step.loads:
            # All wait for copies or for L2, whose threads are of this process; vLLM would ask again without a pause.
            time.sleep(_IDLE_S)
        return step

    def done(self, report: Report) -> None:
        """What the workers said after a step."""
        saved, spoilt = self._jobs.done(report)
        for request_id in spoilt & self._chains.keys():
            self._chains[request_id].handled = 0
        if report.bad_epoch >= self._epoch:
            # Until now requests may have been computed on from blocks that were never loaded. vLLM sets them back, or
            # ends them; but it lets some rely on others to compute these blocks again, which may be gone before. So
            # they save nothing more, nor do those that only load yet; and nobody else uses what they compute.
            self._epoch = report.bad_epoch + 1
            for chain in (*self._chains.values(), *(closing.chain for closing in self._closing.values())):
                chain.doubted |= chain.wanted > 0 or chain.local > 0
        if self._tier is not None:
            for keys in saved:
                self.counters.add(l2_dropped_blocks=self._tier.store(keys))

    def finished(self, request_id: str, blocks: list[int]) -> bool:
        """Whether a request that is over keeps its blocks, until a step tells the workers that it is ``closed``."""
        chain = self._chains.pop(request_id, None)
        with self._shelter("give back hits"):
            self._hits.drop(request_id)
        if chain is None:
            return False
        chain.wanted = min(chain.wanted, len(blocks))
        if not chain.is_behind:
            return False
        self._closing[request_id] = _Closing(chain, blocks, time.monotonic() + self._settings.save_timeout_s)
        return True

    @property
    def has_work(self) -> bool:
        """Whether steps are needed though there may be no request: workers have something to report, or to be told."""
        return bool(self._jobs) or bool(self._closing)

    def reset(self) -> None:
        """What was saved before is never found again by this engine: the model is another one now, for all we know.

        A request that runs on computes from blocks of both, so nothing of it is saved.
        """
        self._salt = fresh_identity().hex()
        for chain in self._chains.values():
            chain.saves = False

    def close(self) -> None:
        """Gives back what is granted. Nothing depends on this: a death does the same."""
        for request_id in list(self._chains):
            with self._shelter("give back hits"):
                self._hits.drop(request_id)
        with self._shelter("abort saves"):
            self._jobs.close()
        if self._tier is not None:
            self._tier.close()

    # Loading

    def _chain_of(self, request: Request, local: int) -> _Chain:
        """vLLM asks for requests of which nothing is computed: new ones, and those that were preempted."""
        chain = self._chains.get(request.request_id)
        if chain is None or chain.wanted or chain.doubted or chain.salt != self._salt:
            identity = self._identity_of(request)
            if self._salt:
                identity = digest({"identity": identity.hex(), "salt": self._salt})
            chain = self._chains[request.request_id] = _Chain(request, identity, self._salt, self._saves)
        chain.local = local
        return chain

    def _match(self, chain: _Chain) -> tuple[int | None, bool]:
        request, start = chain.request, chain.local
        keys = chain.keys(start, request.num_tokens // self._block_tokens)
        chain.asked = len(keys)
        hits = self._hits.find(request.request_id, keys)
        if hits is None:
            return None, False
        stop = min((start + hits) * self._block_tokens, request.num_tokens - 1)
        tokens = stop - start * self._block_tokens
        chain.between_steps = tokens > 0 and hits * self._shape.part_bytes > self._settings.sync_load_bytes
        return max(tokens, 0), chain.between_steps

    # Saving

    def _save(self, step: Step, chain: _Chain, blocks: list[int]) -> None:
        """What this step makes full of a request, and what could not be saved before."""
        start, stop = chain.handled, chain.wanted
        keys = chain.keys(start, stop)
        granted = range(chain.granted.start - start, chain.granted.stop - start)
        handled, save = self._jobs.reserve(chain.request.request_id, keys, blocks[start:stop], step.epoch, granted)
        chain.handled += handled
        if save is not None:
            step.saves.append(save)
        if handled < len(keys):
            self.counters.add(save_waits=1)

    def _close_late(self, step: Step) -> None:
        now = time.monotonic()
        for request_id, closing in list(self._closing.items()):
            if closing.chain.is_behind and now < closing.deadline:
                continue
            del self._closing[request_id]
            step.closed.append(request_id)
            self.counters.add(unsaved_blocks=closing.chain.wanted - closing.chain.handled)

    @contextmanager
    def _shelter(self, what: str) -> Iterator[None]:
        """An error of the arena costs what was tried, and is logged, once of its kind."""
        try:
            yield
        except shmcache.ShmcacheError as error:
            if isinstance(error, shmcache.ArenaBusyError):  # each try would stop the engine for lock_timeout_s
                self._no_saves_before = time.monotonic() + _PAUSE_S
            kind = f"{what}: {type(error).__name__}"
            if kind not in self._complaints:
                self._complaints.add(kind)
                _log.error("could not %s, and goes on without: %s", what, error)
