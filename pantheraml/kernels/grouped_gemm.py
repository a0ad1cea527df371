"""Products of rows that are sorted by expert with the matrix of their expert.

    y[i] = scale * x[rows[i]] W[e]^T + bias[e] + t[i] b[e]^T        for the rows i of expert e

Shapes: x (M, K) with stride 1 along K; W (E, N, K) with any strides; y (S, N); rows (S,), or none when x is sorted
itself (M = S); bias (E, N); t (S, R) and b (E, N, R) are LoRA's. ``Groups`` says which of the S rows are whose: expert
e has the rows from ends[e - 1] up to ends[e]. An expert may have none. Nothing waits for the device.

W is read through its strides, so W[e]^T and W[e] (for dX) need no copy, nor does a weight stored as (E, K, N).

Two kernels compute it: ours, which gathers the rows and adds bias and LoRA on the way, and torch's CUTLASS one, after
which one pass adds them. ``BACKENDS`` says which; torch's is taken only where it was seen to run.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.expert_groups import Groups
from pantheraml.kernels.grouped_outer import grouped_outer
from pantheraml.kernels.launch import jit, tl, triton

# "triton" or "torch", by what is asked for: a plain product, or one with gathered rows, a bias or LoRA; the latter in
# experts that have many rows each, so that a pass of its own costs less than a slower product. Milliseconds of a fused
# step (H200, r=16, 8,192 tokens), torch's and ours: mixtral, 2,048 rows an expert, 42.6 and 49.8; qwen3_moe, 512 rows,
# 17.8 and 16.6.
BACKENDS = {"plain": "triton", "added": "triton", "added to many": "torch"}
MANY_ROWS = 1024
# (BLOCK_N, BLOCK_K, num_warps, num_stages) of 16-bit products, by rows of a tile.
TILES = {128: (256, 64, 8, 4), 64: (256, 64, 8, 4), 32: (128, 64, 4, 4), 16: (128, 64, 4, 4)}
# For N of at most 128: LoRA's products with A and B.
THIN_TILES = {128: (64, 4, 3), 64: (64, 4, 3), 32: (64, 4, 3), 16: (64, 4, 3)}  # without BLOCK_N
# The widest adapter whose factors fit into registers beside a tile of y.
MAX_RANK = 128
# float32 is multiplied exactly, without tensor cores.
FLOAT32_TILE = (64, 32, 4, 2)
# Shared memory in bytes below which (sm_86, sm_89) tiles are narrower.
_WIDE_TILE_MEMORY = 150_000
# Tiles of rows that are computed side by side, so that they share the weights in the L2 cache.
_GROUP = 8


class GroupedLowRank(NamedTuple):
    """LoRA's addend ``t b[e]^T``: t (S, R) with stride 1 along R and the scale in it, b (E, N, R) of any strides."""

    t: Tensor
    b: Tensor


