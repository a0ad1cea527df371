"""LayerNorm in float64, without any rounding in between."""

from __future__ import annotations

import torch


def layer_norm(x, weight, bias, eps):
    """(..., N) float64; differentiable."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return y if bias is None else y + bias.double()
