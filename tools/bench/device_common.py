"""What the device programs share: a finding, sides of an arena, and objects whose contents both sides know.

Times are seconds, rates bytes a second. Ours and the peer's are taken in turn, and the ratio is the median over pairs
of them: how many times as fast as the peer, so that 1 is as fast, and less is slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

import shmcache
from shmcache_tools.text import time_text

if TYPE_CHECKING:
    from device_gpu import Gpu

T = TypeVar("T")

BLOCK = 65536  # bytes of the smallest objects


@dataclass
class Finding:
    """One line of the report."""

    what: str
    kind: Literal["time", "rate", "share"]
    ours: list[float]
    peer: str = ""
    theirs: list[float] = field(default_factory=list)  # in turn with ours, where there are as many
    least_ratio: float | None = None  # the goals
    least: float | None = None  # of ours

    @property
    def ratio(self) -> float | None:
        if not self.theirs or self.kind == "share":
            return None
        ours, theirs = self.ours, self.theirs
        if len(ours) != len(theirs):
            ours, theirs = [median(ours)], [median(theirs)]
        if self.kind == "time":
            ours, theirs = theirs, ours
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
        return median(ratios) if ratios else None

    @property
    def met(self) -> bool | None:
        if self.least is not None:
            return median(self.ours) >= self.least
        if self.least_ratio is not None and self.ratio is not None:
            return self.ratio >= self.least_ratio
        return None

    def spread(self) -> tuple[float, float]:
        """What a tenth of ours is below, and what a tenth is above."""
        low, high = np.percentile(self.ours, (10, 90))
        return float(low), float(high)


SHOW: dict[str, Callable[[float], str]] = {
    "time": time_text,
    "rate": lambda rate: f"{rate / 1e9:,.1f} GB/s",
    "share": lambda share: f"{100 * share:.0f} %",
}


def ratio_text(one: Finding) -> str:
    if one.ratio is None:
        return ""
    return f"{one.ratio:.3f} x" if one.ratio < 10 else f"{one.ratio:,.0f} x"


def goal_text(one: Finding) -> str:
    if one.least is not None:
        return f"at least {SHOW[one.kind](one.least)}"
    return "" if one.least_ratio is None else f"at least {one.least_ratio:g} x"


@dataclass
class Side:
    """One process's device, and its cache."""

    gpu: Gpu
    cache: shmcache.Cache


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def in_turn(rounds: int, *works: Callable[[], float]) -> list[list[float]]:
    """What each gives, in so many rounds after one that warms up."""
    for work in works:
        work()
    taken = [[work() for work in works] for _ in range(rounds)]
    return [list(column) for column in zip(*taken, strict=True)]


def keys_of(what: str, count: int) -> list[bytes]:
    """The keys that both sides agree on."""
    return [f"{what}-{i}".encode() for i in range(count)]


def value_of(number: int) -> float:
    """What all elements of an object are, by its place among its keys."""
    return float(number % 7 + 1)


def check_norm(found: float, count: int, nbytes: int) -> None:
    """RuntimeError unless it is the norm of so many objects of float32."""
    expected = math.sqrt(nbytes // 4 * sum(value_of(i) ** 2 for i in range(count)))
    if not math.isclose(found, expected, rel_tol=1e-3):
        raise RuntimeError(
            f"a kernel over {count} objects read wrong bytes: expected a norm of {expected}, got {found}"
        )


def write_objects(side: Side, keys: Sequence[bytes], nbytes: int, region: int) -> None:
    """Publishes float32 objects of ``value_of``. RuntimeError where one has no room."""
    layout = shmcache.Layout((nbytes // 4,), "float32")
    for start in range(0, len(keys), 1024):
        with side.cache.reserve_write(keys[start : start + 1024], layout, region=region) as batch:
            if any(batch.status):
                raise RuntimeError(f"no room for the objects to be read: {max(batch.status).name}")
            for i, tensor in enumerate(batch.tensors(), start):
                tensor.fill_(value_of(i))
            del tensor


def check_all(batch: shmcache.ReadBatch) -> None:
    if batch.hits != len(batch):
        raise RuntimeError(f"expected {len(batch)} objects to read, got {batch.hits}: {max(batch.status).name}")
