"""Rotary positions with bias and a head norm, in float64, without any rounding in between."""

from __future__ import annotations

import torch


def rotate(x, cos, sin, width, head_dim, bias=None, norm=None):
    """(T, heads * D) float64; differentiable; ``norm`` is (weight, eps, offset)."""
    y = x.double()
    y = y if bias is None else y + bias.double()
    y = y.unflatten(1, (-1, head_dim))
    if norm is not None:
        weight, eps, offset = norm
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (weight.double() + offset)
    if cos is None:
        return y.flatten(1)
    half = width // 2
    cos, sin = (part.double()[:, None, :half] for part in (cos, sin))
    first, second, rest = y[..., :half], y[..., half:width], y[..., width:]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).flatten(1)
