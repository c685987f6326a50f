"""The protocols as models: spin visits every interleaving of their processes, each of which may stop for ever at any
step, and finds no error; and it finds one in each model from which a step is left out, or in which two are swapped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TIMEOUT_S = 240  #: of one search

#: The model's name, its sizes, and more states than that: a model in which nothing happens has no error, either.
SOUND: list[tuple[str, dict[str, int], int]] = [
    ("share", {"READS": 1, "WRITES": 2}, 1_000_000),
    ("share", {"READS": 2, "WRITES": 1}, 100_000),
    ("grant", {"EVICTIONS": 1, "LAPSES": 1}, 2_000_000),
    ("lock", {"KILLS": 1}, 3_000_000),
    ("index", {"CHANGES": 2, "KEY": 1}, 2_000_000),
    ("index", {"CHANGES": 2, "KEY": 2}, 1_000_000),
    ("collective", {"L": 2, "KILLS": 2}, 2_000_000),
    ("collective", {"L": 2, "KILLS": 1, "SECOND": 1}, 3_000_000),
    ("collective", {"L": 3, "KILLS": 0}, 1_500_000),
]


@dataclass(frozen=True)
class Mutations:
    """What one may leave out of a model, by the number that MUTATION is: an error at these sizes, or at its own."""

    model: str
    sizes: dict[str, int]
    steps: dict[int, str]
    own_sizes: dict[int, dict[str, int]] = field(default_factory=dict)


MUTATIONS = [
    Mutations(
        "share",
        {"READS": 1, "WRITES": 2},
        {
            1: "the reader does not look again",
            2: "the evictor scans before it marks",
            3: "EVICTING to FREE by a plain store",
            4: "the word's generation may go back",
            5: "READY before the grant",
            6: "READY before the bytes",
            7: "the reader does not set EVICTING back",
        },
    ),
    Mutations(
        "grant",
        {"EVICTIONS": 1, "LAPSES": 1},
        {
            1: "the evictor looks before it marks",
            2: "the granter does not look again",
            3: "the granter does not set EVICTING back",
            4: "the rank does not look again",
            5: "EVICTING to FREE by a plain store",
        },
    ),
    Mutations(
        "lock",
        {"KILLS": 2},
        {
            1: "the word has no incarnation",
            2: "a successor leaves its predecessor's row",
            3: "no recovery after a theft",
            4: "theft by a plain store",
            5: "a new incarnation before the byte is locked",
            6: "reaping reads the incarnation second",
        },
    ),
    Mutations(
        "index",
        {"CHANGES": 2},
        {
            1: "a removed entry becomes empty though another follows",
            2: "a miss is not checked against the sequence number",
            3: "a rebuild does not make it odd",
            4: "the generation is not looked at again",
            5: "after a dead rebuilder the next begins with an even number",
            6: "tombstones become empty before an entry",
            7: "even before the index is whole",
            8: "a slot that is freed keeps its generation",
        },
        {4: {"KEY": 2}, 6: {"CHANGES": 3}, 8: {"KEY": 2}},
    ),
    Mutations(
        "collective",
        {"L": 2, "KILLS": 1},
        {
            1: "no look at the state after DONE",
            2: "reaping keeps a part of a detached slot",
            3: "the own stage goes before the look at the others",
            4: "the own stage before the state",
            5: "reaping keeps parts though nobody else lives",
            6: "publishing without a seal",
            7: "DONE before the bytes",
            8: "let go without a look at the others",
            9: "the own stage goes before DETACHED",
            10: "READY before the grants",
            11: "reaping ignores a dead sealer",
            12: "the seal is a plain store",
            13: "a part counts in any generation",
            14: "the look at the others before DETACHED",
        },
    ),
]


def lacking() -> None:
    """Skips where a program is not installed; where CI is set, fails."""
    missing = [program for program in ("spin", "gcc") if shutil.which(program) is None]
    what = f"{' and '.join(missing)} not installed; on Debian: apt-get install spin gcc"
    if missing and os.environ.get("CI"):
        pytest.fail(what)
    if missing:
        pytest.skip(what)


def check(folder: Path, model: str, sizes: dict[str, int]) -> tuple[int, int]:
    """(errors, states) of the exhaustive search."""
    lacking()
    macros = [f"-D{name}={value}" for name, value in sizes.items()]
    path = Path(__file__).with_name(f"{model}.pml")
    subprocess.run(["spin", "-a", *macros, str(path)], cwd=folder, check=True, capture_output=True)
    options = ["-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=512", "-DMEMLIM=4000"]
    if "provided" in path.read_text(encoding="utf-8"):
        options.append("-DNOREDUCE")  # the reduction does not go with processes that run only while they live
    subprocess.run(["gcc", *options, "-o", "pan", "pan.c"], cwd=folder, check=True)
    # -E: the dead are not at their end. The models find by themselves where the living do not come to theirs.
    command = ["./pan", "-E", "-m200000"]
    search = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    errors = re.search(r"errors: (\d+)", search.stdout)
    states = re.search(r"(\d+) states, stored", search.stdout)
    assert errors is not None, search.stdout
    assert states is not None, search.stdout
    assert "max search depth too small" not in search.stdout
    assert "reached -DMEMLIM" not in search.stdout
    return int(errors[1]), int(states[1])


@pytest.mark.parametrize(("model", "sizes", "states"), SOUND)
def test_a_protocol_has_no_error(tmp_path: Path, model: str, sizes: dict[str, int], states: int) -> None:
    errors, visited = check(tmp_path, model, sizes)
    assert errors == 0
    assert visited > states


@pytest.mark.parametrize(
    ("of", "number"),
    [pytest.param(of, n, id=f"{of.model}: {step}") for of in MUTATIONS for n, step in of.steps.items()],
)
def test_each_step_is_needed(tmp_path: Path, of: Mutations, number: int) -> None:
    sizes = of.sizes | of.own_sizes.get(number, {}) | {"MUTATION": number}
    errors, _ = check(tmp_path, of.model, sizes)
    assert errors > 0, f"no error though {of.steps[number]}"


def test_the_table_of_mutations_is_whole() -> None:
    """Each number that a model knows is tried."""
    for of in MUTATIONS:
        text = Path(__file__).with_name(f"{of.model}.pml").read_text(encoding="utf-8")
        used = {int(number) for number in re.findall(r"MUTATION [!=]= (\d+)", text)} - {0}
        assert used == set(of.steps)
