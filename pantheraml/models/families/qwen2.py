"""Qwen 2 and 2.5: Llama with biases on q, k and v; a window for the upper layers if the config says so."""

from __future__ import annotations

from pantheraml.models.families.family import ModelFamily, NormKind

QWEN2 = ModelFamily(
    name="qwen2",
    model_types=("qwen2",),
    norm=NormKind(("Qwen2RMSNorm",)),
    deviations=frozenset({"sliding_window"}),
)
