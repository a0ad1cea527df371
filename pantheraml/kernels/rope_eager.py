"""Rotary positions in plain PyTorch, for where Triton launches no kernels; shapes and formulas are in ``rope``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantheraml.kernels.rms_norm import RMSNorm

if TYPE_CHECKING:
    from pantheraml.kernels.rope import Rotary


def forward(
    x: Tensor,
    head_dim: int,
    rotary: Rotary | None,
    bias: Tensor | None,
    norm: RMSNorm | None,
    out: Tensor | None,
) -> Tensor:
    """As ``rope.rotate_``."""
    y = x.float()
    if bias is not None:
        y = y + bias.float()
    if norm is not None:
        x.copy_(y)
        y = _normed(x.reshape(x.shape[0], -1, head_dim), norm)[-1].float()
    y = y.reshape(x.shape[0], -1, head_dim)
    if rotary is not None:
        cos, sin = _both_halves(rotary)
        turned, rest = y[..., : rotary.width], y[..., rotary.width :]
        y1, y2 = turned.chunk(2, dim=-1)
        y = torch.cat((turned * cos + torch.cat((-y2, y1), dim=-1) * sin, rest), dim=-1)
    return (x if out is None else out).copy_(y.flatten(1))


def backward(
    dy: Tensor,
    rotary: Rotary | None,
    out: Tensor,
    norm: RMSNorm | None,
    x: Tensor | None,
    dw: Tensor | None = None,
) -> Tensor:
    """As ``rope.rotate_back``; dw (D,) float32, when given, is filled with the gradient of the norm's weight."""
    dx = dy.float()
    if rotary is not None:
        cos, sin = _both_halves(rotary)
        turned, rest = dx[..., : rotary.width], dx[..., rotary.width :]
        first, second = (turned * sin).chunk(2, dim=-1)
        dx = torch.cat((turned * cos + torch.cat((second, -first), dim=-1), rest), dim=-1)
    if norm is not None and x is not None:
        rstd, x_hat, rounded, _ = _normed(x.reshape(dx.shape), norm)
        if dw is not None:
            torch.sum(dx * rounded, (0, 1), out=dw)
        g = dx * (norm.weight.float() + norm.offset)
        dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return out.copy_(dx.flatten(1))


def _both_halves(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """cos and sin in float32, (T, 1, R)."""
    parts = (part.float()[:, None] for part in rotary[:2])
    cos, sin = (torch.cat((p, p), -1) if p.shape[-1] < rotary.width else p for p in parts)
    return cos, sin


def _normed(x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 / rms, x / rms in float32, that as it is rounded before the weight, and the norm's output; x (T, heads, D)."""
    x32 = x.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)
    x_hat = x32 * rstd
    rounded = x_hat.to(x.dtype).float() if norm.cast_first else x_hat
    return rstd, x_hat, rounded, (rounded * (norm.weight.float() + norm.offset)).to(x.dtype)
