"""Dropout whose mask is a function of (seed, row, column): it can be had again at any time, so nothing is stored.

    out  = m * x / (1 - p)              dropped
    out += m * x / (1 - p)              its backward, added to what is there

m is 0 with probability p, else 1. The random bits are Philox's (Salmon et al. 2011), a counter-based generator whose
counter says which row and columns they are for, whatever the launch, the tile or the GPU. One call of it gives 8 times
16 bits, for columns 256 apart: neighbouring columns stay neighbouring lanes, so that memory is read in whole words. 16
bits make p a multiple of 2^-16.

Shapes: x and out (T, N), stride 1 along a row. Instead of its number in x a row may have a key of its own, (T,) int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

# Enough for every statistical test that the generator's authors know; 10 are their default.
ROUNDS = 7
_LANES = 256
_BITS = 16
_PER = 128 // _BITS  # columns that one call of the generator serves
_BLOCKS = {"BLOCK_M": 4, "LANES": _LANES, "ROUNDS": ROUNDS, "num_warps": 4}


@jit
def _drop_kernel(
    x_ptr, out_ptr, keys_ptr, x_stride, out_stride, rows, cols, seed, first_row, first_column, threshold, scale,
    KEYED: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = row < rows
    key = tl.load(keys_ptr + row, mask=here, other=0) if KEYED else row.to(tl.int64) + first_row
    zero = tl.zeros((BLOCK_M, LANES), dtype=tl.uint32)
    group = first_column // (LANES * 8) + tl.program_id(1)
    counter = zero + (group * LANES + tl.arange(0, LANES)).to(tl.uint32)[None, :]
    low = zero + (key & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zero + (key >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, counter, low, high, zero, ROUNDS)

    start = group * (LANES * 8) - first_column
    row = row.to(tl.int64)[:, None]  # rows x cols can pass 2^31
    for part in tl.static_range(8):
        word = w0 if part < 2 else (w1 if part < 4 else (w2 if part < 6 else w3))
        kept = ((word >> (16 * (part % 2))) & 0xFFFF).to(tl.int32) >= threshold
        col = start + part * LANES + tl.arange(0, LANES)[None, :]
        there = here[:, None] & (col >= 0) & (col < cols)
        y = tl.load(x_ptr + row * x_stride + col, mask=there, other=0.0).to(tl.float32)
        y = tl.where(kept, y * scale, 0.0)
        at = out_ptr + row * out_stride + col
        if ADD:
            y += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=there)


def triton_drop(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    """The operator by Triton."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    (first_row, first_column), group = first, _LANES * _PER
    grid = (-(-rows // _BLOCKS["BLOCK_M"]), -(-(first_column + cols) // group) - first_column // group)
    _drop_kernel[grid](
        x, out, x if keys is None else keys, x.stride(0), out.stride(0), rows, cols, seed, first_row, first_column,
        *threshold_and_scale(p), KEYED=keys is not None, ADD=add, **_BLOCKS,
        enable_fp_fusion=False,  # the sum is rounded as in plain PyTorch
    )  # fmt: skip


def threshold_and_scale(p: float) -> tuple[int, float]:
    """From which 16 bits on a value is kept, and what it is multiplied by then."""
    return round(p * 2**_BITS), 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Four words for each counter; all are int64 tensors that hold 32 bits, and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        # Products of 64 bits wrap around; shifts keep the sign, which the mask takes off.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = ((first >> 32) & 0xFFFFFFFF) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def kept_values(keys: Tensor, cols: int, p: float, seed: int) -> Tensor:
    """The mask by plain PyTorch: (T, cols) bool, True for what stays; ``keys`` (T,) int64 are the rows' numbers."""
    groups, lanes = -(-cols // (_LANES * _PER)), min(cols, _LANES)  # narrow rows leave lanes out
    counter = torch.arange(groups * lanes, device=keys.device)[None, :]
    low, high = keys[:, None] & 0xFFFFFFFF, (keys[:, None] >> 32) & 0xFFFFFFFF
    words = philox([counter, low, high, torch.zeros_like(low)], seed)
    parts = [(word >> shift) & 0xFFFF for word in words for shift in (0, _BITS)]
    # (T, groups, 8, lanes): the eighth of a group that a column lies in says which 16 bits are its own.
    bits = torch.stack([part.unflatten(1, (groups, lanes)) for part in parts], dim=2)
    return bits.flatten(1)[:, :cols] >= threshold_and_scale(p)[0]


def _eager_drop(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    """The operator in plain PyTorch, with the same mask, rounded once as the kernel does."""
    first_row, first_column = first
    keys = torch.arange(first_row, first_row + x.shape[0], device=x.device) if keys is None else keys
    kept = kept_values(keys, first_column + x.shape[1], p, seed)[:, first_column:]
    y = x.to(torch.promote_types(x.dtype, torch.float32)) * threshold_and_scale(p)[1]
    y = torch.where(kept, y, 0.0)
    out.copy_(out + y if add else y)


@torch.library.custom_op("pantheraml::keyed_dropout", mutates_args=("out",))
def _keyed_dropout(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    """Write ``dropped`` to out, or add it with ``add``; ``first`` are the numbers of the first row and column."""
    _eager_drop(out, x, p, seed, first, keys, add)


@_keyed_dropout.register_kernel("cuda")
def _(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    with launching_on(out):
        triton_drop(out, x, p, seed, first, keys, add)


@_keyed_dropout.register_fake
def _(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    return None


def dropped(
    x: Tensor,
    p: float,
    seed: int,
    first_row: int = 0,
    *,
    keys: Tensor | None = None,
    first_column: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``x`` with a share ``p`` of its values set to 0 and the others divided by ``1 - p``, without a gradient.

    Args:
        x: (T, N) of any floating dtype, stride 1 along a row.
        p: from 0 to 1, taken to the nearest 2^-16; what stays is divided by ``1 - p`` itself.
        seed: of 64 bits; the masks of different seeds are independent.
        first_row: the number of the first row, from 0: x may be a part of something longer.
        keys: (T,) int64, contiguous: the rows' numbers, if they do not follow ``first_row``.
        first_column: the number of the first column, likewise.
        out: (T, N) to be filled, stride 1 along a row; x itself is fine. None makes one.

    Returns:
        ``out``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(out, x, p, seed, (first_row, first_column), keys, False)
    return out


def add_dropped(
    total: Tensor, x: Tensor, p: float, seed: int, first_row: int = 0, *, keys: Tensor | None = None
) -> Tensor:
    """``total += dropped(x, …)``, summed in float32, rounded once; arguments as ``dropped``; returns total (T, N)."""
    _launch(total, x, p, seed, (first_row, 0), keys, True)
    return total


@torch.no_grad()
def _launch(
    out: Tensor, x: Tensor, p: float, seed: int, first: Sequence[int], keys: Tensor | None, add: bool
) -> None:
    if not runs_triton(x):
        _eager_drop(out, x, p, seed, first, keys, add)
        return
    with launching_on(x):
        triton_drop(out, x, p, seed, first, keys, add)


def draw_seeds(count: int) -> list[int]:
    """Seeds from torch's generator for the CPU: ``torch.manual_seed`` repeats them, and no GPU is waited for.

    They are odd and above 2^62: Triton compiles a kernel anew for an argument that 16 divides or that 32 bits hold.
    """
    drawn = torch.randint(2**62, (count,), device="cpu").tolist()
    return [2**62 | seed | 1 for seed in drawn]
