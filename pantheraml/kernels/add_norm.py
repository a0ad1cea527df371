"""Residual add with LoRA inside, and the RMSNorm that follows; and the norm's backward with both gradients in it.

Shapes: x, y, s, h (T, N); weight (N,); the LoRA addend of y is ``scale * t B^T``.

Forward, in float32, s and h each rounded once:
    s = x + y + lora
    h = s / rms(s) * (offset + weight)

Backward of ``h`` with respect to s, given dh (T, N) and the gradient ds that comes by the residual:
    g  = dh * (offset + weight)
    dx = ds + rstd * (g - s_hat * mean(g * s_hat))
    h  is recomputed on the way when asked for, because the gradient of LoRA's A needs it

In the forward a row does not fit into registers beside the factors of LoRA, so each program walks twice over the
columns of a few rows; the second walk reads what the first one left in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, tl
from pantheraml.kernels.low_rank import LowRank, low_rank_tile, padded_rank

_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 4}


@jit
def _add_norm_kernel(
    x_ptr, y_ptr, s_ptr, h_ptr, w_ptr, rows, cols, eps, offset, t_ptr, t_stride, b_ptr, rank, scale,
    NORM: tl.constexpr, CAST_FIRST: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    line = row.to(tl.int64)[:, None] * cols
    element = s_ptr.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        s = tl.load(x_ptr + line + col[None, :], mask=there, other=0.0).to(tl.float32)
        s += tl.load(y_ptr + line + col[None, :], mask=there, other=0.0).to(tl.float32)
        if LORA:
            s += low_rank_tile(t_ptr, t_stride, b_ptr, row, col, rows, cols, rank, scale, RANK)
        rounded = tl.where(there, s, 0.0).to(element)
        tl.store(s_ptr + line + col[None, :], rounded, mask=there)
        squares += tl.sum(rounded.to(tl.float32) * rounded.to(tl.float32), axis=1)
    if NORM:
        rstd = tl.rsqrt(squares / cols + eps)
        tl.debug_barrier()
        for start in range(0, cols, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            there = (row < rows)[:, None] & (col < cols)[None, :]
            s_hat = tl.load(s_ptr + line + col[None, :], mask=there, other=0.0).to(tl.float32) * rstd[:, None]
            if CAST_FIRST:
                s_hat = s_hat.to(element).to(tl.float32)
            w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
            tl.store(h_ptr + line + col[None, :], (s_hat * w[None, :]).to(element), mask=there)


@jit
def _norm_backward_kernel(
    dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, w_ptr, rows, cols, eps, offset,
    RESIDUAL: tl.constexpr, KEEP_H: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    there = col < cols
    at = row * cols + col
    element = dx_ptr.dtype.element_ty
    s = tl.load(s_ptr + at, mask=there, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=there, other=0.0).to(tl.float32) + offset
    g = tl.load(dh_ptr + at, mask=there, other=0.0).to(tl.float32) * w
    rstd = tl.rsqrt(tl.sum(s * s, axis=0) / cols + eps)
    s_hat = s * rstd
    dx = rstd * (g - s_hat * (tl.sum(g * s_hat, axis=0) / cols))
    if RESIDUAL:
        dx += tl.load(ds_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(element), mask=there)
    if KEEP_H:
        if CAST_FIRST:
            s_hat = s_hat.to(element).to(tl.float32)
        tl.store(h_ptr + at, (s_hat * w).to(element), mask=there)


def _lora_arguments(lora: LowRank | None, stand_in: Tensor) -> tuple[tuple, dict]:
    if lora is None:
        return (stand_in, 0, stand_in, 0, 0.0), {"LORA": False, "RANK": 16}
    rank = lora.b.shape[1]
    return (lora.t, lora.t.stride(0), lora.b, rank, lora.scale), {"LORA": True, "RANK": padded_rank(rank)}


def add_norm(
    x: Tensor,
    y: Tensor,
    lora: LowRank | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """``s = x + y + lora`` and its norm.

    Args:
        x: (T, N), contiguous: the residual.
        y: (T, N), contiguous: what is added.
        lora: the addend of y, or None.
        weight: (N,) of the norm; None only adds.
        eps: of the norm.
        offset: added to the weight.
        cast_first: round the normalised s before the weight multiplies it.

    Returns:
        s and h, (T, N) each in the dtype of x; h is s itself without a weight.
    """
    if x.device.type != "cuda":
        return _eager_add(x, y, lora, weight, eps, offset, cast_first)
    s = torch.empty_like(x)
    h = torch.empty_like(x) if weight is not None else s
    rows, cols = x.shape
    arguments, flags = _lora_arguments(lora, x)
    _add_norm_kernel[(-(-rows // _BLOCKS["BLOCK_M"]),)](
        x, y, s, h, x if weight is None else weight, rows, cols, eps, offset, *arguments,
        NORM=weight is not None, CAST_FIRST=cast_first, **flags, **_BLOCKS,
    )  # fmt: skip
    return s, h


def norm_backward(
    dh: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, norm: tuple[float, float, bool], keep_h: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the norm's input, with the residual's gradient added.

    Args:
        dh: (T, N), contiguous: gradient of the norm's output.
        ds: (T, N), contiguous: gradient that comes by the residual, or None.
        s: (T, N), contiguous: the norm's input.
        weight: (N,).
        norm: eps, offset and cast_first of the norm.
        keep_h: also return the norm's output.

    Returns:
        dx (T, N), and h (T, N) or None.
    """
    if dh.device.type != "cuda":
        return _eager_backward(dh, ds, s, weight, norm, keep_h)
    dx = torch.empty_like(s)
    h = torch.empty_like(s) if keep_h else None
    rows, cols = s.shape
    eps, offset, cast_first = norm
    block = 1 << (cols - 1).bit_length()
    _norm_backward_kernel[(rows,)](
        dh, dh if ds is None else ds, s, dx, dx if h is None else h, weight, rows, cols, eps, offset,
        RESIDUAL=ds is not None, KEEP_H=keep_h, CAST_FIRST=cast_first, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return dx, h


def _eager_norm(s: Tensor, weight: Tensor, norm: tuple[float, float, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """rstd, s_hat (float32) and h (dtype of s)."""
    eps, offset, cast_first = norm
    s32 = s.float()
    rstd = torch.rsqrt(s32.pow(2).mean(-1, keepdim=True) + eps)
    s_hat = s32 * rstd
    scaled = (s_hat.to(s.dtype).float() if cast_first else s_hat) * (weight.float() + offset)
    return rstd, s_hat, scaled.to(s.dtype)


def _eager_add(
    x: Tensor,
    y: Tensor,
    lora: LowRank | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    s = x.float() + y.float()
    if lora is not None:
        s = s + lora.dense().float()
    s = s.to(x.dtype)
    return (s, s) if weight is None else (s, _eager_norm(s, weight, (eps, offset, cast_first))[2])


def _eager_backward(
    dh: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, norm: tuple[float, float, bool], keep_h: bool
) -> tuple[Tensor, Tensor | None]:
    g = dh.float() * (weight.float() + norm[1])
    rstd, s_hat, h = _eager_norm(s, weight, norm)
    dx = rstd * (g - s_hat * (g * s_hat).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.float()
    return dx.to(s.dtype), h if keep_h else None
