"""Gemma 2: soft-capped logits, every other layer windowed, norms around attention and MLP."""

from __future__ import annotations

from pantheraml.models.families.family import ModelFamily, NormKind

GEMMA2 = ModelFamily(
    name="gemma2",
    model_types=("gemma2",),
    norm=NormKind(("Gemma2RMSNorm",), eps_name="eps", offset=1.0, cast_first=False),
    activation="gelu_pytorch_tanh",
    layer_norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    deviations=frozenset(
        {"attention_softcap", "final_softcap", "sliding_window", "scaled_embedding", "sandwich_norm"}
    ),
)
