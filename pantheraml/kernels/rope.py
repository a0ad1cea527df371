"""Rotary positions for the heads of q, k and v in one buffer, with bias and LoRA inside.

Shapes: x (T, H * D), the products of the projections side by side; cos, sin (T, D) as transformers makes them (both
halves alike); bias (H * D,); the LoRA addend ``scale * t B^T``.

Forward, per head, in place, in float32, rounded once (x1, x2 are the halves of a head):
    x  = x + bias + lora
    y1 = x1 cos1 - x2 sin1
    y2 = x2 cos2 + x1 sin2       heads of v are not turned

Backward turns the other way: dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, tl
from pantheraml.kernels.low_rank import LowRank, low_rank_tile, padded_rank

_BLOCKS = {"BLOCK_M": 64, "num_warps": 4}


@jit
def _rotate_kernel(
    x_ptr, x_stride, rows, cols, cos_ptr, sin_ptr, bias_ptr, t_ptr, t_stride, b_ptr, rank, scale,
    TURN: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, HALF)
    first = head * 2 * HALF + lane
    second = first + HALF
    line = row.to(tl.int64)[:, None]
    there = (row < rows)[:, None] & (lane < HALF)[None, :]
    x1 = tl.load(x_ptr + line * x_stride + first[None, :], mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + line * x_stride + second[None, :], mask=there, other=0.0).to(tl.float32)
    if BIAS:
        x1 += tl.load(bias_ptr + first).to(tl.float32)[None, :]
        x2 += tl.load(bias_ptr + second).to(tl.float32)[None, :]
    if LORA:
        x1 += low_rank_tile(t_ptr, t_stride, b_ptr, row, first, rows, cols, rank, scale, RANK)
        x2 += low_rank_tile(t_ptr, t_stride, b_ptr, row, second, rows, cols, rank, scale, RANK)
    if TURN:
        at = line * (2 * HALF) + lane[None, :]
        cos1 = tl.load(cos_ptr + at, mask=there, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + at, mask=there, other=0.0).to(tl.float32)
        cos2 = tl.load(cos_ptr + at + HALF, mask=there, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_ptr + at + HALF, mask=there, other=0.0).to(tl.float32)
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    else:
        y1 = x1
        y2 = x2
    element = x_ptr.dtype.element_ty
    tl.store(x_ptr + line * x_stride + first[None, :], y1.to(element), mask=there)
    tl.store(x_ptr + line * x_stride + second[None, :], y2.to(element), mask=there)


@jit
def _rotate_back_kernel(
    dy_ptr, dy_batch, dy_token, dy_head, dx_ptr, dx_stride, tokens, rows, cos_ptr, sin_ptr,
    TURN: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, HALF)
    there = (row < rows)[:, None] & (lane < HALF)[None, :]
    line = row.to(tl.int64)[:, None]
    source = (
        dy_ptr + (line // tokens) * dy_batch + (line % tokens) * dy_token + head * dy_head + lane[None, :]
    )
    dy1 = tl.load(source, mask=there, other=0.0).to(tl.float32)
    dy2 = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    if TURN:
        at = line * (2 * HALF) + lane[None, :]
        cos1 = tl.load(cos_ptr + at, mask=there, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + at, mask=there, other=0.0).to(tl.float32)
        cos2 = tl.load(cos_ptr + at + HALF, mask=there, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_ptr + at + HALF, mask=there, other=0.0).to(tl.float32)
        dx1 = dy1 * cos1 + dy2 * sin2
        dx2 = dy2 * cos2 - dy1 * sin1
    else:
        dx1 = dy1
        dx2 = dy2
    element = dx_ptr.dtype.element_ty
    target = dx_ptr + line * dx_stride + head * 2 * HALF + lane[None, :]
    tl.store(target, dx1.to(element), mask=there)
    tl.store(target + HALF, dx2.to(element), mask=there)


def rotate_(
    x: Tensor,
    head_dim: int,
    rotary: tuple[Tensor, Tensor] | None,
    bias: Tensor | None = None,
    lora: LowRank | None = None,
) -> Tensor:
    """Add bias and LoRA to a projection and turn its heads, in place.

    Args:
        x: (T, H * D), stride 1 along the last dim.
        head_dim: D, a power of two of at least 32 on a GPU.
        rotary: cos and sin, (T, D) contiguous; None only adds (v).
        bias: (H * D,) or None.
        lora: the addend, or None.

    Returns:
        x.
    """
    rows, cols = x.shape
    if x.device.type != "cuda":
        return _eager_forward(x, head_dim, rotary, bias, lora)
    cos, sin = rotary if rotary is not None else (x, x)
    t, b, scale = lora if lora is not None else (x, x, 0.0)
    rank = 0 if lora is None else lora.b.shape[1]
    _rotate_kernel[(cols // head_dim, -(-rows // _BLOCKS["BLOCK_M"]))](
        x, x.stride(0), rows, cols, cos, sin, x if bias is None else bias, t, t.stride(0), b, rank, scale,
        TURN=rotary is not None, BIAS=bias is not None, LORA=lora is not None,
        RANK=padded_rank(max(rank, 1)), HALF=head_dim // 2, **_BLOCKS,
    )  # fmt: skip
    return x


def rotate_back(dy: Tensor, rotary: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """The gradient before the turn.

    Args:
        dy: (B, H, S, D), any strides with stride 1 along D.
        rotary: as in ``rotate_``.
        out: (B * S, H * D), stride 1 along the last dim; written.

    Returns:
        out.
    """
    batch, heads, tokens, head_dim = dy.shape
    if dy.device.type != "cuda":
        return _eager_backward(dy, rotary, out)
    cos, sin = rotary if rotary is not None else (dy, dy)
    _rotate_back_kernel[(heads, -(-batch * tokens // _BLOCKS["BLOCK_M"]))](
        dy, dy.stride(0), dy.stride(2), dy.stride(1), out, out.stride(0), tokens, batch * tokens, cos, sin,
        TURN=rotary is not None, HALF=head_dim // 2, **_BLOCKS,
    )  # fmt: skip
    return out


def _eager_forward(
    x: Tensor, head_dim: int, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None, lora: LowRank | None
) -> Tensor:
    y = x.float()
    if bias is not None:
        y = y + bias.float()
    if lora is not None:
        y = y + lora.dense().float()
    if rotary is not None:
        y = y.view(x.shape[0], -1, head_dim)
        cos, sin = (part.float()[:, None] for part in rotary)
        y1, y2 = y.chunk(2, dim=-1)
        y = (y * cos + torch.cat((-y2, y1), dim=-1) * sin).flatten(1)
    return x.copy_(y)


def _eager_backward(dy: Tensor, rotary: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    dx = dy.transpose(1, 2).flatten(0, 1).float()  # (T, H, D)
    if rotary is not None:
        cos, sin = (part.float()[:, None] for part in rotary)
        turned = dx * sin
        first, second = turned.chunk(2, dim=-1)
        dx = dx * cos + torch.cat((second, -first), dim=-1)
    return out.copy_(dx.flatten(1))
