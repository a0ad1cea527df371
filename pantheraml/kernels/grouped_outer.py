"""Sums of outer products per expert: the gradients of an expert's matrices.

    D[e] = sum over the rows i of expert e of  left[l[i]]^T right[r[i]]

Shapes: left (P, M) and right (Q, N) with any strides; l and r (S,) name the row behind each sorted row, or are left
out (P = S, Q = S); D (E, M, N), any strides. An expert without rows gets zeros.

Each tile of D is one program's, which adds up its expert's rows in float32 and in their order: no atomics, the same
bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.expert_groups import Groups
from pantheraml.kernels.launch import jit, tl, triton

# Side of a tile, rows read at a time, warps, stages: where both sides are wide (a weight's gradient) or one is a rank.
WIDE_TILE = (128, 64, 8, 4)
THIN_TILE = (128, 64, 4, 4)
FLOAT32_TILE = (32, 32, 4, 2)


@jit
def _outer_kernel(
    left_ptr, right_ptr, l_ptr, r_ptr, d_ptr, ends_ptr, height, width, left_sr, left_sc, right_sr, right_sc,
    d_se, d_sm, d_sn,
    L_INDEXED: tl.constexpr, R_INDEXED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    across = tl.cdiv(width, BLOCK_N)
    m = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_m, real_n = (m % height).to(tl.int64), (n % width).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        there = row < end
        left_row = row.to(tl.int64)
        right_row = left_row
        if L_INDEXED:
            left_row = tl.load(l_ptr + left_row, mask=there, other=0).to(tl.int64)
        if R_INDEXED:
            right_row = tl.load(r_ptr + right_row, mask=there, other=0).to(tl.int64)
        left = tl.load(
            left_ptr + left_row[None, :] * left_sr + real_m[:, None] * left_sc, mask=there[None, :], other=0.0
        )
        right = tl.load(
            right_ptr + right_row[:, None] * right_sr + real_n[None, :] * right_sc,
            mask=there[:, None],
            other=0.0,
        )
        if left_ptr.dtype.element_ty == tl.float32:
            # Summed in blocks, which rounds less; a bare sum would be folded into the product's own.
            acc += tl.where(first < end, tl.dot(left, right, input_precision="ieee"), 0.0)
        else:
            acc = tl.dot(left, right, acc)
    at = d_ptr + expert.to(tl.int64) * d_se + m.to(tl.int64)[:, None] * d_sm + n.to(tl.int64)[None, :] * d_sn
    there = (m < height)[:, None] & (n < width)[None, :]
    tl.store(at, acc.to(d_ptr.dtype.element_ty), mask=there)


def tile_of(height: int, width: int, dtype: torch.dtype, gathered: bool) -> dict[str, int]:
    """Tile shape, warps and stages for D of ``height`` x ``width``; ``gathered`` rows are found through an index."""
    if dtype == torch.float32:
        side, deep, warps, stages = FLOAT32_TILE
    else:
        side, deep, warps, stages = THIN_TILE if min(height, width) <= 64 else WIDE_TILE
    if gathered:  # each read waits for the one of its index, so that half of the stages hold data
        stages = 2 * stages - 1
    tall, wide = (min(side, max(16, 1 << (size - 1).bit_length())) for size in (height, width))
    return {"BLOCK_M": tall, "BLOCK_N": wide, "BLOCK_K": deep, "num_warps": warps, "num_stages": stages}


def triton_outer(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    out: Tensor,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
) -> Tensor:
    """Our kernel; arguments as ``outer_into``, with ``ends`` of its groups."""
    experts, height, width = out.shape
    tile = tile_of(height, width, left.dtype, left_rows is not None or right_rows is not None)
    grid = (-(-height // tile["BLOCK_M"]) * -(-width // tile["BLOCK_N"]), experts)
    _outer_kernel[grid](
        left, right, left if left_rows is None else left_rows, right if right_rows is None else right_rows, out, ends,
        height, width, *left.stride(), *right.stride(), *out.stride(),
        L_INDEXED=left_rows is not None, R_INDEXED=right_rows is not None, **tile,
    )  # fmt: skip
    return out


def outer_into(
    left: Tensor,
    right: Tensor,
    groups: Groups,
    out: Tensor,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
) -> Tensor:
    """Write ``sum of left^T right`` of each expert to ``out``.

    Args:
        left: (P, M).
        right: (Q, N), in the dtype of left.
        groups: whose rows are whose.
        out: (E, M, N), float32 or the dtype of a weight (rounded once), any strides.
        left_rows: (S,), the row of left behind each sorted row, or None (P = S).
        right_rows: (S,), likewise.

    Returns:
        ``out``.
    """
    if left.device.type == "cuda" and triton is not None:
        with torch.cuda.device(left.device):
            return triton_outer(left, right, groups.ends, out, left_rows, right_rows)
    left = left if left_rows is None else left.index_select(0, left_rows)
    right = right if right_rows is None else right.index_select(0, right_rows)
    for expert, (start, end) in enumerate(groups.spans()):
        out[expert] = (left[start:end].T.float() @ right[start:end].float()).to(out.dtype)
    return out


@torch.library.custom_op("pantheraml::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    shape = (ends.shape[0], left.shape[1], right.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=left.device)
    return outer_into(left, right, Groups(ends, left.shape[0]), out)


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    shape = (ends.shape[0], left.shape[1], right.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=left.device)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``sum of left[i]^T right[i]`` over the rows i of each expert, for torch.compile and for people.

    Args:
        left: (S, M), sorted by expert.
        right: (S, N), in the dtype of left.
        ends: (E,) int32, rows of the experts up to and with each one.

    Returns:
        (E, M, N) float32.
    """
    return _grouped_outer(left, right, ends)
