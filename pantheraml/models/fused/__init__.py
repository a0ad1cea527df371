"""Fused parts, and the functions that swap them in. Each leaves the model's Parameters as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer, apply_layers
from pantheraml.models.fused.experts import FusedMixture, apply_experts
from pantheraml.models.fused.host_store import HostStore
from pantheraml.models.fused.loss import apply_loss
from pantheraml.models.fused.norm import FusedRMSNorm, apply_norms
from pantheraml.models.patching import PatchSet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "FusedDecoderLayer",
    "FusedMixture",
    "FusedRMSNorm",
    "HostStore",
    "apply_attention",
    "apply_experts",
    "apply_fused_parts",
    "apply_layers",
    "apply_loss",
    "apply_norms",
]


def apply_fused_parts(
    model: PreTrainedModel,
    family: ModelFamily | None,
    patches: PatchSet,
    *,
    keep_attention: bool = False,
    device: torch.device | None = None,
    is_cut: bool = False,
) -> PatchSet:
    """Swap in everything that fits ``model``; what does not is recorded in ``patches`` with the reason.

    Args:
        model: the base model.
        family: its family, or None for an unknown architecture, which is left as it is.
        patches: the ledger.
        keep_attention: the user named an attention implementation, which stays.
        device: where the model is going to be, if it is not there yet.
        is_cut: its layers are cut between ranks.

    Returns:
        ``patches``.
    """
    if family is None:
        patches.skip(type(model).__name__, f"no family describes {model.config.model_type!r}")
        return patches
    apply_norms(model, family, patches, device=device)
    if is_cut:
        patches.skip("layers", "each is cut between ranks, whose sums come in the middle of what is fused")
    else:
        apply_layers(model, family, patches, device=device)
    apply_experts(model, family, patches, device=device)
    apply_loss(model, patches, device=device)
    if keep_attention:
        patches.skip("attention", "an attn_implementation was given")
        return patches
    return apply_attention(model, family, patches)
