"""The engines of the measurement, one after the other or two at once, and what each is asked.

Every way answers the same prompts. The first of them only warm up: what is slow once is not measured.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_common import FIRST, KEPT, L2, RECOMPUTED, RESET, RESTARTED, SECOND, Finding, Memory

import shmcache
from shmcache_tools.engine.client import Answer, Engine, EngineError, shmcache_connector
from shmcache_tools.engine.models import VOCABULARY

OFFLOADING = ("OffloadingConnector", "SimpleCPUOffloadConnector")
WARM_UP = 2  # prompts
WAKE_UP = [3] * 8  # tokens: less than a block, so that nothing of it is kept
MAX_TOKENS = 8
SPIN_S = 1.2  # vLLM's workers spin for a second when they are done, on the cores that the next engine computes on
QUIET_S, QUIET_TIMEOUT_S = 0.3, 60.0
NAP_S = 0.02
GOALS = {KEPT: None, RESET: 4.0, RESTARTED: 4.0, SECOND: 4.0, L2: 2.0, FIRST: 0.8}

Step = Callable[[str], None]  # told what goes on now


@dataclass(frozen=True)
class Plan:
    """What is measured, with what."""

    model: Path
    l2: Path
    tp: int
    prompts: int  # that are measured
    prompt_tokens: int
    capacity: int  # bytes of an arena that holds them all

    def all_prompts(self) -> list[list[int]]:
        """Those that warm up first."""
        chance = random.Random(self.prompt_tokens)
        return [
            [chance.randrange(3, VOCABULARY) for _ in range(self.prompt_tokens)] for _ in range(WARM_UP + self.prompts)
        ]


@dataclass(frozen=True)
class Beside:
    """What an engine without a connector answers to the same prompt: computed again, and then kept by vLLM itself."""

    computed: Answer
    kept: Answer

    @classmethod
    def asked(cls, plain: Engine, prompt: Sequence[int]) -> Beside:
        return cls(_ask_again(plain, prompt), _ask(plain, prompt))


class Measurement:
    """Runs the engines; ``findings`` grows, ``memory`` comes last.

    An engine without a connector lives all the time: it computes each prompt again just before another one is asked,
    so that what disturbs the machine disturbs both.
    """

    def __init__(self, plan: Plan, step: Step) -> None:
        self.findings: list[Finding] = []
        self.memory: Memory | None = None
        self._plan = plan
        self._step = step
        self._prompts = plan.all_prompts()
        self._tokens: list[list[int]] = []  # of the very first answers

    def run(self) -> None:
        """EngineError where vLLM itself, or shmcache in it, does not do what it is asked."""
        with self._engine("an engine without a connector") as plain, _arena_name() as arena:
            self._without_connector(plain)
            for connector in OFFLOADING:
                self._offloading(plain, connector)
            self._with_shmcache(plain, arena)

    def _without_connector(self, plain: Engine) -> None:
        again, kept = self._finding(RECOMPUTED), self._finding(KEPT)
        for number, prompt in self._asked("computing prompts"):
            first = _ask(plain, prompt)
            self._tokens.append(first.tokens)
            beside = Beside.asked(plain, prompt)
            self._add(again, number, Beside(first, beside.kept), beside.computed)
            self._add(kept, number, beside, beside.kept)

    def _offloading(self, plain: Engine, connector: str) -> None:
        """vLLM's own; it says itself where it does not run."""
        config = {
            "kv_connector": connector,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": self._plan.capacity},
        }
        finding = self._finding(f"vLLM's {connector}: vLLM's cache emptied")
        try:
            with self._engine(f"an engine with the {connector}", config) as engine:
                for number, prompt in self._asked(f"asking twice through the {connector}"):
                    _ask(engine, prompt)
                    time.sleep(QUIET_S)  # it tells nobody when it has stored
                    self._add(finding, number, _calm_beside(plain, prompt), _ask_again(engine, prompt))
        except EngineError as error:
            finding.problem = error.reason

    def _with_shmcache(self, plain: Engine, arena: str) -> None:
        config = shmcache_connector(arena, capacity=self._plan.capacity, l2=str(self._plan.l2))
        first, second = self._finding(FIRST), self._finding(RESET)
        with self._engine("an engine with shmcache", config) as engine:
            for number, prompt in self._asked("asking twice through shmcache"):
                self._add(first, number, _calm_beside(plain, prompt), _ask(engine, prompt))
                _wait_quiet(arena)
                self._add(second, number, _calm_beside(plain, prompt), _ask_again(engine, prompt))
            _wait_quiet(arena)
            one_engine = _kept_bytes(arena)
            engine.kill("all")
        with self._engine("the engine again, which was killed", config) as engine:
            self._ask_all(RESTARTED, plain, engine)
            with self._engine("a second engine", config) as other:
                self._ask_all(SECOND, plain, other)
                _wait_quiet(arena)
                shared = _kept_bytes(arena)
        shmcache.destroy(arena)
        with self._engine("an engine with a new arena and the same L2", config) as engine:
            self._ask_all(L2, plain, engine)
            _wait_quiet(arena)
            self.memory = Memory(one_engine, shared, shared + _kept_bytes(arena))

    @contextmanager
    def _engine(self, what: str, connector: Mapping[str, object] | None = None) -> Iterator[Engine]:
        self._step(f"starting {what}")
        with Engine(self._plan.model, tp=self._plan.tp, connector=connector) as engine:
            yield engine
            self._step(f"ending {what}")

    def _asked(self, what: str) -> Iterator[tuple[int, list[int]]]:
        for number, prompt in enumerate(self._prompts):
            self._step(f"{what}: {number + 1} of {len(self._prompts)}")
            yield number, prompt

    def _ask_all(self, what: str, plain: Engine, engine: Engine) -> None:
        finding = self._finding(what)
        for number, prompt in self._asked(what):
            self._add(finding, number, _calm_beside(plain, prompt), _ask(engine, prompt))

    def _finding(self, what: str) -> Finding:
        self.findings.append(Finding(what, least_ratio=GOALS.get(what)))
        return self.findings[-1]

    def _add(self, finding: Finding, number: int, beside: Beside, answer: Answer) -> None:
        """What came of a prompt, unless it only warmed up."""
        if number >= WARM_UP:
            finding.ttft.append(_ttft(answer))
            finding.recomputed.append(_ttft(beside.computed))
            finding.kept.append(_ttft(beside.kept))
            finding.cached.append(answer.cached_tokens)
            finding.same.append(answer.tokens == self._tokens[number])


