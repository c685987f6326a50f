"""A damaged segment under everything that the package has, and under both programs, with sanitizers.

``SHMCACHE_FUZZ_S``: seconds for each search, where those of every day are not enough (an hour: 3600).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from fuzz._sanitized import Package, build_package, check_compiler

SECONDS: Final = float(os.environ.get("SHMCACHE_FUZZ_S", "10"))
MARGIN_S: Final = 240  #: the driver ends a seed that hangs by itself, long before


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    check_compiler()
    yield build_package(tmp_path_factory.mktemp("package"))
    for left in Path("/dev/shm").glob(f"shmcache.{os.geteuid()}.fuzz-*"):  # noqa: S108 # of a driver that was killed
        left.unlink()


def drive(package: Package, *arguments: object) -> int:
    """How many seeds the driver ran, none of which failed."""
    done = package.run("-m", "fuzz._drive", *arguments, timeout_s=SECONDS + MARGIN_S)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-20000:]}"
    return int(done.stdout.split()[0])


def test_the_package_is_the_sanitized_one(package: Package) -> None:
    program = "import shmcache._native as n; print(n.__file__, 'libasan' in open('/proc/self/maps').read())"
    done = package.run("-c", program, timeout_s=MARGIN_S)
    path, sanitized = done.stdout.split()
    assert path.startswith(str(package.folder))
    assert sanitized == "True"


def test_damage_by_fixed_seeds(package: Package) -> None:
    assert drive(package, 0, 100) == 100


def test_damage_by_a_fresh_seed(package: Package, fresh_seed: int) -> None:
    assert drive(package, fresh_seed, 1 << 40, SECONDS) > 0
