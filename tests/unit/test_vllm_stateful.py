"""Two small engines on one arena, and an outsider: whatever they do, in any order, no byte is wrong, nothing is left.

Each rank has shares of what its requests may still load, and no others; every object that can be read has the right
bytes, also after loads that failed; and in the end nobody has anything, and every block of the engines is free.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from contextlib import ExitStack
from itertools import chain
from typing import Any

from arena_support import TIMEOUT_S
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm_engine import Engine, Job, Pool
from vllm_support import PART, SMALL, TOKENS, Sides, check_idle, check_objects, shares, texts_of_errors

import shmcache
from shmcache import Status

GROUPS = ("one", "two")
ENGINES = st.integers(0, 1)
RANKS = st.integers(0, 1)
ANY = st.integers(0, 2**16)
DISTURBANCES = [*("shut load", "shut save", "open load", "open save", "fail") * 2, "reset"]
PROMPTS = st.tuples(st.integers(0, 1), st.integers(0, 24), st.integers(0, 8), st.integers(1, 12))


class Engines(RuleBasedStateMachine):
    """Small as all of it is, requests wait for blocks, and saves for room."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.engines: list[Engine] = []
        self.forced: set[bytes] = set()
        self.held: list[shmcache.ReadBatch] = []
        self.asked: list[tuple[list[int], int]] = []
        self.number = 0
        self.logs = ExitStack()
        self.logs.enter_context(texts_of_errors())

    @initialize(
        room=st.sampled_from([12, 64, 64]),
        blocks=st.sampled_from([8, 12, 30]),
        replicas=st.sampled_from([1, 1, 2]),
        lag=st.integers(0, 2),
        sync=st.sampled_from([0, 2 * PART, 1 << 30]),
        recompute=st.booleans(),
        save_timeout_s=st.sampled_from([0, 60]),
    )
    def start(
        self, room: int, blocks: int, replicas: int, lag: int, sync: int, recompute: bool, save_timeout_s: int
    ) -> None:
        how = {**SMALL, "capacity": room * 4096, "sync_load_bytes": sync, "save_timeout_s": save_timeout_s}
        for group in GROUPS:
            sides = Sides(self.name, group, replicas=replicas, blocks=blocks, **how)
            self.engines.append(Engine(sides, Pool(blocks), lag=lag, recompute=recompute))
        self.outsider = shmcache.attach(self.name)

    # Requests

    @rule(engine=ENGINES, wanted=st.lists(PROMPTS, min_size=1, max_size=4))
    def ask(self, engine: int, wanted: list[tuple[int, int, int, int]]) -> None:
        """For prompts that have their begin in common with others of their family, and some generated tokens."""
        for family, shared, own, more in wanted:
            self.number += 1
            begin = [family * 100 + i for i in range(shared)]
            self.submit(engine, begin + [self.number * 1000 + i for i in range(own + more)], shared + own)

    @rule(engine=ENGINES, which=ANY, cut=st.sampled_from([0, 0, 0, 1, 5]))
    def ask_again(self, engine: int, which: int, cut: int) -> None:
        """For what somebody asked for before. The engine's own blocks of it are gone, where nobody uses them."""
        if self.asked:
            tokens, known = self.asked[which % len(self.asked)]
            self.engines[engine].forget()
            self.submit(engine, tokens[cut:] if cut == 5 else tokens, known - cut)

    def submit(self, engine: int, tokens: list[int], known: int) -> None:
        self.number += 1
        fits = 2 <= len(tokens) <= TOKENS * (self.engines[engine].pool.blocks - 2)
        if fits and len(self.engines[engine].jobs) <= 8:
            known = max(1, min(known, len(tokens) - 1))
            self.asked.append((tokens, known))
            self.engines[engine].waiting.append(Job(f"r{self.number}", tokens, known))

    @rule(engine=ENGINES, steps=st.integers(1, 8))
    def run(self, engine: int, steps: int) -> None:
        for _ in range(steps):
            self.engines[engine].step()

    @rule(steps=st.integers(5, 15))
    def run_both(self, steps: int) -> None:
        for _ in range(steps):
            for engine in self.engines:
                engine.step()

    @rule(engine=ENGINES)
    def deliver(self, engine: int) -> None:
        self.engines[engine].deliver()

    @rule(engine=ENGINES, which=ANY)
    def abort(self, engine: int, which: int) -> None:
        if jobs := self.engines[engine].jobs:
            self.engines[engine].abort(jobs[which % len(jobs)])

    # What disturbs

    @rule(engine=ENGINES, rank=RANKS, what=st.sampled_from(DISTURBANCES))
    def disturb(self, engine: int, rank: int, what: str) -> None:
        """Copies of a rank are held up, go on, or fail once."""
        sides = self.engines[engine].sides
        if what == "fail":
            sides.ranks[rank].gate.errors["save"] = OSError("no copy")
        elif what == "reset":
            sides.scheduler.reset()
        else:
            how, _, of_what = what.partition(" ")
            getattr(sides.ranks[rank].gate, how)(of_what)

    @rule(which=ANY, n=st.integers(1, 5))
    def delete(self, which: int, n: int) -> None:
        """What nobody uses."""
        keys = [one.key for one in shmcache.inspect(self.name, objects=True).objects or () if len(one.key) == 48]
        for key in keys[which % len(keys) :][:n] if keys else []:
            self.outsider.delete([key])

    @rule(engine=ENGINES, which=ANY, n=st.integers(1, 3))
    def lose(self, engine: int, which: int, n: int) -> None:
        """Somebody forces out what is granted, before the ranks can load it."""

        def force_out() -> None:
            objects = shmcache.inspect(self.name, objects=True).objects or ()
            keys = [one.key for one in objects if len(one.key) == 48 and one.reserved]
            for key in keys[which % len(keys) :][:n] if keys else []:
                if self.outsider.delete([key], force=True) == [Status.OK]:
                    self.forced.add(key[:32])

        self.ask_again(engine, which, 0)
        self.engines[engine].step(force_out)

    @rule(count=st.integers(0, 20))
    def take_room(self, count: int) -> None:
        """Or gives it back."""
        if self.held:
            self.held.pop().release()
            return
        keys = [b"mine %d" % i for i in range(count)]
        for key in keys:
            self.outsider.put(key, b"mine")
        self.held.append(self.outsider.read(keys))

    # What must hold

    @invariant()
    def shares_are_of_what_may_be_loaded(self) -> None:
        for engine in self.engines:
            self.settle(engine)
        found = shares(self.name) if self.engines else {}
        for group, engine in zip(GROUPS, self.engines, strict=False):
            for rank, loading in enumerate(engine.loading):
                has = Counter[bytes]()
                for key, count in found.get((group, rank), Counter()).items():
                    has[key[:32]] += count
                expected = Counter(chain(*engine.told.values(), *loading.values()))
                for one in self.forced:
                    assert has.pop(one, 0) <= expected.pop(one, 0)
                assert has == expected, f"engine {group}, rank {rank}"

    @invariant()
    def only_what_was_forced_out_is_lost(self) -> None:
        for engine in self.engines:
            assert engine.lost <= self.forced

    @invariant()
    def bytes_are_right(self) -> None:
        if self.engines:
            check_objects(self.outsider, self.engines[0].sides.shape)

    def settle(self, engine: Engine) -> None:
        """Loads that nobody holds up are done."""
        for rank in engine.sides.ranks:
            if rank.gate.is_open("load"):
                for load in rank.worker._loads.values():
                    load.result(TIMEOUT_S)
        engine.has_loaded()

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.logs.close()
            if self.engines:
                shmcache.destroy(self.name, force=True)

    def end(self) -> None:
        while self.held:
            self.held.pop().release()
        deadline = time.monotonic() + TIMEOUT_S
        for engine in self.engines:
            engine.lag = 0
            for rank in engine.sides.ranks:
                rank.gate.errors.clear()
                rank.gate.open("load")
                rank.gate.open("save")
        while any(engine.has_work for engine in self.engines):
            assert time.monotonic() < deadline, [str(engine) for engine in self.engines]
            for engine in self.engines:
                engine.step()
        self.shares_are_of_what_may_be_loaded()
        self.bytes_are_right()
        for engine in self.engines:
            engine.sides.run(engine.sides.step())  # what failed is given back
            assert len(engine.pool.free) == engine.pool.blocks
        if self.engines:
            check_idle(self.outsider)
            self.outsider.close()
        for engine in self.engines:
            engine.sides.close()


TestEngines: Any = Engines.TestCase
TestEngines.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
