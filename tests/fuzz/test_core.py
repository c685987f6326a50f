"""A damaged segment under every operation of the C core, with sanitizers: an error of ours or service, nothing else.

``SHMCACHE_FUZZ_S``: seconds for each search, where those of every day are not enough (an hour: 3600).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest
from fuzz._sanitized import OPTIONS, build_target, check_compiler

SECONDS: Final = float(os.environ.get("SHMCACHE_FUZZ_S", "10"))
MARGIN_S: Final = 240  #: the driver ends a run that hangs by itself, long before
_CASE: Final = re.compile(r"CASE\((\w+)\),")
CASES: Final = _CASE.findall(Path(__file__).with_name("cases.c").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    check_compiler()
    return build_target(tmp_path_factory.mktemp("fuzz"))


def run(fuzz: Path, *arguments: object) -> str:
    """Runs the driver; what it says, where nothing failed."""
    done = subprocess.run(
        [str(fuzz), *map(str, arguments)],
        env={**os.environ, **OPTIONS},
        capture_output=True,
        text=True,
        timeout=SECONDS + MARGIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def runs_of(said: str) -> int:
    return int(said.splitlines()[-1].removesuffix(" runs"))


def test_nothing_fails_where_nothing_is_damaged(fuzz: Path, fresh_seed: int) -> None:
    assert runs_of(run(fuzz, "sound", fresh_seed, 1000, SECONDS)) > 0


def test_damage_by_fixed_seeds(fuzz: Path) -> None:
    assert runs_of(run(fuzz, "seeds", 0, 1000)) == 1000


def test_damage_by_a_fresh_seed(fuzz: Path, fresh_seed: int) -> None:
    assert runs_of(run(fuzz, "seeds", fresh_seed, 1 << 40, SECONDS)) > 0


def test_damage_guided_by_coverage(fuzz: Path, fresh_seed: int) -> None:
    said = run(fuzz, "grow", fresh_seed, SECONDS)
    print(said)
    assert int(said.split()[0]) > 800, "places of the core that were reached"


def test_all_cases_are_here(fuzz: Path) -> None:
    assert run(fuzz, "cases").split()[:-2] == CASES


@pytest.mark.parametrize("case", CASES)
def test_case(fuzz: Path, case: str) -> None:
    run(fuzz, "case", case)
