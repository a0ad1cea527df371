"""Rows quantised to FP8 (e4m3), each with a scale of its own.

Shapes: x (T, K), its values q (T, K) in e4m3 and scales (T, 1) float32; optional factors f (K,) of the columns.

    x'      = x * f
    scale_t = max|x'_t| / 448                      448 is the largest e4m3 number
    q_t     = round(x'_t / scale_t)                to the nearest, never past 448

A row of zeros gives zeros. A row that holds NaN or infinity gives NaN all along the row, and no other row is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, tl, triton

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# Rows of a smaller magnitude are quantised as if it were this one: its inverse times 448 stays within float32.
SMALLEST = 2.0**-100
# The widest row of parts that one program holds, after padding each part to a power of two.
MAX_COLUMNS = 65536
MAX_PARTS = 3


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
def _load_part(x_ptr, by_ptr, cols, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of one row in float32, zero past the end."""
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(by_ptr + col, mask=col < cols, other=0.0)
    return x


@jit
def store_part(x, amax, out_ptr, cols, BLOCK: tl.constexpr):
    """Columns of one row, scaled to their format; those of a row that is not finite as zeros."""
    col = tl.arange(0, BLOCK)
    x = tl.where(amax < float("inf"), x, 0.0) * (448.0 / tl.maximum(amax, 7.888609052210118e-31))
    q = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(out_ptr + col, q.to(out_ptr.dtype.element_ty), mask=col < cols)


@jit
def store_scale(amax, scale_ptr):
    """What the row's values are multiplied by; NaN for a row that is not finite."""
    scale = tl.maximum(amax, 7.888609052210118e-31) / 448.0
    tl.store(scale_ptr, tl.where(amax < float("inf"), scale, float("nan")))


@jit
def _quantise_kernel(
    x0_ptr, x1_ptr, x2_ptr, stride0, stride1, stride2, by0_ptr, by1_ptr, by2_ptr, out_ptr, scale_ptr, cols0, cols1,
    cols2, PARTS: tl.constexpr, SCALED: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr,
    BLOCK2: tl.constexpr,
):  # fmt: skip
    """One row a program: up to three parts that come to lie beside each other under one scale."""
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * (cols0 + cols1 + cols2)
    x0 = _load_part(x0_ptr + row * stride0, by0_ptr, cols0, SCALED, BLOCK0)
    amax = magnitude(x0)
    if PARTS > 1:
        x1 = _load_part(x1_ptr + row * stride1, by1_ptr, cols1, SCALED, BLOCK1)
        amax = tl.maximum(amax, magnitude(x1))
    if PARTS > 2:
        x2 = _load_part(x2_ptr + row * stride2, by2_ptr, cols2, SCALED, BLOCK2)
        amax = tl.maximum(amax, magnitude(x2))
    store_scale(amax, scale_ptr + row)
    store_part(x0, amax, out_ptr, cols0, BLOCK0)
    if PARTS > 1:
        store_part(x1, amax, out_ptr + cols0, cols1, BLOCK1)
    if PARTS > 2:
        store_part(x2, amax, out_ptr + cols0 + cols1, cols2, BLOCK2)


def _padded(cols: int) -> int:
    return max(16, 1 << (cols - 1).bit_length())


def triton_quantise(parts: Sequence[Tensor], by: Sequence[Tensor], out: Tensor, scales: Tensor) -> None:
    """Fill ``out`` and ``scales`` by Triton; arguments as ``quantise_rows``."""
    rows = parts[0].shape[0]
    count = len(parts)
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    stand_ins = [parts[0]] * (MAX_PARTS - count)
    cols = [part.shape[1] for part in parts] + [0] * len(stand_ins)
    blocks = [_padded(part.shape[1]) for part in parts] + [16] * len(stand_ins)
    factors = [*by, *([scales] * (MAX_PARTS - len(by)))]
    _quantise_kernel[(rows,)](
        *parts, *stand_ins, *[part.stride(0) for part in (*parts, *stand_ins)], *factors, out, scales, *cols,
        PARTS=count, SCALED=len(by) > 0, BLOCK0=blocks[0], BLOCK1=blocks[1], BLOCK2=blocks[2],
        num_warps=min(32, max(1, sum(blocks[:count]) // 1024)),
    )  # fmt: skip


def _eager_quantise(parts: Sequence[Tensor], by: Sequence[Tensor], out: Tensor, scales: Tensor) -> None:
    """The same in plain PyTorch."""
    scaled = [part.float() for part in parts]
    if len(by):
        scaled = [part * factor for part, factor in zip(scaled, by, strict=True)]
    x = torch.cat(scaled, dim=1)
    amax = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1, keepdim=True)
    finite = amax < torch.inf
    bounded = amax.clamp(min=SMALLEST)
    q = (x * (LARGEST / bounded)).clamp(-LARGEST, LARGEST)
    out.copy_(torch.where(finite, q, 0.0).to(out.dtype))
    scales.copy_(torch.where(finite, bounded / LARGEST, torch.nan))


def quantise_rows(parts: Tensor | Sequence[Tensor], by: Sequence[Tensor] = ()) -> Fp8Rows:
    """Rows in e4m3, each with the scale of its largest magnitude; one pass.

    Args:
        parts: (T, K), or up to three of different widths that come to lie beside each other in this order.
        by: what the columns of each part are multiplied by first, (K,) float32 each; none means as they are.

    Returns:
        (T, sum of the widths).
    """
    parts = [parts] if isinstance(parts, Tensor) else list(parts)
    rows, device = parts[0].shape[0], parts[0].device
    width = sum(part.shape[1] for part in parts)
    out = torch.empty(rows, width, dtype=DTYPE, device=device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return Fp8Rows(out, scales.fill_(SMALLEST / LARGEST))
    fits = sum(_padded(part.shape[1]) for part in parts) <= MAX_COLUMNS and len(parts) <= MAX_PARTS
    launch = triton_quantise if device.type == "cuda" and triton is not None and fits else _eager_quantise
    with torch.no_grad():
        launch(parts, by, out, scales)
    return Fp8Rows(out, scales)


@torch.library.custom_op("pantheraml::fp8_quantise_rows", mutates_args=())
def _quantise_rows(parts: list[Tensor], by: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = quantise_rows(parts, by)
    return rows.values, rows.scales


@_quantise_rows.register_fake
def _(parts: list[Tensor], by: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    values = torch.empty(rows, width, dtype=DTYPE, device=parts[0].device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=parts[0].device)
