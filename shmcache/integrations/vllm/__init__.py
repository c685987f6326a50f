"""The KV connector for vLLM: blocks of its KV cache kept in an arena, for all engines of the host.

One line of configuration gives it to an engine::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "ShmCacheConnector",
        "kv_connector_module_path": "shmcache.integrations.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"arena": "kv", "capacity": "8GiB", "l2": "/var/cache/kv"}}'

What is where: ``connector`` speaks vLLM's interface; it and ``metrics`` are the only modules that import vLLM.
``scheduler`` decides in the scheduler's process: ``hits`` finds what can be loaded and grants it to the ranks, by
``tier`` also from L2; ``saves`` reserves and publishes what is saved. ``worker`` loads and saves in each rank's
process, by a ``copier``. ``messages`` is what goes between the two, ``counters`` what both count, ``settings`` what a
user states, ``identity`` what a key says beside the tokens, by ``digests``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcache.integrations.vllm.connector import ShmCacheConnector

__all__ = ["ShmCacheConnector"]


def __getattr__(name: str) -> object:
    # vLLM asks for the class by name; all else here works, and is tested, without vLLM.
    if name == "ShmCacheConnector":
        from shmcache.integrations.vllm.connector import ShmCacheConnector  # noqa: PLC0415

        return ShmCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
