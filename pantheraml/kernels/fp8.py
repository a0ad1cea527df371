"""Rows quantised to FP8 (e4m3), each with a scale of its own.

Shapes: x (T, K), its values q (T, K) in e4m3 and scales (T, 1) float32; optional factors f (K,) of the columns.

    x'      = x * f
    scale_t = max|x'_t| / 448                      448 is the largest e4m3 number
    q_t     = round(x'_t / scale_t)                to the nearest, never past 448

A row of zeros gives zeros. A row that holds NaN or infinity gives NaN all along the row, and no other row is touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, tl, triton

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# Rows of a smaller magnitude are quantised as if it were this one: its inverse times 448 stays within float32.
SMALLEST = 2.0**-100
# The widest row that one program holds.
MAX_COLUMNS = 65536
# What the second part of a split factor is multiplied by: e4m3 rounds to 1/16, so the rest comes back to full range.
STEP = 16.0
# The largest number of a split factor; half of what fits, so that no rounding reaches past it.
REACH = 224.0
# Columns that a warp holds in registers.
_PER_WARP = 1024


class Fp8Rows(NamedTuple):
    """Rows in e4m3: ``values * scales``.

    Attributes:
        values: (T, K) e4m3, contiguous.
        scales: (T, 1) float32.
    """

    values: Tensor
    scales: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(T, K) in ``dtype``."""
        return (self.values.float() * self.scales).to(dtype)


@jit
def magnitude(x):
    """The largest magnitude of a row, infinite if one of its numbers is none."""
    size = tl.abs(x)
    return tl.max(tl.where(size <= 3.4028234663852886e38, size, float("inf")), axis=0)


@jit
def scaled(x, amax):
    """Columns of one row as multiples of its scale, -448 to 448; those of a row that is not finite as zeros."""
    x = tl.where(amax < float("inf"), x, 0.0) * (448.0 / tl.maximum(amax, 7.888609052210118e-31))
    return tl.minimum(tl.maximum(x, -448.0), 448.0)


@jit
def nearest_e4m3(x):
    """x, at most 448 in magnitude, rounded to e4m3, still in float32.

    By arithmetic, because values converted to e4m3 and back within a kernel came out wrong for some layouts (Triton
    3.6, sm_90): the number is scaled so that its last place is 1, and rounded by adding 1.5 * 2^23.
    """
    exponent = tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -6) - 3
    unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return (x * inverse + 12582912.0 - 12582912.0) * unit


@jit
def store_scale(amax, scale_ptr):
    """What the row's values are multiplied by; NaN for a row that is not finite."""
    scale = tl.maximum(amax, 7.888609052210118e-31) / 448.0
    tl.store(scale_ptr, tl.where(amax < float("inf"), scale, float("nan")))


@jit
def store_margin(m, amax, out_ptr, cols, BLOCK: tl.constexpr):
    """A margin's columns of one row, in their three parts."""
    at = tl.arange(0, BLOCK)
    element = out_ptr.dtype.element_ty
    m = scaled(m, amax)
    hi = nearest_e4m3(m)
    lo = (m - hi) * 16.0
    tl.store(out_ptr + at, hi.to(element), mask=at < cols)
    tl.store(out_ptr + cols + at, (m * 0.0625).to(element), mask=at < cols)
    tl.store(out_ptr + 2 * cols + at, lo.to(element), mask=at < cols)


