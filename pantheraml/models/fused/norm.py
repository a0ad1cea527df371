"""Swap every RMSNorm of a known family for one kernel on the same weight."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from pantheraml.kernels.launch import why_no_triton
from pantheraml.kernels.rms_norm import rms_norm
from pantheraml.models.families import ModelFamily, NormKind
from pantheraml.models.patching import PatchSet


class FusedRMSNorm(nn.Module):
    """An RMSNorm of transformers, computed by ``pantheraml.kernels.rms_norm``.

    Args:
        norm: the norm it stands for; its weight Parameter is shared.
        kind: how that norm computes.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, kind: NormKind) -> None:
        super().__init__()
        self.register_parameter("weight", norm.get_parameter("weight"))
        self.eps = float(getattr(norm, kind.eps_name))
        self.offset, self.cast_first = kind.offset, kind.cast_first

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., N)."""
        return rms_norm(x, self.weight, self.eps, self.offset, self.cast_first)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset:g}"


def apply_norms(
    model: nn.Module,
    family: ModelFamily,
    patches: PatchSet,
    *,
    on_cpu: bool = False,
    device: torch.device | None = None,
) -> PatchSet:
    """Swap the norms of the language model for fused ones where Triton kernels launch.

    Works before and after PEFT wraps the model. Norms that stay are recorded with the reason.

    Args:
        model: the model or its PEFT wrapper.
        family: what its norms are.
        patches: the ledger.
        on_cpu: swap on a CPU too, where the fused norm computes by plain PyTorch what the old one did.
        device: where the model is going to be, if it is not there yet.

    Returns:
        ``patches``.
    """
    kept: Counter[str] = Counter()
    for path, norm in list(model.named_modules()):
        if not _is_norm_of(path, norm, family):
            continue
        there = device or norm.get_parameter("weight").device
        reason = None if on_cpu and there.type == "cpu" else why_no_triton(there)
        if reason is None and "forward" in vars(norm):
            reason = "another library put a forward of its own on the module"
        if reason is None:
            patches.replace(
                model, path, FusedRMSNorm(norm, family.norm), "one kernel instead of several passes"
            )
        else:
            kept[reason] += 1
    for reason, count in kept.items():
        patches.skip(f"{count} norms", reason)
    return patches


def _is_norm_of(path: str, module: nn.Module, family: ModelFamily) -> bool:
    """Whether ``module`` is a norm of the language model, by transformers' own class."""
    cls = type(module)
    if cls.__name__ not in family.norm.class_names or not cls.__module__.startswith("transformers.models."):
        return False
    return not any(f".{outside}." in f".{path}." for outside in family.not_text)
