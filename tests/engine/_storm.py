"""Requests that nobody waits for: aborted before, during and after their prefill, and while they are loaded."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from engine._support import TIMEOUT_S, prompt, reset

from shmcache_tools.engine.client import Engine, Request

ROUNDS = 12
DELAYS_S = (0.0, 0.002, 0.02, 0.1, 0.3)


def storm(
    engine: Engine, chance: random.Random, stored: list[list[int]], clear: Callable[[], object] = lambda: None
) -> int:
    """Some rounds of requests, for prompts that are ``stored``, new, or both; how many were aborted in time.

    ``clear``: empties the arena, as far as it is not in use.
    """
    asked: list[Request] = []
    for _ in range(ROUNDS):
        asked += [engine.submit(_any(chance, stored), chance.randrange(1, 40)) for _ in range(chance.randrange(1, 6))]
        for request in chance.sample(asked, k=chance.randrange(len(asked) + 1)):
            time.sleep(chance.choice(DELAYS_S))
            request.abort()
        if chance.random() < 0.5:
            engine.reset_prefix_cache()  # which it refuses while requests run
            clear()
    reasons = [request.result(TIMEOUT_S).finish_reason for request in asked]
    reset(engine)
    return reasons.count("abort")


def _any(chance: random.Random, stored: list[list[int]]) -> list[int]:
    known = chance.choice(stored)
    return chance.choice([known, prompt(), prompt(shared=known[: chance.randrange(len(known))])])
