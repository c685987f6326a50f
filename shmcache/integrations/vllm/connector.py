"""ShmCacheConnector: vLLM's KVConnectorBase_V1 on one side, ``scheduler`` and ``worker`` on the other.

This file owns what is vLLM's: which engines are taken, what identifies a model, and which of its calls means what. vLLM
makes one connector in the scheduler's process and one in each worker's. Nothing here waits for ``shutdown``, which vLLM
often skips.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import is_full_attention_spec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import shmcache
from shmcache.arena import MAX_GROUP
from shmcache.integrations.vllm.copier import copier_of, part_bytes_of, planes_of
from shmcache.integrations.vllm.digests import digest
from shmcache.integrations.vllm.identity import Identity
from shmcache.integrations.vllm.messages import Report, Shape, Step
from shmcache.integrations.vllm.metrics import PrometheusMetrics, TransferStats
from shmcache.integrations.vllm.scheduler import Scheduler
from shmcache.integrations.vllm.settings import Settings
from shmcache.integrations.vllm.worker import Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput

__all__ = ["ShmCacheConnector"]

_log = logging.getLogger("vllm.shmcache")

_FORMAT: Final = 1  #: of what is saved under a key; another one is another identity


@dataclass
class _StepMetadata(KVConnectorMetadata):
    step: Step


@dataclass
class _WorkerMetadata(KVConnectorWorkerMetadata):
    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> _WorkerMetadata:
        assert isinstance(other, _WorkerMetadata)  # noqa: S101 # vLLM adds like to like
        self.report.add(other.report)
        return self


@dataclass
class _Handshake(KVConnectorHandshakeMetadata):
    """From a worker, once its KV cache is there: how an object is made up, and all else that its keys tell of it."""

    shape: Shape
    memory: dict[str, Any]


class ShmCacheConnector(KVConnectorBase_V1):
    """Keeps the KV cache's blocks in an arena of shared memory, for all engines of the host; see the package."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _refuse_what_is_not_served(vllm_config, kv_cache_config)
        _warn_of_random_hashes(vllm_config)
        self._ranks: Final = vllm_config.parallel_config.tensor_parallel_size
        self._settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config or {})
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._handshake: _Handshake | None = None
        # The scheduler is the group's last rank, as it takes part in the writing of every object.
        self._rank = self._ranks if role == KVConnectorRole.SCHEDULER else get_tensor_model_parallel_rank()
        self._cache = self._settings.attach(_group_of(vllm_config), self._rank, self._ranks + 1)
        _log.info("%s attached to arena %s", role.name.lower(), self._cache)

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what is not saved is computed again."""
        return False

    # In a worker, in the order of a step

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV cache is there: finds how blocks lie in it."""
        planes = planes_of(kv_caches, self._kv_cache_config.num_blocks)
        shape = Shape(self._ranks, self._kv_cache_config.kv_tp_replicas, part_bytes_of(planes))
        self._worker = Worker(self._cache, self._rank, shape, copier_of(planes))
        self._handshake = _Handshake(shape, _memory_of(kv_caches, self._kv_cache_config))
        if planes[0].is_cuda:
            self._pin()

    def get_handshake_metadata(self) -> _Handshake | None:
        """For the scheduler, before the first request."""
        return self._handshake

    def handle_preemptions(self, kv_connector_metadata: _StepMetadata) -> None:
        """Before the step: what is copied out of blocks that it writes over must be copied."""
        self._in_worker.before(kv_connector_metadata.step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002 # copies need neither
        """Loads for this step, and begins loads for later ones."""
        self._in_worker.load(self._bound_step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded, or enqueued to be, when ``start_load_kv`` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved with all layers, after the step."""

    def wait_for_save(self) -> None:
        """The step is computed: begins to save what it made full. The next step computes meanwhile."""
        self._in_worker.save(self._bound_step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:  # noqa: ARG002 # the step says it
        """Requests whose blocks are no longer needed, and requests whose loads between steps are through."""
        return set(self._bound_step.closed), self._in_worker.received()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold no KV, as their objects were lost."""
        return self._in_worker.load_errors()

    def build_connector_worker_meta(self) -> _WorkerMetadata | None:
        """What this rank is through with."""
        report = self._in_worker.report()
        return _WorkerMetadata(report) if report else None

    # In the scheduler, in the order of a request's life

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """What the workers say of their KV caches, before the first request."""
        said = [metadata[rank] for rank in sorted(metadata)]
        first = said[0]
        if len(said) != self._ranks or any(one != first for one in said):
            raise ValueError(f"ShmCacheConnector expected {self._ranks} ranks with KV caches of one kind, got {said}")
        assert isinstance(first, _Handshake)  # noqa: S101 # our workers said it
        self._scheduler = Scheduler(
            self._cache,
            self._settings,
            first.shape,
            Identity(self._vllm_config, {"shape": asdict(first.shape), **first.memory}).of,
            block_tokens=self._vllm_config.cache_config.block_size,
            lease_s=shmcache.inspect(self._settings.arena).read_lease_s,
            loads=self._kv_transfer_config.is_kv_consumer,
            saves=self._kv_transfer_config.is_kv_producer,
        )

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens more than the engine's own can be loaded, and whether between steps; None: ask again."""
        return self._in_scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self._in_scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """How many of the tokens come from the arena, and how many from L2."""
        from_l2 = min(self._in_scheduler.l2_tokens(request), num_external_tokens)
        sources = {CacheHitSource.HOST: num_external_tokens - from_l2, CacheHitSource.DISK: from_l2}
        return {source: tokens for source, tokens in sources.items() if tokens}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> _StepMetadata:
        """What the workers have to do in this step."""
        state = scheduler_output.kv_connector_block_state
        grown = scheduler_output.scheduled_cached_reqs.new_block_ids
        step = self._in_scheduler.step(
            scheduler_output.num_scheduled_tokens,
            [block for groups in grown if groups for block in groups[0]],
            lambda request_id: state.resolve_block_ids(request_id)[0],
        )
        self._forget(self._in_scheduler.doubted)
        return _StepMetadata(step)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers said after a step."""
        said = connector_output.kv_connector_worker_meta
        report = said.report if isinstance(said, _WorkerMetadata) else Report()
        self._in_scheduler.done(report)
        if connector_output.invalid_block_ids:
            # vLLM leaves some in its prefix cache, as those of requests that were aborted or preempted meanwhile, and
            # what these computed from them. Who hits that would compute from it, and what comes out would be saved.
            self._forget(range(self._kv_cache_config.num_blocks))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over, or was aborted: gives back what it did not use."""
        return self._in_scheduler.finished(request.request_id, block_ids), None

    def has_pending_push_work(self) -> bool:
        """Whether the engine must go on with its steps though it has no request."""
        return self._in_scheduler.has_work

    def reset_cache(self) -> bool:
        """What was saved before is not found any more by this engine; others keep it."""
        self._in_scheduler.reset()
        return True

    # In either

    def get_kv_connector_stats(self) -> TransferStats | None:
        """What was counted since the last call."""
        side = self._worker or self._scheduler
        counted = side.counters.take() if side is not None else {}
        return TransferStats(counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        """For what came from another process."""
        return TransferStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> PrometheusMetrics:
        """For the process that serves metrics."""
        return PrometheusMetrics(*args)

    def shutdown(self) -> None:
        """Leaves the arena in order; a death leaves it in the same order."""
        for side in (self._worker, self._scheduler):
            if side is not None:
                side.close()
        self._cache.close()

    @property
    def _in_worker(self) -> Worker:
        assert self._worker is not None  # noqa: S101 # vLLM registers the KV caches first
        return self._worker

    @property
    def _in_scheduler(self) -> Scheduler:
        assert self._scheduler is not None  # noqa: S101 # vLLM shakes hands first
        return self._scheduler

    @property
    def _bound_step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _StepMetadata)  # noqa: S101 # our scheduler's side made it
        return metadata.step

    def _forget(self, blocks: Iterable[int]) -> None:
        """No request of this engine hits what these blocks hold now."""
        if self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(set(blocks))

    def _pin(self) -> None:
        try:
            self._cache.pin()
        except shmcache.DeviceError as error:
            _log.warning("copies between the arena and the device will be slow, as it is not pinned: %s", error)


def _memory_of(kv_caches: dict[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """How the KV lies in an object, layer by layer; the number of blocks does not matter."""
    return {
        "format": _FORMAT,
        "vllm": vllm.__version__,
        "layout": str(kv_cache_config.kv_cache_layout),
        "layers": [
            [name, str(cache.dtype), list(cache.shape[1:]), list(cache.stride()[1:])]
            for name, cache in kv_caches.items()
        ],
    }


def _group_of(vllm_config: VllmConfig) -> str:
    """Every engine has an id of its own, which its scheduler and its workers know; a user may state a long one."""
    group = f"vllm-{vllm_config.kv_transfer_config.engine_id}"
    return group if len(group.encode()) <= MAX_GROUP else f"vllm-{digest({'engine_id': group}).hex()}"


def _refuse_what_is_not_served(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """ValueError says what ShmCacheConnector cannot do, and what to do instead."""
    reason = next(_not_served(vllm_config, kv_cache_config), None)
    if reason is not None:
        raise ValueError(f"ShmCacheConnector {reason}")


def _not_served(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    pipeline, context = parallel.pipeline_parallel_size, parallel.prefill_context_parallel_size
    if parallel.world_size != parallel.tensor_parallel_size:
        yield (
            f"serves tensor and data parallelism, got pipeline_parallel_size={pipeline} and "
            f"prefill_context_parallel_size={context}; set both to 1"
        )
    if (context := parallel.decode_context_parallel_size) != 1:
        yield f"needs whole blocks in every rank, got decode_context_parallel_size={context}; set it to 1"
    if (hosts := parallel.nnodes_within_dp) != 1:
        yield f"shares memory of one host, got the ranks of an engine on {hosts}; run an engine a host"
    if not vllm_config.model_config.is_prefix_caching_supported:
        yield "needs a model that can go on from a prefix, and vLLM says that this cannot; run it without the connector"
    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if len(kinds) != 1 or not is_full_attention_spec(kv_cache_config.kv_cache_groups[0].kv_cache_spec):
        yield (
            f"serves models with one KV cache group, of full attention or MLA, got {len(kinds)}: "
            f"{', '.join(kinds) or 'none'}; run this model without the connector"
            + (", or try --disable-hybrid-kv-cache-manager" if len(kinds) > 1 else "")
        )


def _warn_of_random_hashes(vllm_config: VllmConfig) -> None:
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256") and "PYTHONHASHSEED" not in os.environ:
        _log.warning(
            "prefix_caching_hash_algo=%s begins with a random number in every engine, so that none finds what another "
            "has saved; use sha256, or set PYTHONHASHSEED to the same for all",
            algorithm,
        )
