"""Forward and backward of a decoder layer's parts around its attention, without autograd.

    project_in:    x -> q, k, v                   norm, projections, bias, head norms, rotary positions
    project_out:   x, attended -> s, h            output projection, residual, norm
    mlp:           s, h -> y                      gated MLP, residual
    tail:          x, attended -> y               project_out and mlp

Everything is two-dimensional: x, s, h, y (T, H) with T = B * S; LoRA is part of every product (``Stack``). A forward
returns what its backward needs; each backward returns the gradient of its inputs and those of the factors: what is
trained of a part, in the order of its ``factors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.add_norm import add_norm, norm_backward
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm_into
from pantheraml.kernels.rope import Rotary
from pantheraml.kernels.rope_qkv import HeadNorms, rotate_qkv_, rotate_qkv_back
from pantheraml.kernels.swiglu import glu_backward, glu_forward
from pantheraml.models.fused.parts import InputPart, MiddlePart, MLPPart

Gradients = list[Tensor | None]


class Heads(NamedTuple):
    """q, k and v side by side, (T, (heads + 2 kv_heads) * D); for the backward: the sums before head norms, and t."""

    qkv: Tensor
    raw: Tensor | None
    t: Tensor | None


def project_in(x: Tensor, part: InputPart, rotary: Rotary) -> Heads:
    """q, k and v of x (T, H)."""
    y, t = part.qkv.product_of_norm(x, part.norm)
    # With head norms the sums stay, since the norms' backward reads them.
    out = None if part.head_norms is None else torch.empty_like(y)
    qkv = rotate_qkv_(y, part.widths, part.head_dim, rotary, part.bias, part.head_norms, out)
    return Heads(qkv, None if out is None else y, t)


def project_in_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    residual: Tensor | None,
    x: Tensor,
    part: InputPart,
    rotary: Rotary,
    kept: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
) -> Gradients:
    """Writes the gradient of x to out (T, H), with ``residual`` (T, H) added; both are None where nothing before x is
    trained.

    ``grads`` are those of q, k and v, (T, heads, D) each; ``kept`` is raw and t of the forward.
    """
    raw, t = kept
    dy = part.qkv.widened(x, part.qkv.rows)
    heads = _rotate_back(grads, rotary, dy[:, : part.qkv.rows], part.head_norms, raw)
    h = torch.empty_like(x) if part.qkv.has_factors else None
    norm = None
    if residual is not None or part.norm.is_trained:
        dh, inner = part.qkv.input_gradient(dy)
        norm = _norm_back(dh, residual, x, part.norm, dh if out is None else out, h)
    else:
        inner = part.qkv.inner(dy)
        if h is not None:
            rms_norm_into(h, x, part.norm)
    return [*part.qkv.factor_gradients(dy, inner, x if h is None else h, t), norm, *heads]


class Middle(NamedTuple):
    """s = x + o (T, H), h = norm(s), as wide as its reader wants it; for the backward: o before its norm, and t."""

    s: Tensor
    h: Tensor
    raw: Tensor | None
    t: Tensor | None


def project_out(x: Tensor, attended: Tensor, part: MiddlePart, h: Tensor) -> Middle:
    """The residual sum after the attention and its norm; attended (T, heads * D), h (T, >= H) is written."""
    o, t = part.o.product(attended, part.o.projections[0].linear.bias)
    width = x.shape[1]
    raw = None
    if part.post is not None:
        raw, o = o, rms_norm_into(torch.empty_like(o), o, part.post)
    return Middle(add_norm(x, o, part.norm, h[:, :width]), h, raw, t)


def project_out_backward(
    dh: Tensor,
    ds: Tensor,
    middle: tuple[Tensor, Tensor | None, Tensor | None],
    attended: Tensor,
    part: MiddlePart,
    h: Tensor | None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Gradients of x and of what was attended; dh and ds (T, H) those of h and s.

    ``middle`` is s, raw and t of the forward; h (T, H), when given, is filled with the norm's output once more.
    """
    s, raw, t = middle
    width = s.shape[1]
    wide = part.o.widened(s, width)
    dx = wide[:, :width]
    norm, post, dy = _norm_back(dh, ds, s, part.norm, dx, h), None, wide
    if part.post is not None and raw is not None:
        dy = part.o.widened(s, width)
        post = _norm_back(dx, None, raw, part.post, dy[:, :width])
    dattended, inner = part.o.input_gradient(dy)
    return dx, dattended, [*part.o.factor_gradients(dy, inner, attended, t), post, norm]


class MLPOutput(NamedTuple):
    """y (T, H); and what the backward needs: gate and up (T, 2 N), down's product before its norm, and both t."""

    y: Tensor
    gate_up: Tensor
    raw: Tensor | None
    t: Tensor | None
    t_down: Tensor | None


def mlp(s: Tensor, h: Tensor, part: MLPPart, out: Tensor) -> MLPOutput:
    """``s + down(act(gate) * up)`` of h (T, H + E), written to out (T, H)."""
    gate_up, t = part.gate_up.product(h)
    gate, up = gate_up.chunk(2, dim=1)
    value = part.down.widened(s, part.down.cols)
    glu_forward(gate, up, part.activation, value[:, : part.down.cols])
    down, t_down = part.down.product(value)
    raw = None
    if part.post is not None:
        raw, down = down, rms_norm_into(torch.empty_like(down), down, part.post)
    return MLPOutput(torch.add(s, down, out=out), gate_up, raw, t, t_down)


class MLPGradient(NamedTuple):
    """dh (T, H); the widened gradient of gate and up and its ``i``, for their factors; those of down and its norm."""

    dh: Tensor
    wide: Tensor
    inner: Tensor | None
    down: Gradients


