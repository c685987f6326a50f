"""The connector's counters on their way through vLLM: its log line, and its Prometheus metrics.

Each process of an engine counts (``counters``); vLLM adds up what all of them counted in a step, and hands it to
whoever logs. What the arena itself counts, of all engines, is told by ``shmcache-stat``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from shmcache.integrations.vllm.counters import COUNTERS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["PrometheusMetrics", "TransferStats"]


@dataclass
class TransferStats(KVConnectorStats):
    """Sums by the names of ``COUNTERS``."""

    def reset(self) -> None:
        """Forgets all."""
        self.data.clear()

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> TransferStats:
        """Adds what another process counted."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """What people read in the log: the sums, but bytes and seconds as GB, and GB a second of copying."""
        rest = dict(self.data)
        found: dict[str, int | float] = {}
        for what, took in (("loaded", "load_seconds"), ("saved", "save_seconds")):
            gb, seconds = rest.pop(f"{what}_bytes", 0) / 1e9, rest.pop(took, 0)
            if gb:
                found[f"{what}_gb"], found[f"{what}_gb_s"] = round(gb, 3), round(gb / seconds, 2)
        return {**rest, **found}


class PrometheusMetrics(KVConnectorPromMetrics):
    """One counter each of ``COUNTERS``, as ``vllm:shmcache_NAME``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:shmcache_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds what an engine counted."""
        for name, amount in transfer_stats_data.items():
            self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(amount)
