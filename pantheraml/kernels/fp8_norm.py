"""RMSNorm whose output is quantised to FP8 by rows on the way out, in one pass.

Shapes: x (T, N), weight (N,). The formula of the norm is that of ``rms_norm``, the one of the rows that of ``fp8``:
the output is rounded to the dtype of x first, so that the rows are those of the norm's own output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.fp8 import (
    DTYPE,
    MAX_COLUMNS,
    Fp8Rows,
    magnitude,
    quantise_rows,
    scaled,
    store_scale,
)
from pantheraml.kernels.launch import jit, tl, triton
from pantheraml.kernels.rms_norm import rms_norm

Settings = tuple[float, float, bool]


@jit
def _norm_rows_kernel(
    x_ptr, w_ptr, h_ptr, out_ptr, scale_ptr, x_stride, cols, eps, offset,
    CAST_FIRST: tl.constexpr, KEEP_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    there = col < cols
    element = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + col, mask=there, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=there, other=0.0).to(tl.float32) + offset
    h = x * tl.rsqrt(tl.sum(x * x, axis=0) / cols + eps)
    if CAST_FIRST:
        h = h.to(element).to(tl.float32)
    rounded = tl.where(there, h * w, 0.0).to(element)
    if KEEP_H:
        tl.store(h_ptr + row * cols + col, rounded, mask=there)
    h = rounded.to(tl.float32)
    amax = magnitude(h)
    store_scale(amax, scale_ptr + row)
    tl.store(out_ptr + row * cols + col, scaled(h, amax).to(out_ptr.dtype.element_ty), mask=there)


def triton_norm_rows(
    x: Tensor, weight: Tensor, norm: Settings, out: Tensor, scales: Tensor, h: Tensor | None
) -> None:
    """Fill ``out``, ``scales`` and ``h`` by Triton."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    eps, offset, cast_first = norm
    block = 1 << (x.shape[1] - 1).bit_length()
    _norm_rows_kernel[(x.shape[0],)](
        x, weight, x if h is None else h, out, scales, x.stride(0), x.shape[1], eps, offset,
        CAST_FIRST=cast_first, KEEP_H=h is not None, BLOCK=block, num_warps=min(32, max(1, block // 512)),
    )  # fmt: skip


def norm_rows(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, keep_h: bool = False
) -> tuple[Fp8Rows, Tensor | None]:
    """The norm of x as FP8 rows, and as it is where it is needed too (LoRA's ``h A^T``).

    Args:
        x: (T, N), any floating dtype.
        weight: (N,), frozen.
        eps: of the norm.
        offset: added to the weight.
        cast_first: round the normalised x before the weight multiplies it.
        keep_h: also return the norm's output.

    Returns:
        The rows (T, N), and h (T, N) in the dtype of x or None.
    """
    with torch.no_grad():
        if x.device.type != "cuda" or triton is None or x.numel() == 0 or x.shape[1] > MAX_COLUMNS:
            h = rms_norm(x, weight, eps, offset, cast_first).to(x.dtype)
            return quantise_rows(h), h if keep_h else None
        out = torch.empty(x.shape, dtype=DTYPE, device=x.device)
        scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep_h else None
        triton_norm_rows(x, weight, (eps, offset, cast_first), out, scales, h)
    return Fp8Rows(out, scales), h


@torch.library.custom_op("pantheraml::fp8_norm_rows", mutates_args=())
def _norm_rows(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, h = norm_rows(x, weight, eps, offset, cast_first, keep_h=True)
    assert h is not None
    return rows.values, rows.scales, h


@_norm_rows.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return (
        torch.empty(x.shape, dtype=DTYPE, device=x.device),
        scales,
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
    )
