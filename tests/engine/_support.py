"""What tests of real engines share: engines with small KV caches, prompts, and a look at arenas from outside."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

import shmcache
from shmcache_tools.engine.client import VARIABLE, Engine, EngineError, Request, find_vllm
from shmcache_tools.engine.models import VOCABULARY

BLOCK = 128  #: tokens in a block of vLLM's KV cache on a CPU
KV_BLOCKS = 40  #: in an engine's own KV cache: little, so that it is soon written over

TIMEOUT_S = 60.0
NAP_S = 0.01

#: float32: in bfloat16 a token may depend on what else is in the batch, without any connector. A prompt of some length
#: is computed in chunks. Peek is vLLM's own way to run something in its workers.
ARGUMENTS = {
    "dtype": "float32",
    "num_gpu_blocks_override": KV_BLOCKS,
    "max_num_batched_tokens": 512,
    "worker_extension_cls": "engine._inside.Peek",
}
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1])}

_seeds = itertools.count()


def need_vllm() -> None:
    """Skips the module where there is no vLLM; but where the variable names one, as in CI, it must be there."""
    named = os.environ.get(VARIABLE)
    if named == "":
        pytest.skip("tools/test --vllm runs these", allow_module_level=True)
    try:
        find_vllm()
    except EngineError as error:
        if named:
            raise
        pytest.skip(f"{error}; tools/test --vllm makes one, and runs these", allow_module_level=True)


def engine(
    model: Path,
    connector: Mapping[str, object],
    arguments: Mapping[str, object] = {},
    environment: Mapping[str, str] = {},
    tp: int = 2,
) -> Engine:
    """An engine, not started yet."""
    return Engine(
        model,
        tp=tp,
        connector=connector,
        arguments={**ARGUMENTS, **arguments},
        environment={**ENVIRONMENT, **environment},
    )


@contextlib.contextmanager
def new_arena() -> Iterator[str]:
    """A name that no arena has; what gets it is destroyed at the end."""
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    with contextlib.suppress(shmcache.ArenaNotFoundError):
        shmcache.destroy(name, force=True)


def prompt(length: int = 14 * BLOCK + 8, shared: list[int] | None = None) -> list[int]:
    """Tokens that nobody has asked for before, but for the ``shared`` ones at the beginning."""
    chance = random.Random(next(_seeds))
    begin = shared or []
    return begin + [chance.randrange(3, VOCABULARY) for _ in range(length - len(begin))]


def wait_until(condition: Callable[[], bool], what: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Until it is true; ``what`` is told where it does not come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(NAP_S)


# vLLM


def reset(engine: Engine) -> None:
    """Empties vLLM's own prefix cache; it refuses while blocks are in use, as those of a store are for a moment."""
    wait_until(engine.reset_prefix_cache, lambda: "vLLM's prefix cache cannot be reset")


