"""Kinds of engines: KV that is the same in all ranks (MLA), one rank, and those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import _support as support
from engine._support import BLOCK, check_sound, prompt, reset, wait_stored

import shmcache
from shmcache_tools.engine.client import EngineError, shmcache_connector

support.need_vllm()


def test_mla(mla: Path, arena_name: str) -> None:
    """In bfloat16, as vLLM has it. Its tokens vary from run to run without any connector, so bytes tell."""
    connector = shmcache_connector(arena_name, capacity="256MiB", sync_load_bytes=1)
    with support.engine(mla, connector, {"dtype": "bfloat16"}) as engine:
        support.check_same_bytes(engine, arena_name, prompt(), 14)
        reset(engine)
        support.clear(arena_name)
        support.check_stored_again(engine, arena_name, prompt(), 14)
        found = shmcache.inspect(arena_name, objects=True).objects
        assert found is not None
        assert {one.nbytes for one in found} == {2 * BLOCK * 576 * 2}  # layers, tokens, width, bfloat16: one part
        engine.kill("all")
    check_sound(arena_name)


def test_one_rank(llama: Path, arena_name: str) -> None:
    """In bfloat16, whose tokens are the same from run to run where there is one request at a time."""
    asked = prompt()
    connector = shmcache_connector(arena_name, capacity="256MiB")
    with support.engine(llama, connector, {"dtype": "bfloat16"}, tp=1) as engine:
        cold = engine.generate(asked)
        wait_stored(arena_name, 14)
        reset(engine)
        loaded = engine.generate(asked)
        assert [cold.cached_tokens, loaded.cached_tokens] == [0, 14 * BLOCK]
        assert loaded.tokens == cold.tokens
        support.check_same_bytes(engine, arena_name, prompt(), 14)
        engine.kill("all")
    check_sound(arena_name)


def test_pipeline_parallelism_is_refused(llama: Path, arena_name: str) -> None:
    connector = shmcache_connector(arena_name, capacity="256MiB")
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # the harness has bound one
    engine = support.engine(llama, connector, {"pipeline_parallel_size": 2}, ranks, tp=1)
    with pytest.raises(EngineError), engine:
        pass
    assert "ShmCacheConnector serves tensor and data parallelism, got pipeline_parallel_size=2" in engine.log()
