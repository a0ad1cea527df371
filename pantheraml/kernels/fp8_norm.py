"""RMSNorm whose output is quantised to FP8 by rows on the way out, and LoRA's ``t`` with it, in one pass.

Shapes: x (T, N), weight (N,), A (E, N), t (T, E). The formula of the norm is that of ``rms_norm``, the one of the rows
that of ``fp8``; the output is rounded to the dtype of x first, so that the rows are those of the norm's own output.

LoRA reads the norm's output too, but its ``t`` has to be known before a row gets its scale. The norm only stretches a
row after x met the weight, so ``t = h A^T = rstd * x (A w)^T``: the product is taken from x, and finished here. The
norm's output itself is never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.fp8 import (
    DTYPE,
    MAX_COLUMNS,
    Fp8Rows,
    Margin,
    magnitude,
    padded,
    quantise_rows,
    scaled,
    store_margin,
    store_scale,
)
from pantheraml.kernels.launch import jit, launching_on, tl, triton
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm


class NormRows(NamedTuple):
    """The norm's output as FP8 rows, (T, N) or (T, N + 3 E); t (T, E), and the output itself (T, N), if asked for."""

    rows: Fp8Rows
    t: Tensor | None
    h: Tensor | None


@jit
def _norm_rows_kernel(
    x_ptr, x_stride, w_ptr, m_ptr, m_stride, largest_ptr, h_ptr, t_ptr, out_ptr, scale_ptr, cols, m_cols, eps,
    offset, least, CAST_FIRST: tl.constexpr, KEEP_H: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    there = col < cols
    element = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + col, mask=there, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=there, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / cols + eps)
    h = x * rstd
    if CAST_FIRST:
        h = h.to(element).to(tl.float32)
    rounded = tl.where(there, h * w, 0.0).to(element)
    if KEEP_H:
        tl.store(h_ptr + row * cols + col, rounded, mask=there)
    h = rounded.to(tl.float32)
    amax = magnitude(h)
    out_ptr += row * (cols + 3 * m_cols)
    if MARGIN:
        at = tl.arange(0, BLOCK_M)
        t = tl.load(m_ptr + row * m_stride + at, mask=at < m_cols, other=0.0).to(tl.float32) * rstd
        t = t.to(element)
        tl.store(t_ptr + row * m_cols + at, t, mask=at < m_cols)
        m = t.to(tl.float32) * (tl.maximum(tl.load(largest_ptr), least) / 224.0)
        amax = tl.maximum(amax, magnitude(m))
        store_margin(m, amax, out_ptr + cols, m_cols, BLOCK_M)
    store_scale(amax, scale_ptr + row)
    tl.store(out_ptr + col, scaled(h, amax).to(out_ptr.dtype.element_ty), mask=there)


def triton_norm_rows(
    x: Tensor, norm: RMSNorm, raw: Margin | None, rows: Fp8Rows, t: Tensor | None, h: Tensor | None
) -> None:
    """Fill ``rows``, ``t`` and ``h`` by Triton."""
    x = x if x.stride(1) == 1 else x.contiguous()
    extra = x if raw is None else raw.values
    extra = extra if extra.stride(1) == 1 else extra.contiguous()
    block = padded(x.shape[1])
    _norm_rows_kernel[(x.shape[0],)](
        x, x.stride(0), norm.weight, extra, extra.stride(0), rows.scales if raw is None else raw.largest,
        x if h is None else h, x if t is None else t, *rows, x.shape[1], 0 if raw is None else extra.shape[1],
        norm.eps, norm.offset, 1.0 if raw is None else raw.least, CAST_FIRST=norm.cast_first,
        KEEP_H=h is not None, MARGIN=raw is not None, BLOCK=block,
        BLOCK_M=16 if raw is None else padded(extra.shape[1]), num_warps=min(32, max(1, block // 512)),
    )  # fmt: skip


def norm_rows(x: Tensor, norm: RMSNorm, raw: Margin | None = None, keep_h: bool = False) -> NormRows:
    """The norm of x as FP8 rows.

    Args:
        x: (T, N), any floating dtype.
        norm: frozen.
        raw: ``x (A w)^T`` (T, E), and what it is multiplied by before it is quantised; None without LoRA.
        keep_h: also return the norm's output.
    """
    width = x.shape[1] + (0 if raw is None else 3 * raw.values.shape[1])
    with torch.no_grad():
        if not x.is_cuda or triton is None or x.numel() == 0 or x.shape[1] > MAX_COLUMNS:
            return _eager_norm_rows(x, norm, raw, keep_h)
        out = torch.empty(x.shape[0], width, dtype=DTYPE, device=x.device)
        rows = Fp8Rows(out, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device))
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep_h else None
        t = None if raw is None else torch.empty(raw.values.shape, dtype=x.dtype, device=x.device)
        triton_norm_rows(x, norm, raw, rows, t, h)
    return NormRows(rows, t, h)


def _eager_norm_rows(x: Tensor, norm: RMSNorm, raw: Margin | None, keep_h: bool) -> NormRows:
    h = rms_norm(x, *norm).to(x.dtype)
    t = margin = None
    if raw is not None:
        rstd = torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + norm.eps)
        t = (raw.values.float() * rstd).to(x.dtype)
        margin = Margin(t, raw.largest, raw.least)
    return NormRows(quantise_rows(h, None, margin), t, h if keep_h else None)


@torch.library.custom_op("pantheraml::fp8_norm_rows", mutates_args=())
def _norm_rows(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with launching_on(x):
        found = norm_rows(x, RMSNorm(weight, eps, offset, cast_first), keep_h=True)
    assert found.h is not None
    return found.rows.values, found.rows.scales, found.h


@_norm_rows.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=DTYPE, device=x.device), scales, h
