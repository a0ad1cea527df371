"""Gemma 3: five windowed layers to one full layer, q and k norms; alone or inside the image-text model."""

from __future__ import annotations

from dataclasses import replace

from pantheraml.models.families.family import ModelFamily, NormKind

GEMMA3_TEXT = ModelFamily(
    name="gemma3_text",
    model_types=("gemma3_text",),
    norm=NormKind(("Gemma3RMSNorm",), eps_name="eps", offset=1.0, cast_first=False),
    activation="gelu_pytorch_tanh",
    layer_norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    head_norms=("q_norm", "k_norm"),
    deviations=frozenset({"sliding_window", "scaled_embedding", "sandwich_norm"}),
)

# The image-text model: the same language model one level down. Its image tokens see each other both ways.
GEMMA3 = replace(
    GEMMA3_TEXT,
    name="gemma3",
    model_types=("gemma3",),
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    not_text=("model.vision_tower", "model.multi_modal_projector"),
)
