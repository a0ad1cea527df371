"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from pantheraml.models.families.family import ModelFamily, NormKind

MISTRAL = ModelFamily(
    name="mistral",
    model_types=("mistral",),
    norm=NormKind(("MistralRMSNorm",)),
    deviations=frozenset({"sliding_window"}),
)
