"""A process dies at every instruction of every operation; and nothing is lost, half there, or held for ever.

The work is done by a program in C beside this file: main.c tells its modes, check.c what is checked of a death, and
authority.c what an operation may change at all. What fails prints the command that repeats it; addr2line -f -e on the
program (built with tests/core_support.py) tells the function of an address.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from crash._runs import PROCESSES, SUMMARY, Told, run

#: Counters of the core that operations must have moved, or the states do not cover what they claim to.
COVERED = {
    "reservations", "publishes", "aborts", "grants", "claims", "releases", "reserved_returned", "read_hits", "deletes",
    "evictions", "no_space", "leases_revoked", "writes_detached", "reaped_shares", "reaped_writes", "lock_steals",
    "rebuilds",
}  # fmt: skip


def shares(slice_of: tuple[int, int]) -> list[str]:
    """A slice of the scenarios as shares of all of them, one a process."""
    at, slices = slice_of
    return [f"{at * PROCESSES + i}/{slices * PROCESSES}" for i in range(PROCESSES)]


def report(mode: str, told: Told) -> None:
    SUMMARY.append(told.line(mode))
    assert not told.problems, "\n".join(told.problems)
    assert told.scenarios


def test_a_half_made_arena_is_none(program: Path) -> None:
    report("create", run(program, "create", parts=["0/1"]))


def test_the_states_cover_what_they_claim(program: Path) -> None:
    told = run(program, "rehearsals")
    assert not told.problems, "\n".join(told.problems)
    assert told.effects().keys() >= COVERED
    # An index is rebuilt for its tombstones, too, where no lock was stolen.
    assert any(row["index_rebuilds"] and "rebuilds" not in row["effects"] for row in told.scenarios)


def test_a_death_at_every_instruction(program: Path, slice_of: tuple[int, int]) -> None:
    report(f"deaths {slice_of[0]}/{slice_of[1]}", run(program, "deaths", parts=shares(slice_of)))


def test_a_death_during_the_recovery_from_a_death(
    program: Path, seed: int, slice_of: tuple[int, int], full: bool
) -> None:
    at, slices = slice_of
    count, depth = (10, 3) if full else (8, 1)
    options = ["--seed", str(seed), "--from", str(at * count), "--count", str(count), "--depth", str(depth)]
    report(f"recoveries {at}/{slices}", run(program, "recoveries", *options))


def test_two_at_once(program: Path, seed: int, slice_of: tuple[int, int], full: bool) -> None:
    passes = ["--all", "--count", "1000"] if full else ["--count", "3"]
    told = run(program, "neighbours", "--seed", str(seed), *passes, parts=shares(slice_of))
    report(f"neighbours {slice_of[0]}/{slice_of[1]}", told)
    SUMMARY.append(f"  the neighbour did: {', '.join(f'{n} {what}' for what, n in told.neighbours.items())}")
    assert all(told.neighbours.values())


#: Operations in which a neighbour may come between a look and what follows, and how often all their stops are tried.
RIVALS = {
    "reserve_stuck": 1, "publish": 4, "publish_grants": 3, "part_last": 3, "part_abort": 2, "claim": 3, "release": 3,
    "delete": 3, "evict_one": 3, "region_publish": 3, "region_open": 3, "region_give_up": 1,
}  # fmt: skip


@pytest.mark.parametrize("op", RIVALS)
def test_a_neighbour_at_each_stop_in_turn(program: Path, seed: int, op: str) -> None:
    for i in range(RIVALS[op]):
        told = run(program, "neighbours", "--seed", str(seed + i), "--op", op, "--all", "--count", "1000")
        report(f"neighbours of {op}, one stop at a time", told)


def test_who_sleeps_gets_the_lock(program: Path) -> None:
    report("sleepers", run(program, "sleepers", "--state", "full_slots"))
