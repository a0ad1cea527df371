"""Fused parts, and the functions that swap them in. Each leaves the model's Parameters as they are."""

from __future__ import annotations

from torch import nn

from pantheraml.models.families import ModelFamily
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.fused.norm import FusedRMSNorm, apply_norms
from pantheraml.models.patching import PatchSet

__all__ = ["FusedRMSNorm", "apply_attention", "apply_fused_parts", "apply_norms"]


def apply_fused_parts(model: nn.Module, family: ModelFamily | None, patches: PatchSet) -> PatchSet:
    """Swap in everything that fits ``model``; what does not is recorded in ``patches`` with the reason.

    Args:
        model: the model or its PEFT wrapper.
        family: its family, or None for an unknown architecture, which is left as it is.
        patches: the ledger.

    Returns:
        ``patches``.
    """
    if family is None:
        patches.skip(type(model).__name__, "no fused parts are known for this architecture")
        return patches
    apply_norms(model, family, patches)
    return apply_attention(model, family, patches)
