"""Models for real vLLM engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes.conftest import chance

from shmcache_tools.engine.models import write_llama, write_mla

__all__ = ["chance"]

pytest.register_assert_rewrite("engine._support")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many KV heads as heads: 2 MiB a block of all layers and ranks, in float32."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, layers=4)
    return folder


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two KV heads for eight heads: 512 KiB a block."""
    folder = tmp_path_factory.mktemp("gqa")
    write_llama(folder, layers=4, kv_heads=2)
    return folder


@pytest.fixture(scope="session")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KV that is the same in all ranks."""
    folder = tmp_path_factory.mktemp("mla")
    write_mla(folder)
    return folder
