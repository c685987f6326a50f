"""A ShmCacheConnector that writes down what vLLM asks of it, for ``vllm_record``; vLLM loads it by this module's name.

Every process writes a file of its own into the folder that ``RECORD_VARIABLE`` names: a line a call, as JSON, the time
first.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm_support import RECORD_VARIABLE, SLOW, SLOW_S

from shmcache.integrations.vllm import connector
from shmcache.integrations.vllm.messages import Report

__all__ = ["Recorder"]


class _Numbered(connector._WorkerMetadata):
    """With the step that it was said after."""

    number = -1


class Recorder(connector.ShmCacheConnector):
    """Writes down, and does what it is asked."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        who = "scheduler" if role == KVConnectorRole.SCHEDULER else f"rank-{self._rank}"
        self._file = (Path(os.environ[RECORD_VARIABLE]) / f"{who}.jsonl").open("a", encoding="utf-8", buffering=1)
        self._steps = 0
        self._requests: dict[str, Any] = {}

    def _write(self, what: str, *said: Any) -> None:
        self._file.write(json.dumps([time.monotonic_ns(), what, *said]) + "\n")

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        began = time.monotonic_ns()
        found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self._requests[request.request_id] = request
        line = [began, "match", request.request_id, num_computed_tokens, request.num_tokens, _hashes(request), *found]
        self._file.write(json.dumps(line) + "\n")
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._write("alloc", request.request_id, blocks.get_block_ids()[0], num_external_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        resolve = scheduler_output.kv_connector_block_state.resolve_block_ids
        scheduled = {}
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            known = [request.num_computed_tokens, request.num_tokens, _hashes(request)]
            scheduled[request_id] = [tokens, *known, list(resolve(request_id)[0])]
        grown = scheduler_output.scheduled_cached_reqs.new_block_ids
        new = [block for groups in grown if groups for block in groups[0]]
        self._write("step", self._steps, scheduled, new, scheduler_output.has_sync_kv_loads)
        metadata = super().build_connector_meta(scheduler_output)
        metadata.number = self._steps  # type: ignore[attr-defined]
        self._steps += 1
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        said = connector_output.kv_connector_worker_meta
        self._write(
            "done",
            said.number,
            sorted(connector_output.finished_recving or ()),
            sorted(connector_output.finished_sending or ()),
        )
        super().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        began = time.monotonic_ns()
        keeps = super().request_finished(request, block_ids)
        self._file.write(json.dumps([began, "finish", request.request_id, block_ids, keeps[0]]) + "\n")
        return keeps

    def reset_cache(self) -> bool:
        self._write("reset")
        return super().reset_cache()

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        copier: Any = self._in_worker._copier
        load, slow = copier.load, Path(os.environ[RECORD_VARIABLE]) / SLOW

        def slow_load(*args: Any) -> Any:
            if slow.exists():
                time.sleep(SLOW_S)
            return load(*args)

        copier.load = slow_load

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._write("before", kv_connector_metadata.number)
        super().handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._write("load", self._number)
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        self._write("save", self._number)
        super().wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        sending, receiving = super().get_finished(finished_req_ids)
        self._write("finished", self._number, sorted(sending), sorted(receiving))
        return sending, receiving

    def get_block_ids_with_load_errors(self) -> set[int]:
        found = super().get_block_ids_with_load_errors()
        assert not found, "no recording is made of loads that fail"
        return found

    def build_connector_worker_meta(self) -> Any:
        self._write("report", self._number)
        said = super().build_connector_worker_meta()
        numbered = _Numbered(said.report if said is not None else Report())
        numbered.number = self._number
        return numbered

    @property
    def _number(self) -> int:
        return self._get_connector_metadata().number  # type: ignore[attr-defined, no-any-return]


def _hashes(request: Any) -> list[str]:
    return [bytes(one).hex() for one in request.block_hashes]
