"""The two differentiable halves of a decoder layer around its attention.

    AttentionInput:   x -> q, k, v, x          norm, projections, LoRA, bias, rotary positions
    AttentionOutput:  x, a -> x + o(a) + mlp   projection, residual, norm, gated MLP, residual

Base weights and norms are frozen; gradients are for x, a and LoRA's factors. x (B, S, H); q (B, heads, S, D);
a (B, S, heads * D). Everything else is kept in two dims, (T, width) with T = B * S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.add_norm import add_norm, norm_backward
from pantheraml.kernels.low_rank import LowRank
from pantheraml.kernels.rms_norm import rms_norm
from pantheraml.kernels.rope import rotate_, rotate_back
from pantheraml.kernels.swiglu import glu_backward, glu_forward
from pantheraml.models.fused.projection import Projection, factor_gradient, thin


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm: weight (N,), and its settings."""

    weight: Tensor
    eps: float
    offset: float
    cast_first: bool

    @property
    def settings(self) -> tuple[float, float, bool]:
        """eps, offset, cast_first."""
        return self.eps, self.offset, self.cast_first


@dataclass(frozen=True)
class InputPart:
    """What AttentionInput computes with."""

    norm: Norm
    projections: tuple[Projection, Projection, Projection]
    head_dim: int


@dataclass(frozen=True)
class OutputPart:
    """What AttentionOutput computes with."""

    o: Projection
    norm: Norm
    gate: Projection
    up: Projection
    down: Projection
    activation: str


def factors(*projections: Projection) -> list[Tensor | None]:
    """A and B of each projection, in order: the trainable inputs of the functions here."""
    return [factor for projection in projections for factor in (projection.a, projection.b)]


def _low_rank(t: Tensor | None, projection: Projection) -> LowRank | None:
    if t is None or projection.b is None:
        return None
    return LowRank(t, projection.b.detach().to(t.dtype).contiguous(), projection.scale)


def _stacked(projections: tuple[Projection, ...], dtype: torch.dtype) -> Tensor | None:
    """The A factors below one another, (sum of ranks, K)."""
    present = [p.a.detach().to(dtype) for p in projections if p.a is not None]
    return torch.cat(present) if present else None


def _slices(t: Tensor | None, projections: tuple[Projection, ...]) -> list[Tensor | None]:
    """The columns of ``t`` that belong to each projection."""
    parts: list[Tensor | None] = []
    start = 0
    for projection in projections:
        if t is None or projection.a is None:
            parts.append(None)
            continue
        parts.append(t[:, start : start + projection.a.shape[0]])
        start += projection.a.shape[0]
    return parts


def _back_through(grads: list[Tensor], projections: tuple[Projection, ...]) -> tuple[Tensor, Tensor | None]:
    """dX (T, K), LoRA included, and its ``scale * dY B`` (T, sum of ranks), which the factors' gradients need.

    The thin product of LoRA comes first and the wide ones are added to it: adding inside a product is free, while
    adding the thin one afterwards would read and write dX once more.
    """
    inner = _inner(grads, projections)
    if inner is None:
        dx = grads[0] @ projections[0].weight()
        rest = zip(grads[1:], projections[1:], strict=True)
    else:
        a = _stacked(projections, inner.dtype)
        assert a is not None
        dx = inner @ a
        rest = zip(grads, projections, strict=True)
    for grad, projection in rest:
        dx.addmm_(grad, projection.weight())
    return dx, inner


def _inner(grads: list[Tensor], projections: tuple[Projection, ...]) -> Tensor | None:
    parts = [
        (grad @ projection.b.detach().to(grad.dtype)) * projection.scale
        for grad, projection in zip(grads, projections, strict=True)
        if projection.b is not None
    ]
    return torch.cat(parts, dim=1) if parts else None


def _factor_gradients(
    grads: list[Tensor],
    inner: Tensor | None,
    x: Tensor,
    t: Tensor | None,
    projections: tuple[Projection, ...],
) -> list[Tensor | None]:
    """Gradients of A and B of each projection, in the order of ``factors``."""
    result: list[Tensor | None] = []
    da = None if inner is None else factor_gradient(inner, x)
    start = 0
    for grad, part, projection in zip(grads, _slices(t, projections), projections, strict=True):
        if projection.a is None or projection.b is None or part is None or da is None:
            result += [None, None]
            continue
        rank = projection.a.shape[0]
        result.append(da[start : start + rank].to(projection.a.dtype))
        result.append(factor_gradient(grad, part, projection.scale).to(projection.b.dtype))
        start += rank
    return result


