"""The core on a simulated memory as weak as C11 allows, with lanes as fibers that change at any atomic access: every
read has its object's bytes, nothing is lost. And each of some fences and orders that are left out makes that fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sanitizers._mutations import FOR_FIBERS, Mutation
from sanitizers._programs import build_fibers, compilers, counts, run, show

OPERATIONS = 6_000  #: a fiber; five fibers
SEEDS = 4
MUTATED_OPERATIONS = 4_000
MUTATED_SEEDS = 100  #: any of which may show the error; of the rarest mutation one in twelve does
WORK = ("PARTS", "PUBLISHED", "ABORTED", "READ", "CLAIMED", "GRANTED", "DELETED", "EVICTED", "DIED", "LAYOUT")
WORK_IN_REGIONS = (
    "ADDED",
    "GIVEN_UP",
    "OPENED",
    "CLOSED",
    "FREED",
    "READ_IN_REGION",
    "READ_LOST",
    "PUBLISHED_IN_REGION",
)


def test_lanes_on_weak_memory(tmp_path: Path, chance: random.Random) -> None:
    compilers("gcc")
    program = build_fibers(tmp_path / "fibers")
    for _ in range(SEEDS):
        done = run(program, chance.randrange(1 << 32), OPERATIONS)
        assert done.returncode == 0, show(done)
        seen = counts(done.stdout)
        assert all(seen.get(name, 0) > 0 for name in WORK + WORK_IN_REGIONS), seen


def test_a_run_is_repeatable(tmp_path: Path) -> None:
    compilers("gcc")
    program = build_fibers(tmp_path / "fibers")
    assert run(program, 7, 500).stdout == run(program, 7, 500).stdout


@pytest.mark.parametrize("mutation", FOR_FIBERS, ids=lambda mutation: mutation.name)
def test_a_weaker_order_is_an_error(tmp_path: Path, mutation: Mutation) -> None:
    compilers("gcc")
    program = build_fibers(tmp_path / "fibers", native=mutation.apply(tmp_path))
    failed = None
    for seed in range(1, MUTATED_SEEDS + 1):
        done = run(program, seed, MUTATED_OPERATIONS)
        if done.returncode != 0:
            failed = done
            break
    assert failed is not None, f"no error though {mutation.name}"
    assert "failed:" in failed.stderr, show(failed)
