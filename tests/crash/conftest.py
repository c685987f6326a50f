"""``pytest tests/crash --full`` goes on for longer: more seeds, the neighbour at every single stop, deeper series."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from crash._runs import SUMMARY, build


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="tests/crash: more seeds, states and depth; half an hour or more"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Long runs are shared out among tests, none of which takes longer than a test may."""
    if "slice_of" in metafunc.fixturenames:
        slices = 64 if metafunc.config.getoption("--full", default=False) else 3
        metafunc.parametrize("slice_of", [(i, slices) for i in range(slices)], ids=lambda s: f"{s[0]}/{s[1]}")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full", default=False))


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="session")
def seed() -> int:
    """Of all that is drawn by lot; a run that is given the same SHMCACHE_TEST_SEED does the same."""
    drawn = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(1 << 32)))
    SUMMARY.append(f"SHMCACHE_TEST_SEED={drawn}")
    return drawn


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SUMMARY:
        terminalreporter.section("crash")
        for line in SUMMARY:
            terminalreporter.line(line)
