"""The protocols of shares and of grants, as models: spin visits every interleaving of their processes, each of which
may stop for ever at the marked steps, and finds no error; and it finds one in each model from which a step is left
out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SHARE_MUTATIONS = {
    1: "the reader does not look again",
    2: "the evictor scans before it marks",
    3: "EVICTING -> FREE by a plain store",
    4: "the word's generation may go back",
    5: "READY before the grant",
    6: "READY before the bytes",
    7: "revoking a lease ignores a claim made meanwhile",
}
GRANT_MUTATIONS = {
    1: "the lease is read before the word",
    2: "the lease is not read again",
    3: "the granter does not look again",
    4: "what is put back does not renew the word's generation",
}
MISSING = [program for program in ("spin", "gcc") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; on Debian: apt-get install spin gcc"
)


def check(folder: Path, model: str, **sizes: int) -> tuple[int, int]:
    """(errors, states) of the exhaustive search."""
    macros = [f"-D{name}={value}" for name, value in sizes.items()]
    path = Path(__file__).with_name(model)
    subprocess.run(["spin", "-a", *macros, str(path)], cwd=folder, check=True, capture_output=True)
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
def test_shares_have_no_error(tmp_path: Path, reads: int, writes: int, states: int) -> None:
    errors, visited = check(tmp_path, "share.pml", READS=reads, WRITES=writes)
    assert errors == 0
    assert visited > states  # a model in which nothing happens has no error, either


@pytest.mark.parametrize("mutation", SHARE_MUTATIONS, ids=SHARE_MUTATIONS.get)
def test_each_step_of_sharing_is_needed(tmp_path: Path, mutation: int) -> None:
    errors, _ = check(tmp_path, "share.pml", READS=1, WRITES=2, MUTATION=mutation)
    assert errors > 0, f"no error though {SHARE_MUTATIONS[mutation]}"


def test_grants_have_no_error(tmp_path: Path) -> None:
    errors, visited = check(tmp_path, "grant.pml", GRANTS=3, READS=2)
    assert errors == 0
    assert visited > 1_000_000


@pytest.mark.parametrize("mutation", GRANT_MUTATIONS, ids=GRANT_MUTATIONS.get)
def test_each_step_of_granting_is_needed(tmp_path: Path, mutation: int) -> None:
    errors, _ = check(tmp_path, "grant.pml", MUTATION=mutation)
    assert errors > 0, f"no error though {GRANT_MUTATIONS[mutation]}"
