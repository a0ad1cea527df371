"""Activation recompute: who decides, and switching it on one model.

The policy written at ``from_pretrained`` or ``get_peft_model`` rules. Under ``"auto"`` the trainer recomputes only when
the activations of its longest batch may not fit into the GPU's free memory; where no batch is known (``for_training``)
it means yes on a GPU and no on a CPU. ``"unsloth"`` is accepted as a synonym of ``True``.
"""

from __future__ import annotations

from typing import Any

from pantheraml.errors import ConfigError, NotYetError

# Of the free memory, what activations may take: the rest is for gradients, the optimizer, the head and gaps.
FREE_SHARE = 0.75
_POLICIES = (True, False, "auto", "unsloth")


def check_policy(policy: object) -> Any:
    """Return ``policy`` when it is one of True, False, "auto", "unsloth".

    Raises:
        ConfigError: any other value.
        NotYetError: ``"offload"``.
    """
    if policy == "offload":
        raise NotYetError(
            got='use_gradient_checkpointing="offload" was given.',
            need="Offloading activations to host memory is not in this version.",
            fix="Use True, which recomputes them.",
        )
    if not any(policy is known or (isinstance(policy, str) and policy == known) for known in _POLICIES):
        raise ConfigError(
            got=f"use_gradient_checkpointing={policy!r} was given.",
            need='It is True, False, "auto" or "unsloth" (a synonym of True).',
            fix='Leave it out for "auto".',
        )
    return policy


def is_recompute_on(policy: object, device_type: str) -> bool:
    """Whether activations are recomputed under ``policy`` on ``device_type`` ("cuda", "cpu", …)."""
    if policy == "auto":
        return device_type != "cpu"
    return bool(policy)


def estimate_activations(model: Any, tokens: int) -> int:
    """Bytes that the layers of ``model`` keep for the backward when nothing is recomputed; an upper estimate.

    A fused layer keeps x, q, k, v, the attention's output, the residual after it, gate and up, per token. Layers as
    transformers and PEFT compute them keep about 2.7 times as much (measured: 240 against 92 KiB per token and layer
    for the 8B Llama); 3.2 is assumed.

    Args:
        model: a causal language model, also inside PEFT.
        tokens: tokens of the longest batch, padding included.
    """
    from pantheraml.models.fused import FusedDecoderLayer

    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None)
    inner *= experts or 1
    numbers = 2 * config.hidden_size + 2 * queries + 2 * keys + 2 * inner
    is_fused = not experts and any(isinstance(module, FusedDecoderLayer) for module in model.modules())
    factor = 1.0 if is_fused else 3.2
    return int(tokens * config.num_hidden_layers * numbers * max(model.dtype.itemsize, 2) * factor)


def set_recompute(model: Any, on: bool) -> None:
    """Switch activation recompute (non-reentrant) on a transformers or PEFT model."""
    # transformers renamed "gradient" to "activation" checkpointing after 5.17; the older names warn in newer versions.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(model, f"{prefix}_checkpointing_enable")
        enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def is_recomputing(model: Any) -> bool:
    """Whether a transformers or PEFT model recomputes activations now."""
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing"))