def mlp_backward(
    dy: Tensor, gate_up: Tensor, raw: Tensor | None, t_down: Tensor | None, part: MLPPart, *, in_place: bool
) -> MLPGradient:
    """The gradient of h; gate and up's factors follow from ``part.gate_up.factor_gradients`` once h is there again.

    dy is (T, H), or widened for ``part.down`` and completed here. ``t_down`` is computed anew where it is not given.
    With ``in_place``, gate_up is widened, and their gradients take the place of gate and up.
    """
    ddown, post = dy, None
    if part.post is not None and raw is not None:
        ddown = part.down.widened(raw, raw.shape[1])
        post = _norm_back(dy[:, : raw.shape[1]], None, raw, part.post, ddown[:, : raw.shape[1]])
    dvalue, inner_down = part.down.input_gradient(ddown)
    gate, up = gate_up[:, : part.gate_up.rows].chunk(2, dim=1)
    wide = gate_up if in_place else part.gate_up.widened(dy, part.gate_up.rows)
    dgate, dup = wide[:, : part.gate_up.rows].chunk(2, dim=1)
    # The value takes the place of its own gradient, which is read only here.
    glu_backward(dvalue, gate, up, part.activation, (dgate, dup, dvalue))
    t_down = part.down.thin(dvalue) if t_down is None else t_down
    down = part.down.factor_gradients(ddown, inner_down, dvalue, t_down)
    del dvalue
    dh, inner = part.gate_up.input_gradient(wide)
    return MLPGradient(dh, wide, inner, [*down, post])


class Tail(NamedTuple):
    """y (T, H); and what the backward needs: ``Middle`` without h, and ``MLPOutput`` without y."""

    y: Tensor
    s: Tensor
    raw_o: Tensor | None
    t_o: Tensor | None
    gate_up: Tensor
    raw: Tensor | None
    t: Tensor | None
    t_down: Tensor | None


def tail(x: Tensor, attended: Tensor, middle: MiddlePart, part: MLPPart, out: Tensor) -> Tail:
    """Everything after the attention: ``project_out`` and ``mlp``; y is written to out (T, H)."""
    h = part.gate_up.widened(x, x.shape[1])
    s, h, raw_o, t_o = project_out(x, attended, middle, h)
    y, gate_up, raw, t, t_down = mlp(s, h, part, out)
    return Tail(y, s, raw_o, t_o, gate_up, raw, t, t_down)


def tail_again(
    x: Tensor, attended: Tensor, s: Tensor | None, middle: MiddlePart, part: MLPPart, raw: Tensor | None
) -> Sequence[Any]:
    """What ``tail_backward`` reads, ``in_place``, of a tail that was not kept.

    s is the sum after the attention, if that was kept; raw is down's product before its norm.
    """
    width = x.shape[1]
    h = part.gate_up.widened(x, width)
    if s is None:
        s, h, raw_o, t_o = project_out(x, attended, middle, h)
    else:
        raw_o, t_o = None, middle.o.thin(attended)
        rms_norm_into(h[:, :width], s, middle.norm)
    gate_up, t = part.gate_up.widened_product(h)
    return s, raw_o, t_o, gate_up, raw, t, None


def tail_backward(
    dy: Tensor,
    attended: Tensor,
    middle: MiddlePart,
    part: MLPPart,
    kept: Sequence[Any],
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Gradients]:
    """Gradients of x and of what was attended, and of the factors of both parts.

    kept: a ``Tail`` without y; dy and ``in_place`` as in ``mlp_backward``.
    """
    s, raw_o, t_o, gate_up, raw, t, t_down = kept
    dh, wide, inner, down = mlp_backward(dy, gate_up, raw, t_down, part, in_place=in_place)
    h = torch.empty_like(s) if part.gate_up.has_factors else None
    dx, dattended, o = project_out_backward(dh, dy[:, : s.shape[1]], (s, raw_o, t_o), attended, middle, h)
    gate_up_factors = part.gate_up.factor_gradients(wide, inner, s if h is None else h, t)
    return dx, dattended, [*o, *gate_up_factors, *down]


def _norm_back(
    dh: Tensor, ds: Tensor | None, s: Tensor, norm: RMSNorm, out: Tensor, h: Tensor | None = None
) -> Tensor | None:
    """``norm_backward``; returns the gradient of the norm's weight where that is trained."""
    dw = torch.empty_like(norm.weight, dtype=torch.float32) if norm.is_trained else None
    norm_backward(dh, ds, s, norm, out, h, dw)
    return None if dw is None else dw.to(norm.weight.dtype)


def _rotate_back(
    grads: tuple[Tensor, Tensor, Tensor],
    rotary: Rotary,
    out: Tensor,
    norms: HeadNorms | None,
    raw: Tensor | None,
) -> Gradients:
    """``rotate_qkv_back``; returns the gradients of the weights of the head norms, of those that are trained."""
    if norms is None or not any(norm.is_trained for norm in norms):
        rotate_qkv_back(grads, rotary, out, norms, raw)
        return [None] * len(norms or ())
    q, k = (torch.empty_like(norm.weight, dtype=torch.float32) for norm in norms)
    rotate_qkv_back(grads, rotary, out, norms, raw, (q, k))
    pairs = zip((q, k), norms, strict=True)
    return [dw.to(norm.weight.dtype) if norm.is_trained else None for dw, norm in pairs]


def shaped(out: Tensor, like: Tensor) -> Tensor:
    """``out`` in the shape of ``like``, in the same memory and yet no view: FSDP2 hangs hooks on a layer's output."""
    return torch.ops.aten._unsafe_view(out, like.shape)
