"""What a side of the connector counts between two looks at it. Several threads add."""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["COUNTERS", "Counters"]

#: name: what it counts, as people read it
COUNTERS: Final = {
    "asked_blocks": "Blocks of requests that were looked for",
    "hit_blocks": "Blocks that requests were loaded with",
    "l2_hit_blocks": "Of these, blocks that came from L2",
    "prefetches": "Chains of blocks that L2 was asked for",
    "prefetch_timeouts": "Prefetches that were given up",
    "loaded_bytes": "Bytes copied into blocks, of all ranks",
    "load_seconds": "Time that ranks spent with these copies",
    "load_errors": "Blocks that a rank could not load",
    "saved_blocks": "Blocks that were saved",
    "saved_bytes": "Bytes copied out of blocks, of all ranks",
    "save_seconds": "Time that ranks spent with these copies",
    "save_errors": "Blocks that a rank could not save",
    "save_waits": "Times that saves waited, as all of the arena was in use",
    "unsaved_blocks": "Blocks that were not saved, as all of the arena was in use for too long",
    "l2_dropped_blocks": "Blocks that were not stored in L2, as it did not keep up",
    "flushes": "Saves that a step had to wait for",
}


class Counters:
    """Sums by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Adds to the counters named; each is one of ``COUNTERS``."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] = self._sums.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """What was added since the last call; counters that stayed at 0 are not there."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return {name: amount for name, amount in sums.items() if amount}
