"""The configuration of a model as keys of a GGUF file.

Keys are named after the methods of ``gguf.GGUFWriter`` that write them, without their ``add_``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pantheraml.errors import NotYetError
from pantheraml.export.gguf.families import GgufFamily
from pantheraml.export.gguf.formats import load_gguf

Keys = dict[str, Any]


def read_config(config: Any, family: GgufFamily, rows: int) -> Keys:
    """The keys of all but RoPE, the vocabulary and the format.

    Args:
        config: transformers' configuration.
        family: of it.
        rows: of the embedding.
    """
    head_dim = _head_dim(config)
    keys = {
        "type": "model",
        "vocab_size": rows,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_dim,
        "value_length": head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "quantization_version": load_gguf().GGML_QUANT_VERSION,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "expert_count": getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    if family.full_every:
        keys["sliding_window"] = config.sliding_window
    if keys["expert_count"] and family.architecture != "llama":
        keys["expert_feed_forward_length"] = getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )
    return {key: value for key, value in keys.items() if value is not None}


def read_rope(config: Any) -> tuple[Keys, dict[str, torch.Tensor]]:
    """The keys of RoPE, and tensors of factors that frequencies are divided by.

    transformers computes the frequencies and the factor of attention; what llama.cpp has to know follows from them.

    Args:
        config: transformers' configuration.

    Raises:
        NotYetError: a scaling that llama.cpp does not have.
    """
    per_layer_type = config.rope_parameters.get("full_attention")
    rope = per_layer_type or config.rope_parameters
    windowed = config.rope_parameters.get("sliding_attention", {})
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    dims = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    keys: Keys = {"rope_dimension_count": dims, "rope_freq_base": theta}
    if windowed:
        keys["rope_freq_base_swa"] = windowed["rope_theta"]
    known = ("default", "linear", "llama3", "yarn", "longrope")
    if kind not in known or windowed.get("rope_type", "default") != "default":
        raise NotYetError(
            got=f"RoPE is scaled by {kind if kind not in known else windowed['rope_type']!r}.",
            need=f"llama.cpp has {', '.join(known[1:])}, and no scaling of layers with a window.",
            fix="Use save_pretrained_merged, which transformers and vLLM load.",
        )
    if kind == "default":
        return keys, {}
    layer_type = "full_attention" if per_layer_type else None
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=layer_type)
    if kind == "llama3":
        plain = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        return keys, {"rope_freqs.weight": plain / frequencies}
    return _scaled(keys, kind, rope, config, attention_factor)


def _scaled(
    keys: Keys, kind: str, rope: dict[str, Any], config: Any, attention_factor: float
) -> tuple[Keys, dict[str, torch.Tensor]]:
    """The keys of a linear, YaRN or LongRoPE scaling."""
    keys["rope_scaling_type"] = load_gguf().RopeScalingType(kind)
    if kind == "linear":
        keys["rope_scaling_factor"] = rope["factor"]
        return keys, {}
    # Phi-3 keeps it beside the parameters of RoPE.
    before = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    keys["rope_scaling_orig_ctx_len"] = before
    if kind == "longrope":
        keys["rope_scaling_attn_factors"] = attention_factor
        factors = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return keys, {f"rope_factors_{name}.weight": torch.tensor(value) for name, value in factors.items()}
    factor = rope.get("factor") or config.max_position_embeddings / before
    keys["rope_scaling_factor"] = factor
    keys["rope_scaling_yarn_beta_fast"] = rope.get("beta_fast") or 32.0
    keys["rope_scaling_yarn_beta_slow"] = rope.get("beta_slow") or 1.0
    # llama.cpp multiplies this by its own factor of attention, which is the usual one.
    usual = float(1.0 + 0.1 * torch.tensor(max(factor, 1.0)).log())
    if abs(attention_factor / usual - 1.0) > 1e-6:
        keys["rope_scaling_attn_factors"] = attention_factor / usual
    return keys, {}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
