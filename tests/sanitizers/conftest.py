"""Seeds of random runs."""

from __future__ import annotations

import os
import random

import pytest


@pytest.fixture
def chance() -> random.Random:
    """Random choices, from a seed that a test that fails shows, and that may be given as SHMCACHE_TEST_SEED."""
    seed = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"SHMCACHE_TEST_SEED={seed}")
    return random.Random(seed)
