"""The parts of a decoder layer as differentiable functions around an attention that has its own autograd node.

    AttentionInput:    x -> q, k, v, x
    AttentionOutput:   x, a -> s, h               before an MLP of another kind (mixtures of experts)
    AttentionAndMLP:   x, a -> y                  with the gated MLP

x, s, h, y (B, S, H); q (B, heads, S, D); a (B, S, heads * D). Gradients are for x, a and the factors (LoRA's, or the
weights and norms that are trained), which are listed as inputs for autograd and read from the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.rope import Rotary
from pantheraml.models.fused import halves
from pantheraml.models.fused.parts import InputPart, MiddlePart, MLPPart


def _flat(x: Tensor) -> Tensor:
    """(B, S, H) as (T, H) with stride 1 along a row."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class AttentionInput(torch.autograd.Function):
    """Norm, q, k, v, LoRA, bias and rotary positions; passes x through so that its gradient is added here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: InputPart, rotary: Rotary, *_: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, S, H), contiguous."""
        flat = _flat(x)
        found = halves.project_in(flat, part, rotary)
        ctx.part, ctx.rotary = part, rotary
        ctx.save_for_backward(flat, found.raw, found.t)
        shape = (*x.shape[:2], -1, part.head_dim)
        q, k, v = (heads.view(shape).transpose(1, 2) for heads in found.qkv.split(part.widths, dim=1))
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x and of the factors."""
        flat, raw, t = ctx.saved_tensors
        residual = _flat(dx) if ctx.needs_input_grad[0] else None
        dq, dk, dv = (heads.transpose(1, 2).flatten(0, 1) for heads in (dq, dk, dv))
        out = None if residual is None else torch.empty_like(flat)
        factors = halves.project_in_backward(
            (dq, dk, dv), residual, flat, ctx.part, ctx.rotary, (raw, t), out
        )
        return None if out is None else out.view(dx.shape), None, None, *factors


class AttentionOutput(torch.autograd.Function):
    """Output projection, residual and norm: the input of an MLP and its residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, part: MiddlePart, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, H); attended (B, S, heads * D)."""
        flat, heads = _flat(x), _flat(attended)
        s, h, raw, t = halves.project_out(flat, heads, part, torch.empty_like(flat))
        ctx.part = part
        ctx.save_for_backward(heads, s, raw, t)
        return s.view(x.shape), h.view(x.shape)

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, of what was attended, and of the factors."""
        heads, s, raw, t = ctx.saved_tensors
        dx, dattended, factors = halves.project_out_backward(
            _flat(dh), _flat(ds), (s, raw, t), heads, ctx.part, None
        )
        return dx.view(ds.shape), dattended.view(*ds.shape[:2], -1), None, *factors


class AttentionAndMLP(torch.autograd.Function):
    """Output projection, residual, norm, gated MLP and residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, middle: MiddlePart, part: MLPPart, *_: Tensor | None
    ) -> Tensor:
        """x (B, S, H); attended (B, S, heads * D)."""
        flat, heads = _flat(x), _flat(attended)
        y, *kept = halves.tail(flat, heads, middle, part, torch.empty_like(flat))
        ctx.middle, ctx.part = middle, part
        ctx.save_for_backward(heads, *kept)
        return halves.shaped(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, of what was attended, and of the factors."""
        heads, *kept = ctx.saved_tensors
        dx, dattended, found = halves.tail_backward(_flat(dy), heads, ctx.middle, ctx.part, kept)
        shape = dy.shape
        return dx.view(shape), dattended.view(*shape[:2], -1), None, None, *found
