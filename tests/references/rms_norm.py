"""RMSNorm in float64, without any rounding in between."""

from __future__ import annotations

import torch


def rms_norm(x, weight, eps, offset):
    """(..., N) float64; differentiable."""
    x, weight = x.double(), weight.double()
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)
