"""Prefetches against a model of what lies where: requests come, fail, are cancelled and consumed in any order.

Objects have one block each, and the arena has room for six of eight keys, so that loading evicts, and is refused.
Requests run while others write, evict, and break the L2, so what a request finds is foretold only where nothing else
goes on. What is granted is always checked: every key of a result is there, with the right bytes, under exactly the
shares that were asked for, and in the end nothing is left.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from arena_support import TIMEOUT_S, contents
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from storage_support import (
    BLOCK,
    Fault,
    Gate,
    MemoryStore,
    answers,
    chain,
    check_nothing_leaked,
    data_of,
    eventually,
    raises,
    shares,
)

import shmcache
from shmcache import ArenaConfig, Cache, Status, WriteBatch
from shmcache.storage import PrefetchResult, PrefetchTask, StorageManager

KEYS = chain(8)
ROOM = 6  #: objects
RANKS = 2
TIMEOUT_L2_S = 0.2

INDICES = st.integers(0, len(KEYS) - 1)
CHAINS = st.one_of(
    st.tuples(INDICES, st.integers(1, 6)).map(lambda span: KEYS[span[0] : span[0] + span[1]]),  # a prefix's rest
    st.lists(st.sampled_from(KEYS), max_size=6),  # any, also with a key twice
)
STORES = st.integers(0, 1)
METHODS = st.sampled_from(["lookup", "load"])
FAULTS: dict[str, Fault] = {
    "raises": raises(OSError("broken")),
    "raises as from outside": raises(SystemExit(1)),
    "answers nothing": answers(lambda _: None),
    "answers too little": answers(lambda answer: answer[:-1]),
    "says yes": answers(lambda answer: [True] * len(answer) if isinstance(answer[0], bool) else answer),
    "finds only the first": answers(lambda answer: [answer[0], *[type(answer[0])(1)] * (len(answer) - 1)]),
    "finds nothing": answers(lambda answer: [False if isinstance(one, bool) else Status.NOT_FOUND for one in answer]),
}


@dataclass(eq=False)
class Known:
    """A request, and what the model knows of it."""

    task: PrefetchTask
    keys: list[bytes]
    extra_count: int
    result: PrefetchResult | None = None  # once it was waited for


class Prefetching(RuleBasedStateMachine):
    """A controller that prefetches for two ranks, in one process with them and with somebody else who writes."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.gates: list[Gate] = []
        self.requests: list[Known] = []
        self.writes: dict[bytes, WriteBatch] = {}
        self.stores = [MemoryStore(nbytes=BLOCK, name="near"), MemoryStore(nbytes=BLOCK, name="far")]

    @initialize(
        near=st.sets(st.sampled_from(KEYS)), far=st.sets(st.sampled_from(KEYS)), l1=st.sets(INDICES, max_size=ROOM)
    )
    def begin(self, near: set[bytes], far: set[bytes], l1: set[int]) -> None:
        shmcache.create(self.name, ArenaConfig(ROOM * BLOCK, block_size=BLOCK, slots=16, lanes=8))
        self.cache = shmcache.attach(self.name, group="engine", world_size=RANKS)
        self.ranks = [shmcache.attach(self.name, group="engine", rank=rank, world_size=RANKS) for rank in range(RANKS)]
        self.other = shmcache.attach(self.name)
        self.storage = StorageManager(
            self.cache,
            self.stores,
            store=None,
            max_in_flight=2,
            io_threads=2,
            l2_timeout_s=TIMEOUT_L2_S,
            contend_s=0.05,
        )
        for store, keys in zip(self.stores, (near, far), strict=True):
            for key in keys:
                self.keep(store, key)
        for index in l1:
            assert self.other.put(KEYS[index], data_of(KEYS[index], BLOCK)) is Status.OK

    def keep(self, store: MemoryStore, key: bytes) -> None:
        store.objects[key] = data_of(key, BLOCK)

    # What others do

    @rule(key=st.sampled_from(KEYS), store=STORES)
    def appear_in_l2(self, key: bytes, store: int) -> None:
        self.keep(self.stores[store], key)

    @rule(key=st.sampled_from(KEYS), store=STORES)
    def vanish_from_l2(self, key: bytes, store: int) -> None:
        self.stores[store].objects.pop(key, None)

    @rule(key=st.sampled_from(KEYS))
    def put(self, key: bytes) -> None:
        self.other.put(key, data_of(key, BLOCK))

    @rule(n=st.integers(1, 3))
    def evict(self, n: int) -> None:
        self.other.evict(n * BLOCK)

    @rule(key=st.sampled_from(KEYS))
    def begin_to_write(self, key: bytes) -> None:
        batch = self.other.reserve_write([key], BLOCK)
        if batch.status == [Status.OK]:
            view = batch.views[0]
            assert view is not None
            view[:] = data_of(key, BLOCK)
            self.writes[key] = batch

    # Whether a write was begun depends on what a request is at, and hypothesis must not: no precondition.
    @rule(number=INDICES, publish=st.booleans())
    def end_to_write(self, number: int, publish: bool) -> None:
        if self.writes:
            batch = self.writes.pop(sorted(self.writes)[number % len(self.writes)])
            assert (batch.publish() if publish else batch.abort()) == [Status.OK]

    # What becomes of the L2

    @rule(store=STORES, method=METHODS, fault=st.sampled_from(sorted(FAULTS)))
    def break_l2(self, store: int, method: str, fault: str) -> None:
        self.stores[store].faults[method] = FAULTS[fault]

    @precondition(lambda self: not self.gates)  # each costs the time after which a call is given up
    @rule(store=STORES, method=METHODS)
    def hang_l2(self, store: int, method: str) -> None:
        self.gates.append(Gate())
        self.stores[store].faults[method] = self.gates[-1]

    @rule()
    def mend_l2(self) -> None:
        for store in self.stores:
            store.faults.clear()
        for gate in self.gates:
            gate.open()
        self.gates.clear()

    # Requests

    @rule(keys=CHAINS, extra_count=st.integers(0, RANKS - 1), skip_l2=st.booleans(), temporary=st.booleans())
    def submit(self, keys: list[bytes], extra_count: int, skip_l2: bool, temporary: bool) -> None:
        task = self.storage.submit_prefetch_task(keys, BLOCK, extra_count, skip_l2=skip_l2, temporary=temporary)
        self.requests.append(Known(task, keys, extra_count))

    @precondition(lambda self: any(known.result is None for known in self.requests))
    @rule(data=st.data())
    def wait(self, data: Any) -> None:
        self.finish(data.draw(st.sampled_from([known for known in self.requests if known.result is None])))

    def finish(self, known: Known) -> None:
        known.result = self.storage.wait_prefetch_status(known.task, TIMEOUT_S)
        assert known.result.hits == known.result.l1_hits + known.result.l2_hits <= len(known.keys)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        known = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        assert self.storage.cancel_prefetch(known.task).hits == 0

    @precondition(lambda self: any(known.result for known in self.requests))
    @rule(data=st.data(), one_for_all=st.booleans())
    def consume(self, data: Any, one_for_all: bool) -> None:
        known = data.draw(st.sampled_from([known for known in self.requests if known.result]))
        self.requests.remove(known)
        assert known.result is not None
        keys = known.keys[: known.result.hits]
        expected: list[bytes | None] = [data_of(key, BLOCK) for key in keys]
        if one_for_all:
            with self.storage.read_prefetched_results(keys, known.extra_count) as batch:
                assert contents(batch) == expected
            return
        for rank in self.ranks[: known.extra_count + 1]:
            before = self.counted("claims")
            with rank.read(keys) as batch:
                assert contents(batch) == expected
            assert self.counted("claims") == before + len(keys)

    @precondition(lambda self: not self.gates and not any(store.faults for store in self.stores))
    @rule(keys=CHAINS, extra_count=st.integers(0, RANKS - 1))
    def prefetch_in_peace(self, keys: list[bytes], extra_count: int) -> None:
        """Where nothing else goes on, the result is foretold."""
        for known in self.requests:
            if known.result is None:
                self.finish(known)
        eventually(lambda: self.cache.stats().writing == len(self.writes), "late calls are back")
        expected = self.foretell(keys)
        self.submit(keys, extra_count, skip_l2=False, temporary=False)
        known = self.requests[-1]
        self.finish(known)
        assert known.result is not None
        if known.result.error is None:  # a slow machine may make a call late
            assert known.result.hits == expected
        else:
            assert "no answer within" in known.result.error or "hangs" in known.result.error

    def foretell(self, keys: list[bytes]) -> int:
        """How many leading keys L1 and L2 have, and the arena has room for beside what is written and shared."""
        l1 = {key for key in keys if self.cache.status([key]) == [Status.OK]}
        kept = set(self.writes) | set(self.granted())
        for hits, key in enumerate(keys):
            there = key in l1 or any(key in store.objects for store in self.stores)
            if not there or key in self.writes or len(kept | {key}) > ROOM:
                return hits
            kept.add(key)
        return len(keys)

    # What always holds

    def counted(self, name: str) -> int:
        count: int = getattr(self.cache.stats().counters, name)
        return count

    def granted(self) -> Counter[bytes]:
        """The keys of results that were neither consumed nor cancelled, and how often they were granted."""
        found: Counter[bytes] = Counter()
        for known in self.requests:
            if known.result is not None:
                found.update(known.keys[: known.result.hits])
        return found

    @invariant()
    def what_was_granted_is_there(self) -> None:
        keys = list(self.granted())
        if keys:
            assert self.cache.status(keys) == [Status.OK] * len(keys)

    @invariant()
    def the_shares_are_those_that_were_granted(self) -> None:
        if any(known.result is None for known in self.requests) or not hasattr(self, "storage"):
            return
        hits = [(known.extra_count, known.result.hits) for known in self.requests if known.result]
        assert shares(self.name) == {
            rank: (sum(n for extra_count, n in hits if extra_count >= rank), 0) for rank in range(RANKS)
        }

    @invariant()
    def the_arena_is_sound(self) -> None:
        if hasattr(self, "storage"):
            assert self.cache.verify() == []

    def teardown(self) -> None:
        if not hasattr(self, "storage"):
            return
        with ExitStack() as last:
            last.callback(shmcache.destroy, self.name, force=True)
            for cache in (self.cache, *self.ranks, self.other):
                last.callback(cache.close)
            self.end()

    def end(self) -> None:
        self.mend_l2()
        for batch in self.writes.values():
            batch.abort()
        try:
            for known in self.requests:
                self.storage.cancel_prefetch(known.task)
        finally:
            self.storage.close()
        eventually(lambda: self.cache.stats().writing == 0, "late calls are back")
        self.check_end(self.cache)

    def check_end(self, cache: Cache) -> None:
        eventually(lambda: cache.stats().gauges.l2_loading == 0, "and counted")
        stats = cache.stats()
        assert stats.histograms.prefetch_total.count == stats.counters.prefetch_requests
        check_nothing_leaked(cache)


TestPrefetching = Prefetching.TestCase
TestPrefetching.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