def forget(engine: Engine) -> None:
    """Empties vLLM's own prefix cache, and has each of its blocks written over."""
    reset(engine)
    for _ in range(KV_BLOCKS // 15 + 1):
        engine.generate(prompt(15 * BLOCK), 1)
    reset(engine)


def metric(engine: Engine, name: str) -> float:
    """One of vLLM's counters."""
    return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (.+)$", engine.metrics(), re.MULTILINE))


def attached(engine: Engine) -> list[int]:
    """Those of its processes that are in the arena."""
    return [engine.pids.core, *engine.pids.workers]


def wait_dead(engine: Engine) -> None:
    """Until those of its processes are gone that are in the arena."""
    pids = attached(engine)
    wait_until(lambda: not any(map(_runs, pids)), lambda: f"of {engine.pids} still run: {list(filter(_runs, pids))}")


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# The arena


def stats(arena: str) -> shmcache.Stats:
    found = shmcache.inspect(arena).stats
    assert found is not None
    return found


def shares(arena: str) -> tuple[shmcache.ShareInfo, ...]:
    """Who holds, was granted, or writes what."""
    found = shmcache.inspect(arena, shares=True)
    assert found.problem is None
    return found.shares or ()


def keys(arena: str) -> list[bytes]:
    """Of all objects that are readable."""
    found = shmcache.inspect(arena, objects=True).objects or ()
    return [one.key for one in found if one.standing != "writing"]


def wait_idle(arena: str) -> None:
    """Until nobody holds, was granted, or writes anything."""
    wait_until(lambda: not shares(arena), lambda: f"in use: {shares(arena)}")


def wait_stored(arena: str, objects: int) -> None:
    """Until so many objects are there, and nobody has anything to do with them."""
    wait_until(lambda: stats(arena).objects >= objects, lambda: f"wanted {objects} objects: {stats(arena)}")
    wait_idle(arena)


def check_sound(arena: str) -> None:
    """Once what the dead left is taken back, nobody has anything, and no invariant is broken."""
    with shmcache.attach(arena) as cache:
        cache.reap()
        wait_idle(arena)
        assert cache.verify() == []
    assert stats(arena).lanes_dead == 0


def clear(arena: str) -> None:
    """As somebody outside the engine may."""
    wait_idle(arena)
    with shmcache.attach(arena) as cache:
        cache.clear()
    assert stats(arena).objects == 0


def contents(arena: str) -> dict[bytes, bytes]:
    """All objects, by key."""
    with shmcache.attach(arena) as cache, cache.read(keys(arena)) as batch:
        return {key: bytes(view) for key, view in zip(batch.keys, batch.views, strict=True) if view is not None}


def check_same_kv(known: Mapping[bytes, bytes], arena: str) -> None:
    """What the arena has of ``known`` objects, in float32, was computed from the same tokens, if in other batches."""
    found = contents(arena)
    common = known.keys() & found.keys()
    assert common
    for key in common:
        one, other = (np.frombuffer(objects[key], np.float32) for objects in (known, found))
        assert np.allclose(one, other, rtol=0, atol=1e-3), key.hex()


# What is asked of every kind of engine


def check_same_bytes(engine: Engine, arena: str, asked: list[int], full: int) -> None:
    """What is loaded into each rank's ``full`` blocks is what that rank had computed."""
    before = _blocks(engine)
    engine.generate(asked, 1)
    computed = [now - then for now, then in zip(_blocks(engine), before, strict=True)]
    wait_stored(arena, full)
    forget(engine)
    assert not any(now & mine for now, mine in zip(_blocks(engine), computed, strict=True))
    assert engine.generate(asked, 1).cached_tokens > 0
    assert [len(now & mine) for now, mine in zip(_blocks(engine), computed, strict=True)] == [full] * len(computed)


def _blocks(engine: Engine) -> list[set[str]]:
    """What is in the blocks of each rank."""
    return [set(digests) for digests in engine.rpc("block_digests", KV_BLOCKS)]


def check_stored_again(engine: Engine, arena: str, asked: list[int], full: int) -> None:
    """What is stored from blocks that were loaded is what had been stored from the blocks computed."""
    engine.generate(asked, 1)
    wait_stored(arena, full)
    first = contents(arena)
    forget(engine)
    assert engine.generate(asked, 1).cached_tokens > 0
    clear(arena)
    assert engine.generate(asked, 1).cached_tokens > 0  # vLLM's own
    wait_stored(arena, full)
    assert contents(arena) == first


@contextlib.contextmanager
def rank_that_loads_late(engine: Engine, arena: str, asked: list[int]) -> Iterator[Request]:
    """A request whose loads are done in rank 0, and not begun in rank 1, which is stopped meanwhile."""
    engine.kill("worker", 1, signal.SIGSTOP)
    try:
        request = engine.submit(asked)
        wait_until(lambda: _lanes_reserved(arena) == 1, lambda: f"shares: {shares(arena)}")
        yield request
    finally:
        engine.kill("worker", 1, signal.SIGCONT)


def _lanes_reserved(arena: str) -> int:
    """How many lanes have reserved shares; 0 while any has others."""
    found = shares(arena)
    return 0 if any(share.kind != "reserved" for share in found) else len({share.lane for share in found})


def force_out(arena: str) -> None:
    """Deletes every object, whoever was granted a share of it."""
    with shmcache.attach(arena) as cache:
        assert set(cache.delete(keys(arena), force=True)) == {shmcache.Status.OK}
