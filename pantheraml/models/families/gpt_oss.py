"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, every other layer windowed."""

from __future__ import annotations

from pantheraml.models.families.family import Experts, ModelFamily, NormKind

GPT_OSS = ModelFamily(
    name="gpt_oss",
    model_types=("gpt_oss",),
    norm=NormKind(("GptOssRMSNorm",), cast_first=False),
    activation="clamped_swiglu",
    mlp_projections=(),
    experts=Experts(router="router"),
    deviations=frozenset({"sliding_window", "attention_sinks", "half_rotary"}),
)
