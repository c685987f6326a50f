"""What a key says beside the tokens: which model computed the KV, and how it lies in memory.

A key is vLLM's hash of a block (its tokens and all before them) and 16 bytes of identity. Keys outlive engines, in the
arena and in L2; so whatever makes KV of one engine useless to another must be told by the identity.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from shmcache.integrations.vllm.digests import digest, fresh_identity, weights_digest

__all__ = ["Identity"]

_log = logging.getLogger("vllm.shmcache")


class Identity:
    """What the keys of a request say beside its tokens: the model with its adapter, and the memory of the KV cache.

    ``vllm_config`` is vLLM's; ``memory`` says, as JSON, how KV lies in an object.
    """

    def __init__(self, vllm_config: Any, memory: dict[str, object]) -> None:
        self._base = digest({**_facts_of(vllm_config), "memory": memory})
        self._adapters: dict[tuple[object, ...], bytes] = {}
        self._unreadable: dict[Path, bytes] = {}

    def of(self, request: Any) -> bytes:
        """The end of its keys."""
        adapter = getattr(request, "lora_request", None)
        return self._base if adapter is None else self._with_adapter(Path(adapter.lora_path))

    def _with_adapter(self, where: Path) -> bytes:
        """Looks whether it has changed, as adapters are loaded anew in their place."""
        try:
            stats = [path.stat() for path in sorted(where.iterdir())] if where.is_dir() else []
            version = (where, *((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats))
            if version not in self._adapters:
                self._adapters[version] = digest({"model": self._base.hex(), "adapter": _weights_of(str(where), None)})
            return self._adapters[version]
        except OSError as error:
            if where not in self._unreadable:
                _log.warning("adapter %s: its KV is not shared, as it cannot be read: %s", where, error)
                self._unreadable[where] = fresh_identity()
            return self._unreadable[where]


def _facts_of(vllm_config: Any) -> dict[str, object]:
    """Whatever makes KV of one engine useless to another."""
    model = vllm_config.model_config
    config = {name: value for name, value in model.hf_config.to_dict().items() if not name.startswith("_")}
    return {
        "weights": _model_weights(vllm_config),
        "drafts": _draft_weights(vllm_config),
        "config": config,
        "max_model_len": model.max_model_len if _depends_on_length(config) else None,
        "generation_config": str(model.override_generation_config),  # Llama 4 scales its attention by it
        "media": str(model.multimodal_config and model.multimodal_config.mm_processor_kwargs),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "block_tokens": vllm_config.cache_config.block_size,
    }


def _depends_on_length(config: dict[str, object]) -> bool:
    """Whether vLLM computes the same tokens in another way where max_model_len is larger: LongRoPE, Llama 4."""
    text = json.dumps(config, default=str)
    return "longrope" in text or "llama4" in text


def _model_weights(vllm_config: Any) -> str:
    model = vllm_config.model_config
    if str(vllm_config.load_config.load_format) == "dummy":  # made up from the seed
        return f"dummy:{model.seed}"
    commit = getattr(model.hf_config, "_commit_hash", None)
    return _weights_of(model.model_weights or model.model, commit or model.revision)


def _draft_weights(vllm_config: Any) -> str | None:
    """Of a draft model, whose KV lies in the same blocks; drafts without a model of their own name the target's."""
    speculative = vllm_config.speculative_config
    draft = speculative and speculative.draft_model_config
    if not draft or draft.model == vllm_config.model_config.model:
        return None
    return _weights_of(draft.model, draft.revision)


def _weights_of(model: str, revision: str | None) -> str:
    """Of a folder or a file its weights, wherever it lies; of a model of the hub its name and commit."""
    if Path(model).exists():
        return weights_digest(Path(model))
    if revision is None:
        _log.warning("model %s: no revision is known, so keys tell its name only: never change it under that", model)
    return f"{model}@{revision}"