class AttentionInput(torch.autograd.Function):
    """Norm, q, k, v, LoRA, bias and rotary positions; passes x through so that its gradient is added here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: InputPart, cos: Tensor, sin: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, S, H); cos and sin (T, D); the factors are read from ``part``, they are listed for autograd."""
        batch, tokens, width = x.shape
        flat = x.reshape(-1, width)
        norm, projections = part.norm, part.projections
        h = rms_norm(flat, norm.weight, norm.eps, norm.offset, norm.cast_first)
        a = _stacked(projections, h.dtype)
        t = None if a is None else thin(h, a)
        buffer = h.new_empty(h.shape[0], sum(p.features for p in projections))
        outputs, start = [], 0
        for index, (projection, inner) in enumerate(zip(projections, _slices(t, projections), strict=True)):
            out = buffer[:, start : start + projection.features]
            torch.mm(h, projection.weight().T, out=out)
            rotary = (cos, sin) if index < 2 else None
            bias = projection.linear.bias
            rotate_(out, part.head_dim, rotary, bias, _low_rank(inner, projection))
            outputs.append(out.view(batch, tokens, -1, part.head_dim).transpose(1, 2))
            start += projection.features
        ctx.part = part
        ctx.save_for_backward(flat, cos, sin, *(() if t is None else (t,)))
        return outputs[0], outputs[1], outputs[2], x

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x and of the factors."""
        part: InputPart = ctx.part
        flat, cos, sin, *rest = ctx.saved_tensors
        t = rest[0] if rest else None
        projections = part.projections
        buffer = flat.new_empty(flat.shape[0], sum(p.features for p in projections))
        grads, start = [], 0
        for index, (grad, projection) in enumerate(zip((dq, dk, dv), projections, strict=True)):
            out = buffer[:, start : start + projection.features]
            grads.append(rotate_back(grad, (cos, sin) if index < 2 else None, out))
            start += projection.features
        if ctx.needs_input_grad[0]:
            dh, inner = _back_through(grads, projections)
            residual = dx.reshape(flat.shape)
            gradient, h = norm_backward(
                dh, residual, flat, part.norm.weight, part.norm.settings, keep_h=t is not None
            )
            gradient = gradient.view(dx.shape)
        else:  # the first layer: nothing trained lies before it
            inner, gradient = _inner(grads, projections), None
            h = rms_norm(flat, part.norm.weight, *part.norm.settings)
        assert h is not None or t is None
        trained = _factor_gradients(grads, inner, flat if h is None else h, t, projections)
        return gradient, None, None, None, *trained


class AttentionOutput(torch.autograd.Function):
    """Output projection, residual, norm, gated MLP and residual, LoRA inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, part: OutputPart, *_: Tensor | None) -> Tensor:
        """x (B, S, H); attended (B, S, heads * D); the factors are listed for autograd."""
        shape = x.shape
        flat, heads = x.reshape(-1, shape[-1]), attended.reshape(-1, attended.shape[-1])
        t_o = None if part.o.a is None else thin(heads, part.o.a.detach())
        o = heads @ part.o.weight().T
        middle, h = add_norm(flat, o, _low_rank(t_o, part.o), part.norm.weight, *part.norm.settings)
        del o
        pair = (part.gate, part.up)
        a = _stacked(pair, h.dtype)
        t = None if a is None else thin(h, a)
        gate, up = h @ part.gate.weight().T, h @ part.up.weight().T
        t_gate, t_up = _slices(t, pair)
        value = glu_forward(gate, up, _low_rank(t_gate, part.gate), _low_rank(t_up, part.up), part.activation)
        t_down = None if part.down.a is None else thin(value, part.down.a.detach())
        down = value @ part.down.weight().T
        out, _unused = add_norm(middle, down, _low_rank(t_down, part.down), None, *part.norm.settings)
        ctx.part = part
        ctx.save_for_backward(heads, middle, gate, up, t_o, t, t_down)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, of what was attended, and of the factors."""
        part: OutputPart = ctx.part
        heads, middle, gate, up, t_o, t, t_down = ctx.saved_tensors
        flat = dy.reshape(middle.shape).contiguous()
        pair, norm = (part.gate, part.up), part.norm

        dvalue = flat @ part.down.weight()
        inner_down = _inner([flat], (part.down,))
        lora_down = None
        if inner_down is not None and part.down.a is not None:
            lora_down = LowRank(inner_down, part.down.a.detach().to(flat.dtype).T.contiguous(), 1.0)
        t_gate, t_up = _slices(t, pair)
        dgate, dup, value = glu_backward(
            dvalue,
            gate,
            up,
            _low_rank(t_gate, part.gate),
            _low_rank(t_up, part.up),
            lora_down,
            part.activation,
        )
        del dvalue
        down_factors = _factor_gradients([flat], inner_down, value, t_down, (part.down,))
        del value

        dh, inner = _back_through([dgate, dup], pair)
        dmiddle, h = norm_backward(dh, flat, middle, norm.weight, norm.settings, keep_h=t is not None)
        pair_factors = _factor_gradients([dgate, dup], inner, middle if h is None else h, t, pair)
        del dgate, dup, h, dh

        dheads, inner_o = _back_through([dmiddle], (part.o,))
        o_factors = _factor_gradients([dmiddle], inner_o, heads, t_o, (part.o,))
        shape = dy.shape
        return (
            dmiddle.view(shape),
            dheads.view(*shape[:-1], -1),
            None,
            *o_factors,
            *pair_factors,
            *down_factors,
        )