@jit
def _addend(
    acc, t_ptr, b_ptr, bias_ptr, expert, row, col, cols, t_stride, b_se, b_sn, b_sr, rank,
    BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``acc + t b^T + bias`` for one tile of one expert; ``row`` and ``col`` are there."""
    if LORA:
        # float32 is summed in blocks of ranks, and then by itself, which rounds less; a bare sum would be folded into
        # the product's own.
        EXACT: tl.constexpr = t_ptr.dtype.element_ty == tl.float32
        STEP: tl.constexpr = tl.constexpr(16) if EXACT else RANK
        added = tl.zeros_like(acc)
        for start in tl.static_range(0, RANK, STEP):
            r = start + tl.arange(0, STEP)
            t = tl.load(t_ptr + row[:, None] * t_stride + r[None, :], mask=(r < rank)[None, :], other=0.0)
            at = b_ptr + expert * b_se + col[None, :] * b_sn + r[:, None] * b_sr
            b = tl.load(at, mask=(r < rank)[:, None], other=0.0)
            if EXACT:
                added += tl.where(rank > start, tl.dot(t, b, input_precision="ieee"), 0.0)
            else:
                acc = tl.dot(t, b, acc)
        if EXACT:
            acc += added
    if BIAS:
        acc += tl.load(bias_ptr + expert * cols + col).to(tl.float32)[None, :]
    return acc


@jit
def _rows_kernel(
    x_ptr, rows_ptr, w_ptr, y_ptr, bias_ptr, t_ptr, b_ptr, tiles_ptr, tiles, cols, depth, x_stride,
    w_se, w_sn, w_sk, t_stride, b_se, b_sn, b_sr, rank, scale,
    INDEXED: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(cols, BLOCK_N)
    group = tl.program_id(0) // (GROUP * wide)
    height = min(tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * wide)
    tile = group * GROUP + within % height
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)

    # Rows and columns past the edge are read as ones that exist, and not written.
    row = first + tl.arange(0, BLOCK_M)
    col = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_row = tl.minimum(row, end - 1).to(tl.int64)
    real_col = (col % cols).to(tl.int64)
    source = real_row
    if INDEXED:
        source = tl.load(rows_ptr + real_row).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source[:, None] * x_stride + k[None, :]
    w_at = w_ptr + expert * w_se + real_col[None, :] * w_sn + k[:, None].to(tl.int64) * w_sk

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k < depth - start)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < depth - start)[:, None], other=0.0)
        if x_ptr.dtype.element_ty == tl.float32:
            # Summed in blocks, which rounds less; a bare sum would be folded into the product's own.
            acc += tl.where(start < depth, tl.dot(x, w, input_precision="ieee"), 0.0)
        else:
            acc = tl.dot(x, w, acc)
        x_at += BLOCK_K
        w_at += BLOCK_K * w_sk
    acc = acc * scale
    acc = _addend(
        acc, t_ptr, b_ptr, bias_ptr, expert, real_row, real_col, cols, t_stride, b_se, b_sn, b_sr, rank,
        BIAS, LORA, RANK,
    )  # fmt: skip
    there = (row < end)[:, None] & (col < cols)[None, :]
    at = y_ptr + row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=there)


@jit
def _add_kernel(
    y_ptr, bias_ptr, t_ptr, b_ptr, tiles_ptr, tiles, cols, t_stride, b_se, b_sn, b_sr, rank,
    BIAS: tl.constexpr, LORA: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    row = tl.load(tiles_ptr + tiles + tile) + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (row < end)[:, None] & (col < cols)[None, :]
    at = y_ptr + row.to(tl.int64)[:, None] * cols + col[None, :]
    acc = tl.load(at, mask=there, other=0.0).to(tl.float32)
    acc = _addend(
        acc, t_ptr, b_ptr, bias_ptr, expert, tl.minimum(row, end - 1).to(tl.int64), (col % cols).to(tl.int64), cols,
        t_stride, b_se, b_sn, b_sr, rank, BIAS, LORA, RANK,
    )  # fmt: skip
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=there)


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may take."""
    if device.type != "cuda":
        return 2**18
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)


def padded_rank(rank: int) -> int:
    """The smallest power of two that holds ``rank`` and that a tensor core can multiply."""
    return max(16, 1 << (rank - 1).bit_length())


