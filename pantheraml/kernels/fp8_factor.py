"""A factor of LoRA as e4m3 matrices side by side, so that it rides along in an FP8 product almost unrounded.

    largest = max|source / by|                    source (N, E), by (N,) or 1
    gain = max(largest, least) / 224
    v    = source / by / gain
    hi   = round(v)
    lo   = round((v - hi) * 16)                   what e4m3's 3 bits of mantissa left, brought back to full range
    target = [hi | lo | hi / 16]                  (N, 3 E), rows may lie apart

A product with ``gain m`` as ``[hi' | gain m / 16 | lo']`` (``quantise_rows(margin=...)``) then gives
``m (source / by)^T`` with both rounded to 2^-8 of themselves, as in bfloat16: ``hi' hi + m lo / 16 + lo' hi / 16``. The
gain is found on the device and never waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.fp8 import DTYPE, REACH, STEP, nearest_e4m3
from pantheraml.kernels.launch import jit, launching_on, tl, triton

_TILE = {"BLOCK_N": 32, "BLOCK_E": 32, "num_warps": 4}


@jit
def _load_ratio(
    source_ptr, by_ptr, row, col, rows, cols, stride_row, stride_col, SCALED: tl.constexpr,
):  # fmt: skip
    there = (row < rows)[:, None] & (col < cols)[None, :]
    at = source_ptr + row.to(tl.int64)[:, None] * stride_row + col.to(tl.int64)[None, :] * stride_col
    ratio = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        ratio = ratio / tl.load(by_ptr + row, mask=row < rows, other=1.0)[:, None]
    return ratio


@jit
def _largest_kernel(
    source_ptr, by_ptr, largest_ptr, rows, cols, stride_row, stride_col,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ratio = _load_ratio(source_ptr, by_ptr, row, col, rows, cols, stride_row, stride_col, SCALED)
    tl.atomic_max(largest_ptr, tl.max(tl.max(tl.abs(ratio), axis=1), axis=0))


@jit
def _split_kernel(
    source_ptr, by_ptr, largest_ptr, target_ptr, rows, cols, stride_row, stride_col, target_stride, least,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    v = _load_ratio(source_ptr, by_ptr, row, col, rows, cols, stride_row, stride_col, SCALED)
    v = v / (tl.maximum(tl.load(largest_ptr), least) / 224.0)
    element = target_ptr.dtype.element_ty
    hi = nearest_e4m3(v)
    lo = (v - hi) * 16.0
    there = (row < rows)[:, None] & (col < cols)[None, :]
    at = target_ptr + row.to(tl.int64)[:, None] * target_stride + col[None, :]
    tl.store(at, hi.to(element), mask=there)
    tl.store(at + cols, lo.to(element), mask=there)
    tl.store(at + 2 * cols, (hi * 0.0625).to(element), mask=there)


class Factor(NamedTuple):
    """What is split.

    Attributes:
        source: (N, E), any floating dtype and strides.
        by: (N,) float32 that its rows are divided by, or None.
        least: the gain never falls below ``least / 224``, so that what it multiplies keeps its range.
    """

    source: Tensor
    by: Tensor | None
    least: float


def triton_split(factor: Factor, largest: Tensor, target: Tensor) -> None:
    """Fill ``largest``, which holds zero, and ``target`` by Triton."""
    source, by, least = factor
    rows, cols = source.shape
    grid = (-(-rows // _TILE["BLOCK_N"]), -(-cols // _TILE["BLOCK_E"]))
    given = (source, source if by is None else by, largest)
    _largest_kernel[grid](*given, rows, cols, *source.stride(), SCALED=by is not None, **_TILE)
    _split_kernel[grid](
        *given, target, rows, cols, *source.stride(), target.stride(0), least, SCALED=by is not None, **_TILE
    )


def _eager_split(factor: Factor, largest: Tensor, target: Tensor) -> None:
    ratio = factor.source.float()
    if factor.by is not None:
        ratio = ratio / factor.by[:, None]
    largest.copy_(ratio.abs().nan_to_num(nan=0.0, posinf=torch.inf).max().view(1))
    v = ratio / (largest.clamp(min=factor.least) / REACH)
    hi = v.to(DTYPE).float()
    target.copy_(torch.cat([hi, (v - hi) * STEP, hi / STEP], dim=1).to(target.dtype))


@torch.library.custom_op("pantheraml::fp8_split_factor", mutates_args=("target",))
def _split_factor(source: Tensor, by: Tensor | None, least: float, target: Tensor) -> Tensor:
    """``target`` as bytes: torch's checks of operators do arithmetic on what they are given."""
    with launching_on(source):
        return split_factor(Factor(source, by, least), target.view(DTYPE))


@_split_factor.register_fake
def _(source: Tensor, by: Tensor | None, least: float, target: Tensor) -> Tensor:
    return torch.empty(1, dtype=torch.float32, device=source.device)


def split_factor(factor: Factor, target: Tensor) -> Tensor:
    """Write the factor to ``target`` (N, 3 E) e4m3, stride 1 along a row.

    Returns:
        ``largest``, (1,) float32, for the ``Margin`` that is multiplied with it.
    """
    source = factor.source
    assert target.dtype == DTYPE and target.shape == (source.shape[0], 3 * source.shape[1])
    largest = torch.zeros(1, dtype=torch.float32, device=source.device)
    with torch.no_grad():
        launch = triton_split if source.is_cuda and triton is not None else _eager_split
        launch(factor, largest, target)
    return largest
