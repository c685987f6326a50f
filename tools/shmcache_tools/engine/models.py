"""Small models with random weights, in folders that vLLM loads: the same seed, the same model.

The weights are large enough that greedy tokens depend on the whole prompt and vary from token to token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VOCABULARY = 2048
POSITIONS = 8192
DTYPE = "bfloat16"
_CONFIG = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": DTYPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_llama(
    folder: Path, *, layers: int = 8, hidden: int = 512, heads: int = 8, kv_heads: int = 8, seed: int = 0
) -> None:
    """A Llama; with fewer ``kv_heads`` than ``heads`` it has grouped queries (GQA)."""
    weights = _Weights(seed, hidden)
    head = hidden // heads
    for layer in range(layers):
        attention = weights.layer(layer, inner=2 * hidden)
        weights.add(attention + "q_proj", heads * head, hidden)
        weights.add(attention + "k_proj", kv_heads * head, hidden)
        weights.add(attention + "v_proj", kv_heads * head, hidden)
        weights.add(attention + "o_proj", hidden, heads * head)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    weights.save(folder, config)


def write_mla(folder: Path, *, layers: int = 2, seed: int = 0) -> None:
    """A DeepSeek-V2 without experts: latent attention (MLA), whose KV is 576 wide and the same on all ranks."""
    hidden, heads, latent, nope, rope, value = 256, 4, 512, 128, 64, 128
    weights = _Weights(seed, hidden)
    for layer in range(layers):
        attention = weights.layer(layer, inner=2 * hidden)
        weights.add(attention + "q_proj", heads * (nope + rope), hidden)
        weights.add(attention + "kv_a_proj_with_mqa", latent + rope, hidden)
        weights.add_ones(attention + "kv_a_layernorm", latent)
        weights.add(attention + "kv_b_proj", heads * (nope + value), latent)
        weights.add(attention + "o_proj", hidden, heads * value)
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        # No layer is one of experts, but vLLM reads their numbers.
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": hidden,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
    }
    weights.save(folder, config)


class _Weights:
    """Tensors by name, drawn one after the other from one seed."""

    def __init__(self, seed: int, hidden: int) -> None:
        import torch  # noqa: PLC0415 # takes a second, and is optional

        self._torch = torch
        self._chance = torch.Generator().manual_seed(seed)
        self._hidden = hidden
        self._tensors: dict[str, torch.Tensor] = {}
        self.add("model.embed_tokens", VOCABULARY, hidden, scale=1.0)
        self.add_ones("model.norm", hidden)
        self.add("lm_head", VOCABULARY, hidden, scale=0.3)

    def add(self, name: str, rows: int, columns: int, scale: float = 0.05) -> None:
        drawn = self._torch.randn(rows, columns, generator=self._chance) * scale
        self._tensors[name + ".weight"] = drawn.to(self._torch.bfloat16)

    def add_ones(self, name: str, size: int) -> None:
        self._tensors[name + ".weight"] = self._torch.ones(size, dtype=self._torch.bfloat16)

    def layer(self, number: int, inner: int) -> str:
        """What every decoder layer has; returns the prefix of its attention."""
        prefix = f"model.layers.{number}."
        self.add(prefix + "mlp.gate_proj", inner, self._hidden)
        self.add(prefix + "mlp.up_proj", inner, self._hidden)
        self.add(prefix + "mlp.down_proj", self._hidden, inner)
        self.add_ones(prefix + "input_layernorm", self._hidden)
        self.add_ones(prefix + "post_attention_layernorm", self._hidden)
        return prefix + "self_attn."

    def save(self, folder: Path, config: dict[str, object]) -> None:
        from safetensors.torch import save_file  # noqa: PLC0415

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**config, **_CONFIG}, indent=1), encoding="utf-8")