def _calm_beside(plain: Engine, prompt: Sequence[int]) -> Beside:
    """While another engine is there: neither takes the cores from the one that is asked."""
    time.sleep(SPIN_S)
    beside = Beside.asked(plain, prompt)
    time.sleep(SPIN_S)
    return beside


def _ask(engine: Engine, prompt: Sequence[int]) -> Answer:
    """By workers that are awake: all find them so."""
    engine.generate(WAKE_UP, max_tokens=1)
    return engine.generate(prompt, MAX_TOKENS)


def _ask_again(engine: Engine, prompt: Sequence[int]) -> Answer:
    """With vLLM's own cache emptied, once nothing in it is in use."""
    _wait(engine.reset_prefix_cache, "vLLM's prefix cache stays in use")
    return _ask(engine, prompt)


def _ttft(answer: Answer) -> float:
    if answer.ttft_s is None:
        raise EngineError(f"a request ended without a token: {answer.finish_reason}")
    return answer.ttft_s


def _wait_quiet(arena: str) -> None:
    """Until nobody reads, writes or stores to L2, for a while: a save begins after its answer."""
    since = time.monotonic()

    def quiet() -> bool:
        nonlocal since
        stats = _stats(arena)
        if stats.writing or stats.held or stats.reserved or stats.gauges.l2_storing or stats.gauges.l2_backlog_bytes:
            since = time.monotonic()
        return time.monotonic() - since >= QUIET_S

    _wait(quiet, f"arena {arena} stays in use")


def _wait(condition: Callable[[], bool], problem: str) -> None:
    until = time.monotonic() + QUIET_TIMEOUT_S
    while not condition():
        if time.monotonic() > until:
            raise EngineError(f"{problem} for {QUIET_TIMEOUT_S:g} s")
        time.sleep(NAP_S)


def _kept_bytes(arena: str) -> int:
    return _stats(arena).used_bytes


def _stats(arena: str) -> shmcache.Stats:
    info = shmcache.inspect(arena)
    if info.stats is None:
        raise EngineError(f"arena {arena}: {info.problem}")
    return info.stats


@contextmanager
def _arena_name() -> Iterator[str]:
    """Of an arena that engines make; it is destroyed afterwards."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        if name in shmcache.arenas():
            shmcache.destroy(name, force=True)
