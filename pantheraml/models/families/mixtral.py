"""Mixtral: Mistral whose every MLP is a mixture of experts."""

from __future__ import annotations

from pantheraml.models.families.family import Experts, ModelFamily, NormKind

MIXTRAL = ModelFamily(
    name="mixtral",
    model_types=("mixtral",),
    norm=NormKind(("MixtralRMSNorm",)),
    mlp_projections=(),
    experts=Experts(),
    deviations=frozenset({"sliding_window"}),
)
