"""Qwen 3 mixtures: layers in ``config.mlp_only_layers`` keep an ordinary MLP, the others have experts."""

from __future__ import annotations

from pantheraml.models.families.family import Experts, ModelFamily, NormKind

QWEN3_MOE = ModelFamily(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    norm=NormKind(("Qwen3MoeRMSNorm",)),
    head_norms=("q_norm", "k_norm"),
    experts=Experts(),
    deviations=frozenset({"sliding_window"}),
)
