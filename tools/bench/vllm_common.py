"""What the vLLM programs share: what was found of one way to answer a request, and of the memory that two engines use.

Times are seconds to the first token (TTFT). A ratio is how many times as fast as computing the same prompt again, by an
engine without a connector, just before; its median over the prompts. Likewise beside the bound: the same prompt once
more in that engine, out of vLLM's own prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

RECOMPUTED = "no connector: computed again"
KEPT = "no connector: vLLM's own prefix cache"
FIRST = "shmcache: a first request, which saves"
RESET = "shmcache: vLLM's cache emptied"
RESTARTED = "shmcache: engine killed and restarted"
SECOND = "shmcache: a second engine"
L2 = "shmcache: arena gone, from L2 (files)"


@dataclass
class Finding:
    """How the requests of one way were answered, a number a prompt."""

    what: str
    ttft: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)  # the same prompts, by the baseline
    kept: list[float] = field(default_factory=list)  # likewise, by vLLM's own prefix cache
    cached: list[int] = field(default_factory=list)  # tokens that were not computed
    same: list[bool] = field(default_factory=list)  # whether the tokens are those of the very first answer
    least_ratio: float | None = None  # the goal
    problem: str = ""  # why nothing was measured

    @property
    def ratios(self) -> list[float]:
        return [slow / fast for slow, fast in zip(self.recomputed, self.ttft, strict=True)]

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ttft else None

    @property
    def of_bound(self) -> float | None:
        """How fast beside vLLM's own prefix cache, which copies nothing."""
        return median(kept / ttft for kept, ttft in zip(self.kept, self.ttft, strict=True)) if self.ttft else None

    @property
    def met(self) -> bool | None:
        """None where there is no goal; wrong tokens miss any."""
        if self.least_ratio is None or self.ratio is None:
            return None
        return self.ratio >= self.least_ratio and all(self.same)


@dataclass
class Memory:
    """Bytes of KV that a host keeps for the same prompts, after two engines have answered all of them.

    Objects in arenas: what comes in addition to the engines' own block pools (on a GPU: its memory), which stay as
    they are. An arena each is what any offloading into an engine's own memory keeps.
    """

    one_engine: int  # in the arena, before the second came
    shared: int  # in the arena of both
    apart: int  # in two arenas, one an engine

    least_saving = 0.45  # the goal: of what is kept apart

    @property
    def saving(self) -> float:
        return 1 - self.shared / self.apart

    @property
    def met(self) -> bool:
        return self.saving >= self.least_saving
