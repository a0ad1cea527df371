"""Rotary positions for the heads of q and k, with bias and the norm of a head inside.

Shapes: x (T, heads * D), a projection's product; cos, sin (T, R) or (T, R / 2) as transformers makes them, where R <= D
numbers of a head are turned (R / 2 pairs; where there are two halves of cos they are alike); bias (heads * D,); weight
of the heads' norm (D,).

Forward, per head, in float32, rounded once (x1, x2 are the halves of the turned part):
    x  = x + bias
    x  = x / rms(x) * (offset + weight)        only with a head norm (Qwen 3, Gemma 3); rounded as RMSNorm does
    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin                       heads of v and the rest of a head (D > R) are not turned

Without a norm y takes the place of x. With one, x (bias added) stays, because the backward needs it.

Backward turns the other way, dx1 = dy1 cos + dy2 sin, dx2 = dy2 cos - dy1 sin, and goes through the norm as that of
RMSNorm does; the gradient of the norm's weight is a sum over rows and heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels import rope_eager
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl
from pantheraml.kernels.rms_norm import RMSNorm

BLOCK_M = 32
_WARPS = 4


class Rotary(NamedTuple):
    """cos and sin, (T, R) or (T, R / 2) each, contiguous; and R, the numbers of a head that are turned."""

    cos: Tensor
    sin: Tensor
    width: int


@jit
def _normalise(x1, x2, tail, w1, w2, w_tail, eps, width, element: tl.constexpr, CAST_FIRST: tl.constexpr):
    """x / rms(x) * w of a head in three parts, rounded to ``element`` where RMSNorm rounds; and 1 / rms."""
    squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(tail * tail, axis=1)
    rstd = tl.rsqrt(squares / width + eps)[:, None]
    x1 *= rstd
    x2 *= rstd
    tail *= rstd
    if CAST_FIRST:
        x1 = x1.to(element).to(tl.float32)
        x2 = x2.to(element).to(tl.float32)
        tail = tail.to(element).to(tl.float32)
    y1 = (x1 * w1[None, :]).to(element).to(tl.float32)
    y2 = (x2 * w2[None, :]).to(element).to(tl.float32)
    y_tail = (tail * w_tail[None, :]).to(element).to(tl.float32)
    return y1, y2, y_tail


@jit
def turn_head(
    x_ptr, x_stride, y_ptr, y_stride, head, rows, cos_ptr, sin_ptr, bias_ptr, w_ptr, eps, offset,
    TURN: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, CAST_FIRST: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, TAIL: tl.constexpr, TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of a block (program 1) of a head's forward; x, y and bias point to the first head of their tensor."""
    D: tl.constexpr = 2 * HALF + TAIL
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, LANES)
    first = head * D + lane
    second = first + HALF
    line = row.to(tl.int64)[:, None]
    there = (row < rows)[:, None] & (lane < HALF)[None, :]
    x1 = tl.load(x_ptr + line * x_stride + first[None, :], mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + line * x_stride + second[None, :], mask=there, other=0.0).to(tl.float32)
    rest = tl.arange(0, TAIL_LANES)
    third = head * D + 2 * HALF + rest
    tail_there = (row < rows)[:, None] & (rest < TAIL)[None, :]
    tail = tl.zeros((BLOCK_M, TAIL_LANES), tl.float32)
    if TAIL > 0:
        tail += tl.load(x_ptr + line * x_stride + third[None, :], mask=tail_there, other=0.0).to(tl.float32)
    if BIAS:
        x1 += tl.load(bias_ptr + first, mask=lane < HALF, other=0.0).to(tl.float32)[None, :]
        x2 += tl.load(bias_ptr + second, mask=lane < HALF, other=0.0).to(tl.float32)[None, :]
        if TAIL > 0:
            tail += tl.load(bias_ptr + third, mask=rest < TAIL, other=0.0).to(tl.float32)[None, :]
    element: tl.constexpr = x_ptr.dtype.element_ty
    if NORM:
        x1 = x1.to(element).to(tl.float32)
        x2 = x2.to(element).to(tl.float32)
        tail = tail.to(element).to(tl.float32)
        if BIAS:
            tl.store(x_ptr + line * x_stride + first[None, :], x1.to(element), mask=there)
            tl.store(x_ptr + line * x_stride + second[None, :], x2.to(element), mask=there)
            if TAIL > 0:
                tl.store(x_ptr + line * x_stride + third[None, :], tail.to(element), mask=tail_there)
        w1 = tl.load(w_ptr + lane, mask=lane < HALF, other=0.0).to(tl.float32) + offset
        w2 = tl.load(w_ptr + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32) + offset
        w_tail = tl.load(w_ptr + 2 * HALF + rest, mask=rest < TAIL, other=0.0).to(tl.float32) + offset
        x1, x2, tail = _normalise(x1, x2, tail, w1, w2, w_tail, eps, D, element, CAST_FIRST)
    if TURN:
        at = line * COS_WIDTH + lane[None, :]
        cos = tl.load(cos_ptr + at, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=there, other=0.0).to(tl.float32)
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    else:
        y1 = x1
        y2 = x2
    tl.store(y_ptr + line * y_stride + first[None, :], y1.to(element), mask=there)
    tl.store(y_ptr + line * y_stride + second[None, :], y2.to(element), mask=there)
    if TAIL > 0:
        tl.store(y_ptr + line * y_stride + third[None, :], tail.to(element), mask=tail_there)


