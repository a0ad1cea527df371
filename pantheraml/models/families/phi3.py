"""Phi 3 and 4: q, k, v are one linear, gate and up another; dropout on the residual if the config says so."""

from __future__ import annotations

from types import MappingProxyType

from pantheraml.models.families.family import ModelFamily, NormKind

PHI3 = ModelFamily(
    name="phi3",
    model_types=("phi3",),
    norm=NormKind(("Phi3RMSNorm",)),
    attention_projections=("qkv_proj", "o_proj"),
    mlp_projections=("gate_up_proj", "down_proj"),
    merged_projections=MappingProxyType(
        {
            "q_proj": "qkv_proj",
            "k_proj": "qkv_proj",
            "v_proj": "qkv_proj",
            "gate_proj": "gate_up_proj",
            "up_proj": "gate_up_proj",
        }
    ),
    deviations=frozenset({"sliding_window", "partial_rotary", "residual_dropout"}),
)
