"""A small engine around the connector's two sides that schedules as vLLM does.

It has blocks and a prefix cache of its own, prompts in chunks, preemption, loads within and between steps, steps whose
outputs come late, and blocks that could not be loaded. What it computes is right where all that it computes from is
right, and else it is not: see ``vllm_support.compute``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_support import TOKENS, Request, Sides, compute

from shmcache.integrations.vllm.messages import Report, Step

BUDGET = 10  #: tokens that a step computes at most


class Job(Request):
    """A request; ``num_tokens`` of its tokens are known, and as many more are on their way as ``sampled``."""

    def __init__(self, request_id: str, tokens: Sequence[int], known: int) -> None:
        super().__init__(request_id, tokens, known)
        self.length = len(tokens)
        self.blocks: list[int] = []
        self.cached = 0  # of its blocks, those that others could hit some time
        self.sampled = 0
        self.round = 0  # what was scheduled in an earlier one is stale
        self.loads = False  # between steps
        self.received = False
        self.over = False


@dataclass
class Output:
    """What the ranks say after a step."""

    computed: list[tuple[Job, int, int, bool]]  # its round, tokens, whether a token was sampled
    closed: list[str]
    received: set[str]
    bad: set[int]
    report: Report


class Pool:
    """Blocks, and which of them hold which hash: also those that are free, until they are given away."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free = deque(range(blocks))
        self.cached: dict[bytes, int] = {}
        self._refs = Counter[int]()

    def leading(self, hashes: Iterable[bytes]) -> list[int]:
        found = []
        for one in hashes:
            if one not in self.cached:
                break
            found.append(self.cached[one])
        return found

    def take(self, there: list[int], count: int) -> list[int] | None:
        """These, and so many new ones; None where there is no room."""
        if count > len(self.free) - sum(block in self.free for block in there):
            return None
        for block in there:
            if not self._refs[block]:
                self.free.remove(block)
        new = [self.free.popleft() for _ in range(count)]
        self.forget(new)
        self._refs.update(there + new)
        return there + new

    def give(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                self.free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        gone = set(blocks)
        self.cached = {one: block for one, block in self.cached.items() if block not in gone}


@dataclass
class Engine:
    sides: Sides
    pool: Pool
    lag: int = 0  #: steps whose outputs are not known when the next one is scheduled
    recompute: bool = True  #: what could not be loaded; else such requests fail
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    kept: dict[str, Job] = field(default_factory=dict)  # over, but their blocks are not free
    outputs: deque[Output] = field(default_factory=deque)
    told: dict[str, list[bytes]] = field(default_factory=dict)  # hashes that a waiting request was told of
    loading: list[dict[str, list[bytes]]] = field(default_factory=list)  # of each rank, that it may still load
    lost: set[bytes] = field(default_factory=set)  # hashes of what could not be loaded
    _received: list[set[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loading = [{} for _ in self.sides.ranks]
        self._received = [set() for _ in self.sides.ranks]

    def __str__(self) -> str:
        rows = [(job.request_id, job.num_computed_tokens, job.num_tokens, job.length, job.blocks) for job in self.jobs]
        return f"{rows}, keeps {list(self.kept)}, {len(self.pool.free)} of {self.pool.blocks} blocks are free"

    @property
    def jobs(self) -> list[Job]:
        return [*self.waiting, *self.running]

    @property
    def has_work(self) -> bool:
        return bool(self.jobs or self.kept or self.outputs or self.sides.scheduler.has_work)

    def step(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """One step, and what is said after an earlier one. ``meanwhile``: between the scheduler and the ranks."""
        planned = self._schedule()
        meanwhile()
        self._run(*planned)
        while len(self.outputs) > self.lag:
            self.deliver()

    def abort(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)
        self._finish(job)

    def forget(self) -> None:
        """As if all blocks that nobody uses had been written over."""
        self.pool.forget(self.pool.free)

    # Scheduling

    def _schedule(self) -> tuple[Step, list[tuple[Job, int]]]:
        scheduled: list[tuple[Job, int]] = []
        grown: list[int] = []
        preempted = self._schedule_running(scheduled, grown)
        if not preempted:
            self._schedule_waiting(scheduled)
        blocks = {job.request_id: job.blocks for job, _ in scheduled}
        tokens = {job.request_id: n for job, n in scheduled}
        step = self.sides.scheduler.step(tokens, grown, blocks.__getitem__)
        self.pool.forget(self.sides.scheduler.doubted)
        return step, scheduled

    def _schedule_running(self, scheduled: list[tuple[Job, int]], grown: list[int]) -> bool:
        preempted = False
        for job in list(self.running):
            n = min(self._left(job), self._budget(scheduled))
            if job not in self.running or n <= 0:
                continue
            need = -(-(job.num_computed_tokens + n) // TOKENS) - len(job.blocks)
            while (new := self.pool.take([], max(need, 0))) is None:
                self._preempt(self.running[-1])
                preempted = True
                if job not in self.running:
                    break
            if new is not None and job in self.running:
                job.blocks += new
                grown += new
                self._plan(job, n, scheduled)
        scheduled[:] = [(job, n) for job, n in scheduled if job in self.running]
        return preempted

    def _schedule_waiting(self, scheduled: list[tuple[Job, int]]) -> None:
        for job in sorted(self.waiting, key=lambda job: not job.blocks):  # first those that keep blocks from others
            if not self._budget(scheduled):
                return
            if job.loads and not self._is_loaded(job):
                continue
            if job.num_computed_tokens == 0:
                if not self._admit(job, scheduled):
                    if job.request_id in self.told:
                        return  # no room
                    continue  # L2 is asked, or it is loaded between steps
            else:
                self._resume(job, scheduled)  # where there is no room, another that keeps blocks may end

    def _admit(self, job: Job, scheduled: list[tuple[Job, int]]) -> bool:
        local = self.pool.leading(job.all_hashes[: (job.num_tokens - 1) // TOKENS])
        found, between_steps = self.sides.match(job, len(local))
        if found is None:
            return False
        begin = len(local)
        self.told[job.request_id] = job.all_hashes[begin : begin - -found // TOKENS]
        computed = begin * TOKENS + found
        n = 0 if between_steps else min(job.num_tokens - computed, self._budget(scheduled))
        count = -(-(computed + n) // TOKENS) - begin
        if between_steps and self._reserved() + count > len(self.pool.free):
            return False
        blocks = self.pool.take(local, count)
        if blocks is None:
            return False
        job.blocks, job.num_computed_tokens, job.loads, job.received = blocks, computed, between_steps, False
        job.cached = begin
        self.sides.scheduler.allocated(job, blocks, found)
        told = self.told.pop(job.request_id)
        if found:
            for loading in self.loading:
                loading[job.request_id] = told
        if not between_steps:
            self._to_running(job, n, scheduled)
        return not between_steps

    def _resume(self, job: Job, scheduled: list[tuple[Job, int]]) -> None:
        """What it waited for is loaded."""
        n = min(self._left(job), self._budget(scheduled))
        new = self.pool.take([], -(-(job.num_computed_tokens + n) // TOKENS) - len(job.blocks))
        if new is None:
            return
        job.blocks += new
        self.sides.scheduler.allocated(job, job.blocks, 0)
        self._to_running(job, n, scheduled)

    def _reserved(self) -> int:
        """What those that are loaded between steps, which cannot be preempted, will need besides."""
        return sum(-(-job.length // TOKENS) - len(job.blocks) for job in self.waiting if job.blocks) + 1

    def _is_loaded(self, job: Job) -> bool:
        if not job.received:
            return False
        job.loads = False
        if job.num_computed_tokens:
            self._cache(job, job.num_computed_tokens)
            job.num_computed_tokens = min(job.num_computed_tokens, job.num_tokens - 1)
        else:
            self.pool.give(job.blocks)
            job.blocks = []
        return True

    def _to_running(self, job: Job, n: int, scheduled: list[tuple[Job, int]]) -> None:
        self.waiting.remove(job)
        self.running.append(job)
        self._plan(job, n, scheduled)

    def _plan(self, job: Job, n: int, scheduled: list[tuple[Job, int]]) -> None:
        """Others of this step can use what it will compute."""
        scheduled.append((job, n))
        self._cache(job, job.num_computed_tokens + n)

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self.waiting.insert(0, job)
        self.pool.give(job.blocks)
        job.blocks, job.num_computed_tokens, job.sampled = [], 0, 0
        job.round += 1

    def _left(self, job: Job) -> int:
        return min(job.num_tokens + job.sampled, job.length - 1) - job.num_computed_tokens

    def _budget(self, scheduled: list[tuple[Job, int]]) -> int:
        return BUDGET - sum(n for _, n in scheduled)

    def _cache(self, job: Job, tokens: int) -> None:
        """Its full blocks can be used by others; each is made known once."""
        full = max(job.cached, min(tokens, job.num_tokens) // TOKENS)
        for i in range(job.cached, full):
            self.pool.cached.setdefault(job.all_hashes[i], job.blocks[i])
        job.cached = full

    # The ranks

    def _run(self, step: Step, scheduled: list[tuple[Job, int]]) -> None:
        within = any(not load.between_steps for load in step.loads)
        for rank in self.sides.ranks:
            if step.flush:
                rank.gate.open("save")
            if within:
                rank.gate.open("load")
            rank.worker.before(step)
            if within:
                rank.worker.load(step)
        for job, n in scheduled:
            compute(self.sides.ranks, job, n, job.blocks)
        computed = []
        for job, n in scheduled:
            job.num_computed_tokens += n
            sampled = job.num_computed_tokens == job.num_tokens + job.sampled
            job.sampled += sampled
            computed.append((job, job.round, n, sampled))
        for rank in self.sides.ranks:
            if not within:
                rank.worker.load(step)
            rank.worker.save(step)
        self.outputs.append(self._said(step, computed))

    def _said(self, step: Step, computed: list[Any]) -> Output:
        report, bad = Report(), set[int]()
        for rank, received in zip(self.sides.ranks, self._received, strict=True):
            received.update(rank.worker.received())
            bad |= rank.worker.load_errors()
            report.add(rank.worker.report())
        everywhere = set.intersection(*self._received)
        for received in self._received:
            received.difference_update(everywhere)
        return Output(computed, step.closed, everywhere, bad, report)

    def has_loaded(self) -> None:
        """Forgets what the ranks are through with."""
        for rank, loading in zip(self.sides.ranks, self.loading, strict=True):
            under_way = {name for name, load in rank.worker._loads.items() if not load.done()}
            for name in loading.keys() - under_way:
                del loading[name]

    # Outputs

    def deliver(self) -> None:
        """What the ranks said after the oldest step."""
        if not self.outputs:
            return
        output = self.outputs.popleft()
        failed = self._take_bad(output) if output.bad else []
        for job, round_, _, sampled in output.computed:
            if sampled and not job.over and job.round == round_:
                job.sampled -= 1
                job.num_tokens += 1
                if job.num_tokens == job.length:
                    self.running.remove(job)
                    self._finish(job)
        for job in failed:
            if not job.over:
                self.abort(job)
        self.sides.scheduler.done(output.report)
        for name in output.received:
            waiting = [job for job in self.waiting if job.request_id == name]
            if waiting:
                waiting[0].received = True
            else:
                self.pool.give(self.kept.pop(name).blocks)
        for name in output.closed:
            self.pool.give(self.kept.pop(name).blocks)

    def _take_bad(self, output: Output) -> list[Job]:
        """Sets requests back to before their first bad block; those that fail for it."""
        tokens = {job.request_id: n for job, _, n, _ in output.computed}
        failed, marked = [], {True: set[int](), False: set[int]()}
        for job in [*filter(lambda job: job.loads, self.waiting), *self.running]:
            before = max(job.num_computed_tokens - tokens.get(job.request_id, 0), 0)
            bad = [i for i, block in enumerate(job.blocks[: -(-before // TOKENS)]) if block in output.bad]
            if not bad:
                continue
            self.lost.update(job.all_hashes[i] for i in bad)
            failed.append(job)
            fresh = [i for i in bad if job.blocks[i] not in marked[job.loads]]
            marked[job.loads].update(job.blocks[i] for i in bad)
            job.num_computed_tokens = fresh[0] * TOKENS if fresh else before
            if not job.loads:  # others may compute its bad blocks; what it has under way is void
                job.num_computed_tokens = min(job.num_computed_tokens, job.num_tokens - 1)
                job.round += 1
                job.sampled = 0
        self.pool.forget(range(self.pool.blocks))  # as the connector does
        return [] if self.recompute else failed

    def _finish(self, job: Job) -> None:
        job.over = True
        self.told.pop(job.request_id, None)
        computed = job.blocks[: -(-job.num_computed_tokens // TOKENS)]
        keeps = self.sides.scheduler.finished(job.request_id, computed)
        if keeps or (job.loads and not job.received):
            self.kept[job.request_id] = job
        else:
            self.pool.give(job.blocks)