def tile_of(block: int, cols: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Tile shape, warps and stages of a product with ``block`` rows a tile and ``cols`` columns."""
    if dtype == torch.float32:
        block, (wide, deep, warps, stages) = min(block, 64), FLOAT32_TILE
    elif cols <= 128:
        wide, (deep, warps, stages) = padded_rank(cols), THIN_TILES[block]
    else:
        wide, deep, warps, stages = TILES[block]
        if _shared_memory(device) < _WIDE_TILE_MEMORY:
            wide, stages = min(wide, 128), min(stages, 3)
    return {"BLOCK_M": block, "BLOCK_N": wide, "BLOCK_K": deep, "num_warps": warps, "num_stages": stages}


def _low_rank_arguments(y: Tensor, low_rank: GroupedLowRank | None) -> tuple[tuple, int]:
    if low_rank is None:
        return (y, y, 0, 0, 0, 0, 0), 16
    t, b = low_rank
    return (t, b, t.stride(0), *b.stride(), b.shape[2]), padded_rank(b.shape[2])


def triton_rows(
    x: Tensor,
    w: Tensor,
    groups: Groups,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: GroupedLowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Our kernel; arguments as ``grouped_rows``."""
    _, cols, depth = w.shape
    y = torch.empty((groups.num_rows, cols), dtype=x.dtype, device=x.device)
    tile = tile_of(groups.block, cols, x.dtype, x.device)
    tiles = groups.tiles(tile["BLOCK_M"])
    (t, b, *strides), rank = _low_rank_arguments(y, low_rank)
    _rows_kernel[(tiles.shape[1] * -(-cols // tile["BLOCK_N"]),)](
        x, x if rows is None else rows, w, y, y if bias is None else bias, t, b, tiles, tiles.shape[1], cols, depth,
        x.stride(0), *w.stride(), *strides, scale,
        INDEXED=rows is not None, BIAS=bias is not None, LORA=low_rank is not None, RANK=rank,
        EVEN=depth % tile["BLOCK_K"] == 0, GROUP=_GROUP, **tile,
    )  # fmt: skip
    return y


def triton_add_(y: Tensor, groups: Groups, bias: Tensor | None, low_rank: GroupedLowRank | None) -> None:
    """``y += bias[e] + t b[e]^T`` in place; y (S, N) contiguous."""
    block = min(groups.block, 64)
    tiles = groups.tiles(block)
    (t, b, *strides), rank = _low_rank_arguments(y, low_rank)
    _add_kernel[(-(-y.shape[1] // 128), tiles.shape[1])](
        y, y if bias is None else bias, t, b, tiles, tiles.shape[1], y.shape[1], *strides,
        BIAS=bias is not None, LORA=low_rank is not None, RANK=rank, BLOCK_M=block, BLOCK_N=128,
    )  # fmt: skip


def _eager_rows(
    x: Tensor,
    w: Tensor,
    groups: Groups,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: GroupedLowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same in plain PyTorch, expert by expert."""
    x = x if rows is None else x.index_select(0, rows)
    y = x.new_empty((groups.num_rows, w.shape[1]))
    for expert, (start, end) in enumerate(groups.spans()):
        part = (x[start:end] @ w[expert].T) * scale
        if low_rank is not None:
            part += low_rank.t[start:end] @ low_rank.b[expert].T
        if bias is not None:
            part += bias[expert]
        y[start:end] = part
    return y


@lru_cache(maxsize=16)
def why_no_torch_grouped(device: torch.device) -> str | None:
    """Why torch's own grouped product is not used on ``device``, or None: tried once on a small one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "torch has a kernel of its own only for sm_90 and sm_100"
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    try:
        x = torch.eye(64, dtype=torch.bfloat16, device=device)
        w = torch.randn(3, 32, 64, device=device).to(torch.bfloat16)
        ends = torch.tensor([16, 16, 64], dtype=torch.int32, device=device)
        y = torch.nn.functional.grouped_mm(x, w.mT, offs=ends)
        same = torch.equal(y[:16], w[0].T[:16]) and torch.equal(y[16:], w[2].T[16:])
        return None if same else "torch's grouped_mm gave wrong numbers"
    except Exception as error:
        return f"torch's grouped_mm did not run ({type(error).__name__}: {str(error).splitlines()[0][:200]})"


def _fits_torch(x: Tensor, w: Tensor) -> bool:
    """bfloat16, every row of both and of the result on 16 bytes, and a dim of stride 1 in each matrix."""
    if x.dtype != torch.bfloat16 or why_no_torch_grouped(x.device) is not None:
        return False
    steps = [x.stride(0), w.stride(0), max(w.stride()[1:]), w.shape[1]]
    return (
        min(w.stride()[1:]) == 1
        and all(step % 8 == 0 for step in steps)
        and not (x.data_ptr() | w.data_ptr()) % 16
    )


def torch_rows(
    x: Tensor,
    w: Tensor,
    groups: Groups,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: GroupedLowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """torch's kernel, then one pass for what it cannot add; arguments as ``grouped_rows``."""
    x = x if rows is None else x.index_select(0, rows)
    y = torch.nn.functional.grouped_mm(x, w.mT, offs=groups.ends)
    if scale != 1.0:
        y *= scale
    if bias is not None or low_rank is not None:
        triton_add_(y, groups, bias, low_rank)
    return y


def grouped_rows(
    x: Tensor,
    w: Tensor,
    groups: Groups,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: GroupedLowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``scale * x[rows] W[e]^T + bias[e] + t b[e]^T`` without autograd.

    Args:
        x: (M, K), stride 1 along K.
        w: (E, N, K) in the dtype of x, any strides.
        groups: whose rows are whose.
        rows: (S,) int32 or int64, the row of x behind each sorted row; None when x is sorted (M = S).
        bias: (E, N), contiguous, any floating dtype.
        low_rank: LoRA's addend, in the dtype of x, rank at most 128.
        scale: of the product alone.

    Returns:
        (S, N) contiguous, in the dtype of x, summed in float32.
    """
    if x.device.type != "cuda" or triton is None:
        return _eager_rows(x, w, groups, rows, bias, low_rank, scale)
    many = groups.num_rows >= MANY_ROWS * w.shape[0]
    is_plain = rows is None and bias is None and low_rank is None
    kind = "plain" if is_plain else "added to many" if many else "added"
    use_torch = w.shape[1] > 128 and BACKENDS[kind] == "torch" and _fits_torch(x, w)
    with torch.cuda.device(x.device):
        return (torch_rows if use_torch else triton_rows)(x, w, groups, rows, bias, low_rank, scale)


@torch.library.custom_op("pantheraml::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return grouped_rows(x, w, Groups(ends, x.shape[0]))


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):
    x, w, ends = ctx.saved_tensors
    dx = _grouped_mm(dy.contiguous(), w.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    dw = grouped_outer(dy, x, ends).to(w.dtype) if ctx.needs_input_grad[1] else None
    return dx, dw, None


_grouped_mm.register_autograd(_differentiate, setup_context=_keep)


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """``y[i] = x[i] W[e]^T`` for the rows i of expert e; differentiable, for torch.compile and for people.

    Args:
        x: (S, K), sorted by expert, stride 1 along K.
        w: (E, N, K) in the dtype of x, any strides.
        ends: (E,) int32, rows of the experts up to and with each one; the last is S.

    Returns:
        (S, N) in the dtype of x.
    """
    return _grouped_mm(x, w, ends)
