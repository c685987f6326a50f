"""The core under ThreadSanitizer, with lanes as threads of one process that join, work, close and die: no access to
plain memory (the payload, layout specs) is unsynchronized. And each of some weaker orders shows as a data race."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sanitizers._mutations import FOR_THREADS, Mutation
from sanitizers._programs import RACE, build_threads, compilers, counts, run, show

OPERATIONS = 30_000  #: a thread; five threads
MUTATED_OPERATIONS = 20_000
MUTATED_SEEDS = 5  #: each of which may show the race
WORK = ("PARTS", "PUBLISHED", "LOST", "ABORTED", "READ", "CLAIMED", "GRANTED", "DELETED", "EVICTED", "DIED", "LAYOUT")
REGIONS = ("ADDED", "GIVEN_UP", "OPENED", "CLOSED", "FREED", "READ_IN_REGION", "READ_LOST", "PUBLISHED_IN_REGION")
EVENTS = ("lock_steals", "leases_revoked", "writes_detached", "reaped_shares", "reaped_writes", "evictions")


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_lanes_as_threads_have_no_data_race(tmp_path: Path, chance: random.Random, compiler: str) -> None:
    program = build_threads(tmp_path / "threads", compiler=compilers(compiler))
    done = run(program, chance.randrange(1 << 32), OPERATIONS)
    assert done.returncode == 0, show(done)
    seen = counts(done.stdout)
    assert all(seen.get(name, 0) > 0 for name in WORK + REGIONS + EVENTS), (
        seen
    )  # a test in which nothing happens finds nothing


@pytest.mark.parametrize("mutation", FOR_THREADS, ids=lambda mutation: mutation.name)
def test_a_weaker_order_is_a_data_race(tmp_path: Path, mutation: Mutation) -> None:
    compilers("gcc")
    program = build_threads(tmp_path / "threads", native=mutation.apply(tmp_path))
    for seed in range(1, MUTATED_SEEDS + 1):
        done = run(program, seed, MUTATED_OPERATIONS)
        if done.returncode != 0:
            break
    assert done.returncode == RACE, f"no data race though {mutation.name}: {show(done)}"
    assert "ThreadSanitizer: data race" in done.stderr