@jit
def _rotate_kernel(
    x_ptr, x_stride, y_ptr, y_stride, rows, cos_ptr, sin_ptr, bias_ptr, w_ptr, eps, offset,
    TURN: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, CAST_FIRST: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, TAIL: tl.constexpr, TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    turn_head(
        x_ptr, x_stride, y_ptr, y_stride, tl.program_id(0), rows, cos_ptr, sin_ptr, bias_ptr, w_ptr, eps, offset,
        TURN, BIAS, NORM, CAST_FIRST, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
    )  # fmt: skip


@jit
def _weight_share(dy, x_hat, element: tl.constexpr, CAST_FIRST: tl.constexpr):
    """Of the rows of a block, what they add to the gradient of a norm's weight."""
    if CAST_FIRST:
        x_hat = x_hat.to(element).to(tl.float32)
    return tl.sum(dy * x_hat, axis=0)


@jit
def turn_head_back(
    dy_ptr, dy_token, dy_head, dx_ptr, dx_stride, head, rows, cos_ptr, sin_ptr,
    x_ptr, x_stride, w_ptr, eps, offset, dw_ptr, dw_stride,
    TURN: tl.constexpr, NORM: tl.constexpr, CAST_FIRST: tl.constexpr, WITH_DW: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, TAIL: tl.constexpr, TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of a block (program 1) of a head's backward; dy, dx, x and dw point to the first head of their tensor.

    dw (blocks, heads, D) takes the block's share of the gradient of the norm's weight.
    """
    D: tl.constexpr = 2 * HALF + TAIL
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, LANES)
    rest = tl.arange(0, TAIL_LANES)
    there = (row < rows)[:, None] & (lane < HALF)[None, :]
    tail_there = (row < rows)[:, None] & (rest < TAIL)[None, :]
    line = row.to(tl.int64)[:, None]
    source = dy_ptr + line * dy_token + head.to(tl.int64) * dy_head
    dy1 = tl.load(source + lane[None, :], mask=there, other=0.0).to(tl.float32)
    dy2 = tl.load(source + HALF + lane[None, :], mask=there, other=0.0).to(tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL_LANES), tl.float32)
    if TAIL > 0:
        tail += tl.load(source + 2 * HALF + rest[None, :], mask=tail_there, other=0.0).to(tl.float32)
    if TURN:
        at = line * COS_WIDTH + lane[None, :]
        cos = tl.load(cos_ptr + at, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=there, other=0.0).to(tl.float32)
        dx1 = dy1 * cos + dy2 * sin
        dx2 = dy2 * cos - dy1 * sin
    else:
        dx1 = dy1
        dx2 = dy2
    first = head * D + lane[None, :]
    third = head * D + 2 * HALF + rest[None, :]
    if NORM:
        at = line * x_stride
        x1 = tl.load(x_ptr + at + first, mask=there, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at + first + HALF, mask=there, other=0.0).to(tl.float32)
        x3 = tl.zeros((BLOCK_M, TAIL_LANES), tl.float32)
        if TAIL > 0:
            x3 += tl.load(x_ptr + at + third, mask=tail_there, other=0.0).to(tl.float32)
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        x1 *= rstd
        x2 *= rstd
        x3 *= rstd
        if WITH_DW:
            shares = dw_ptr + tl.program_id(1).to(tl.int64) * dw_stride + head * D
            share = _weight_share(dx1, x1, x_ptr.dtype.element_ty, CAST_FIRST)
            tl.store(shares + lane, share, mask=lane < HALF)
            share = _weight_share(dx2, x2, x_ptr.dtype.element_ty, CAST_FIRST)
            tl.store(shares + HALF + lane, share, mask=lane < HALF)
            if TAIL > 0:
                share = _weight_share(tail, x3, x_ptr.dtype.element_ty, CAST_FIRST)
                tl.store(shares + 2 * HALF + rest, share, mask=rest < TAIL)
        dx1 *= (tl.load(w_ptr + lane, mask=lane < HALF, other=0.0).to(tl.float32) + offset)[None, :]
        dx2 *= (tl.load(w_ptr + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32) + offset)[None, :]
        tail *= (tl.load(w_ptr + 2 * HALF + rest, mask=rest < TAIL, other=0.0).to(tl.float32) + offset)[
            None, :
        ]
        along = tl.sum(dx1 * x1, axis=1) + tl.sum(dx2 * x2, axis=1) + tl.sum(tail * x3, axis=1)
        along = (along / D)[:, None]
        dx1 = rstd * (dx1 - x1 * along)
        dx2 = rstd * (dx2 - x2 * along)
        tail = rstd * (tail - x3 * along)
    element = dx_ptr.dtype.element_ty
    target = dx_ptr + line * dx_stride
    tl.store(target + first, dx1.to(element), mask=there)
    tl.store(target + first + HALF, dx2.to(element), mask=there)
    if TAIL > 0:
        tl.store(target + third, tail.to(element), mask=tail_there)


@jit
def _rotate_back_kernel(
    dy_ptr, dy_token, dy_head, dx_ptr, dx_stride, rows, cos_ptr, sin_ptr,
    x_ptr, x_stride, w_ptr, eps, offset,
    TURN: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, TAIL: tl.constexpr,
    TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    turn_head_back(
        dy_ptr, dy_token, dy_head, dx_ptr, dx_stride, tl.program_id(0), rows, cos_ptr, sin_ptr,
        x_ptr, x_stride, w_ptr, eps, offset, dx_ptr, 0,
        TURN, NORM, False, False, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
    )  # fmt: skip


def head_shape(head_dim: int, rotary: Rotary | None) -> dict[str, int]:
    """The constants of a head's kernels: how it is cut, R / 2 pairs and the rest; rows of a block, warps."""
    width = head_dim if rotary is None else rotary.width
    half, tail = width // 2, head_dim - width
    return {
        "HALF": half,
        "LANES": max(16, 1 << (half - 1).bit_length()),
        "TAIL": tail,
        "TAIL_LANES": max(16, 1 << (tail - 1).bit_length()) if tail else 16,
        "COS_WIDTH": 0 if rotary is None else rotary.cos.shape[-1],
        "BLOCK_M": BLOCK_M,
        "num_warps": _WARPS,
    }


def rotate_(
    x: Tensor,
    head_dim: int,
    rotary: Rotary | None,
    bias: Tensor | None = None,
    norm: RMSNorm | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add a bias to a projection's product, normalise its heads and turn them.

    Args:
        x: (T, heads * D), stride 1 along the last dim; changed: it holds the result, or with ``norm`` the sum.
        head_dim: D.
        rotary: what turns; None turns nothing (v).
        bias: (heads * D,) or None.
        norm: the heads' norm, or None.
        out: (T, heads * D), stride 1 along the last dim, for the result; needed with ``norm``.

    Returns:
        the result.
    """
    if not runs_triton(x):
        return rope_eager.forward(x, head_dim, rotary, bias, norm, out)
    rows, cols = x.shape
    y = x if out is None else out
    turn = (x, x) if rotary is None else rotary[:2]
    weight, eps, offset, cast_first = (x, 0.0, 0.0, True) if norm is None else norm
    _rotate_kernel[(cols // head_dim, -(-rows // BLOCK_M))](
        x, x.stride(0), y, y.stride(0), rows, *turn, x if bias is None else bias, weight, eps, offset,
        TURN=rotary is not None, BIAS=bias is not None, NORM=norm is not None, CAST_FIRST=cast_first,
        **head_shape(head_dim, rotary),
    )  # fmt: skip
    return y


def rotate_back(
    dy: Tensor,
    rotary: Rotary | None,
    out: Tensor,
    norm: RMSNorm | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """The gradient before the turn and the norm.

    Args:
        dy: (T, heads, D), any strides.
        rotary: as in ``rotate_``.
        out: (T, heads * D), stride 1 along the last dim; written.
        norm: as in ``rotate_``.
        x: with ``norm``: what ``rotate_`` left in its x.

    Returns:
        out.
    """
    rows, heads, head_dim = dy.shape
    if not runs_triton(dy):
        return rope_eager.backward(dy, rotary, out, norm, x)
    if dy.stride(2) != 1:
        dy = dy.contiguous()
    turn = (dy, dy) if rotary is None else rotary[:2]
    weight, eps, offset, _ = (dy, 0.0, 0.0, True) if norm is None else norm
    raw = dy if x is None else x
    _rotate_back_kernel[(heads, -(-rows // BLOCK_M))](
        dy, dy.stride(0), dy.stride(1), out, out.stride(0), rows, *turn,
        raw, raw.stride(0), weight, eps, offset,
        TURN=rotary is not None, NORM=norm is not None, **head_shape(head_dim, rotary),
    )  # fmt: skip
    return out


@torch.library.custom_op("pantheraml::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, width: int, head_dim: int, bias: Tensor | None) -> Tensor:
    with launching_on(x):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return rotate_(x, head_dim, Rotary(cos, sin, width), bias, out=out)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, width: int, head_dim: int, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("pantheraml::rotate_backward", mutates_args=())
def _rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor, width: int, head_dim: int) -> Tensor:
    out = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    with launching_on(dy):
        return rotate_back(dy.unflatten(1, (-1, head_dim)), Rotary(cos, sin, width), out)


@_rotate_backward.register_fake
def _(dy: Tensor, cos: Tensor, sin: Tensor, width: int, head_dim: int) -> Tensor:
    return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, ctx.width, ctx.head_dim, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dy: Tensor):
    dx = _rotate_backward(dy, *ctx.saved_tensors, ctx.width, ctx.head_dim)
    db = dx.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return dx, None, None, None, None, db


_rotate.register_autograd(_differentiate, setup_context=_keep)


def rotate(x: Tensor, head_dim: int, rotary: Rotary, bias: Tensor | None = None) -> Tensor:
    """``rotate_`` into a tensor of its own, as one differentiable operation; a head norm is ``rms_norm`` before it.

    Args:
        x: (T, heads * D), any floating dtype.
        head_dim: D.
        rotary: what turns; it gets no gradient.
        bias: (heads * D,) or None.

    Returns:
        Like x, contiguous.
    """
    rows = x if x.stride(1) == 1 else x.contiguous()
    return _rotate(rows, rotary.cos.contiguous(), rotary.sin.contiguous(), rotary.width, head_dim, bias)
