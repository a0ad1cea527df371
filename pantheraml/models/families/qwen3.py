"""Qwen 3: queries and keys are normalised per head before RoPE."""

from __future__ import annotations

from pantheraml.models.families.family import ModelFamily, NormKind

QWEN3 = ModelFamily(
    name="qwen3",
    model_types=("qwen3",),
    norm=NormKind(("Qwen3RMSNorm",)),
    head_norms=("q_norm", "k_norm"),
    deviations=frozenset({"sliding_window"}),
)
