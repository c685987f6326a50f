"""The protocol of shares, as a model: spin visits every interleaving of two readers and two writers, each of which may
stop for ever at any step, and finds no error; and it finds one in each model from which a step is left out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("share.pml")
MUTATIONS = {
    1: "the reader does not look again",
    2: "the evictor scans before it marks",
    3: "EVICTING -> FREE by a plain store",
    4: "the word's generation may go back",
    5: "READY before the grant",
    6: "READY before the bytes",
    7: "revoking a lease ignores a claim made meanwhile",
}
MISSING = [program for program in ("spin", "gcc") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; on Debian: apt-get install spin gcc"
)


def check(folder: Path, **sizes: int) -> tuple[int, int]:
    """(errors, states) of the exhaustive search."""
    macros = [f"-D{name}={value}" for name, value in sizes.items()]
    subprocess.run(["spin", "-a", *macros, str(MODEL)], cwd=folder, check=True, capture_output=True)
    options = ["-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=512", "-DMEMLIM=4000"]
    subprocess.run(["gcc", *options, "-o", "pan", "pan.c"], cwd=folder, check=True)
    search = subprocess.run(["./pan", "-m100000"], cwd=folder, check=True, capture_output=True, text=True)
    errors = re.search(r"errors: (\d+)", search.stdout)
    states = re.search(r"(\d+) states, stored", search.stdout)
    assert errors is not None, search.stdout
    assert states is not None, search.stdout
    assert "max search depth too small" not in search.stdout
    assert "reached -DMEMLIM" not in search.stdout
    return int(errors[1]), int(states[1])


@pytest.mark.parametrize(("reads", "writes", "states"), [(1, 2, 1_000_000), (2, 1, 100_000)])
def test_the_protocol_has_no_error(tmp_path: Path, reads: int, writes: int, states: int) -> None:
    errors, visited = check(tmp_path, READS=reads, WRITES=writes)
    assert errors == 0
    assert visited > states  # a model in which nothing happens has no error, either


@pytest.mark.parametrize("mutation", MUTATIONS, ids=MUTATIONS.get)
def test_each_step_is_needed(tmp_path: Path, mutation: int) -> None:
    errors, _ = check(tmp_path, READS=1, WRITES=2, MUTATION=mutation)
    assert errors > 0, f"no error though {MUTATIONS[mutation]}"