@jit
def _quantise_kernel(
    x_ptr, x_stride, by_ptr, m_ptr, m_stride, largest_ptr, out_ptr, scale_ptr, cols, m_cols, least,
    SCALED: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(by_ptr + col, mask=col < cols, other=0.0)
    amax = magnitude(x)
    out_ptr += row * (cols + 3 * m_cols)
    if MARGIN:
        at = tl.arange(0, BLOCK_M)
        m = tl.load(m_ptr + row * m_stride + at, mask=at < m_cols, other=0.0).to(tl.float32)
        m = m * (tl.maximum(tl.load(largest_ptr), least) / 224.0)
        amax = tl.maximum(amax, magnitude(m))
        store_margin(m, amax, out_ptr + cols, m_cols, BLOCK_M)
    store_scale(amax, scale_ptr + row)
    tl.store(out_ptr + col, scaled(x, amax).to(out_ptr.dtype.element_ty), mask=col < cols)


class Margin(NamedTuple):
    """Columns m that follow those of x as ``[hi | m / 16 | lo]``, for a product with a ``split_factor``.

    hi is m rounded, and lo 16 times what the rounding left.

    Attributes:
        values: (T, E).
        largest: (1,) float32 on the device, and
        least: the values are multiplied by ``max(largest, least) / 224``.
    """

    values: Tensor
    largest: Tensor
    least: float


def padded(cols: int) -> int:
    """The lanes that hold ``cols`` columns."""
    return max(16, 1 << (cols - 1).bit_length())


def triton_quantise(x: Tensor, by: Tensor | None, margin: Margin | None, out: Tensor, scales: Tensor) -> None:
    """Fill ``out`` and ``scales`` by Triton; arguments as ``quantise_rows``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    extra = x if margin is None else margin.values
    extra = extra if extra.stride(1) == 1 else extra.contiguous()
    block = padded(x.shape[1])
    _quantise_kernel[(x.shape[0],)](
        x, x.stride(0), scales if by is None else by, extra, extra.stride(0),
        scales if margin is None else margin.largest, out, scales, x.shape[1],
        0 if margin is None else extra.shape[1], 1.0 if margin is None else margin.least,
        SCALED=by is not None, MARGIN=margin is not None, BLOCK=block,
        BLOCK_M=16 if margin is None else padded(extra.shape[1]), num_warps=min(32, max(1, block // _PER_WARP)),
    )  # fmt: skip


def _eager_quantise(x: Tensor, by: Tensor | None, margin: Margin | None, out: Tensor, scales: Tensor) -> None:
    """The same in plain PyTorch."""
    x, cols = x.float() if by is None else x.float() * by, x.shape[1]
    if margin is not None:
        x = torch.cat([x, margin.values.float() * (margin.largest.clamp(min=margin.least) / REACH)], dim=1)
    amax = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1, keepdim=True)
    finite = amax < torch.inf
    bounded = amax.clamp(min=SMALLEST)
    q = (torch.where(finite, x, 0.0) * (LARGEST / bounded)).clamp(-LARGEST, LARGEST)
    if margin is not None:
        m = q[:, cols:]
        hi = m.to(DTYPE).float()
        q = torch.cat([q[:, :cols], hi, m / STEP, (m - hi) * STEP], dim=1)
    out.copy_(q.to(out.dtype))
    scales.copy_(torch.where(finite, bounded / LARGEST, torch.nan))


def quantise_rows(x: Tensor, by: Tensor | None = None, margin: Margin | None = None) -> Fp8Rows:
    """Rows in e4m3, each with the scale of its largest magnitude; one pass.

    Args:
        x: (T, K), any floating dtype; rows may lie apart.
        by: (K,) float32 that the columns are multiplied by first, or None.
        margin: further columns under the same scale, or None.

    Returns:
        (T, K), or (T, K + 3 E) with a margin.
    """
    width = x.shape[1] + (0 if margin is None else 3 * margin.values.shape[1])
    out = torch.empty(x.shape[0], width, dtype=DTYPE, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return Fp8Rows(out, scales.fill_(SMALLEST / LARGEST))
    fits = x.is_cuda and triton is not None and x.shape[1] <= MAX_COLUMNS
    with torch.no_grad():
        (triton_quantise if fits else _eager_quantise)(x, by, margin, out, scales)
    return Fp8Rows(out, scales)


@torch.library.custom_op("pantheraml::fp8_quantise_rows", mutates_args=())
def _quantise_rows(
    x: Tensor, by: Tensor | None, margin: Tensor | None, largest: Tensor | None, least: float
) -> tuple[Tensor, Tensor]:
    extra = None if margin is None or largest is None else Margin(margin, largest, least)
    with launching_on(x):
        rows = quantise_rows(x, by, extra)
    return rows.values, rows.scales


@_quantise_rows.register_fake
def _(
    x: Tensor, by: Tensor | None, margin: Tensor | None, largest: Tensor | None, least: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[1] + (0 if margin is None else 3 * margin.shape[1])
    values = torch.empty(x.shape[0], width, dtype=DTYPE, device=x.device)
    return values, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
