"""The widths of a model by its configuration, from which the bytes of its activations follow."""

from __future__ import annotations

from typing import Any

from pantheraml.devices.activations import TILE, ActivationSizes, Kept

__all__ = ["TILE", "ActivationSizes", "Kept", "activation_sizes"]


def activation_sizes(
    config: Any,
    itemsize: int,
    *,
    is_fused: bool,
    has_head_norms: bool = False,
    has_post_norms: bool = False,
    rank: int = 16,
    trained_in: int = 0,
) -> ActivationSizes:
    """Those of a model with the configuration ``config`` of transformers.

    Args:
        config: only read.
        itemsize: bytes of a number of the hidden states.
        is_fused: whether layers are fused.
        has_head_norms: whether queries and keys are normalised.
        has_post_norms: whether the outputs of attention and MLP are.
        rank: of the adapters; 0 without.
        trained_in: bytes of a number that is computed with, where the base weights are trained; 0 where they are not.
            Fused layers compute those in what the hidden states are in, only.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ActivationSizes(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        experts=getattr(config, "num_experts_per_tok", None) or 0,
        heads=heads,
        queries=heads * head_dim,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=config.vocab_size,
        size=max(itemsize, 2),
        is_fused=is_fused,
        has_head_norms=has_head_norms,
        has_post_norms=has_post_norms,
        compute=trained_in,
        rank=0 if trained_in else rank,
        is_trained=trained_in > 0,
    )
