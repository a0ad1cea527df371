"""4-bit weights of bitsandbytes (NF4, FP4) unpacked in one pass, bit by bit what bitsandbytes itself gives.

Shapes: W (N, K) with N * K values in row-major order; two values a byte, the first in the high half; one scale
for every ``blocksize`` values. ``code`` (16,) is the table of the format, so NF4 and FP4 differ in it alone.

    scale_b = absmax_b                                                     plain
    scale_b = code2[absmax_b] * absmax2[b // blocksize2] + offset          double quantisation: absmax_b is a byte
    W_e     = round(code[half_e] * scale_(e // blocksize))                 rounded once, to the dtype of the output

Both products and the sum are rounded to float32 one by one, as bitsandbytes does in two kernels, so the compiler may
not fuse a multiplication with an addition here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, tl

# Words of 4 bytes that a program unpacks; 4 to a thread are one load of 16 bytes.
TILE = {"WORDS": 512, "num_warps": 4}


@jit
def unpack_words(
    word, there, packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, PER: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """The values (WORDS, PER), float32, of the words ``word`` (WORDS,); PER to a word."""
    packed = tl.load(packed_ptr + word, mask=there, other=0).to(tl.int32)
    block = word // (BLOCK // PER)
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(code2_ptr + index) * tl.load(absmax2_ptr + block // BLOCK2, mask=there, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=there, other=0.0).to(tl.float32)
    place = tl.arange(0, PER)
    half = (packed[:, None] >> ((place // 2) * 8 + 4 - (place % 2) * 4)[None, :]) & 15
    # The table stays in the first level of cache: one line, read without conflicts, which beats 15 selections a value.
    return tl.load(code_ptr + half) * scale[:, None]


@jit
def _unpack_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, words, values, cols, stride,
    words_in_row, PER: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """PER values to a word; ROWS: 0 for a dense output, 1 where rows hold whole words, 2 where a word may cross."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    value = unpack_words(
        word, word < words, packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, PER, BLOCK, BLOCK2,
        NESTED,
    )  # fmt: skip
    place = tl.arange(0, PER)
    at = word.to(tl.int64)[:, None] * PER + place[None, :]
    inside = at < values
    if ROWS == 1:
        row = word // words_in_row
        at = (
            row.to(tl.int64)[:, None] * stride + ((word - row * words_in_row) * PER)[:, None] + place[None, :]
        )
    if ROWS == 2:
        row = at // cols
        at = row * stride + (at - row * cols)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def triton_unpack(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    """Fill ``out`` by Triton; arguments as the operator's."""
    flat = packed.reshape(-1).view(torch.uint8)
    values, cols, stride = out.numel(), out.shape[1], out.stride(0)
    if values == 0:
        return
    dense = out.is_contiguous()
    wide = flat.numel() % 4 == 0 and flat.data_ptr() % 4 == 0 and (dense or cols % 8 == 0)
    per = 8 if wide else 2
    words = flat.view(torch.int32) if wide else flat
    rows = 0 if dense else 1 if cols % per == 0 else 2
    absmax2, code2, offset = nested if nested else (absmax, code, code)
    _unpack_kernel[(-(-words.numel() // TILE["WORDS"]),)](
        words, absmax, code, absmax2, code2, offset, out, words.numel(), values, cols, stride, max(1, cols // per),
        PER=per, BLOCK=blocks[0], BLOCK2=blocks[-1], NESTED=bool(nested), ROWS=rows, **TILE,
        enable_fp_fusion=False,
    )  # fmt: skip


def _eager_unpack(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    """The same in plain PyTorch."""
    if out.numel() == 0:
        return
    if nested:
        absmax2, code2, offset = nested
        outer = absmax2.repeat_interleave(blocks[1])[: absmax.numel()]
        absmax = code2[absmax.int()] * outer + offset
    data = packed.reshape(-1).view(torch.uint8)
    halves = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[: out.numel()]
    scales = absmax.float().repeat_interleave(blocks[0])[: out.numel()]
    out.copy_((code[halves.int()] * scales).to(out.dtype).view(out.shape))


def fill(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    """Fill ``out`` where it lies: by Triton on a GPU, which is the current one, else in plain PyTorch."""
    launch = triton_unpack if out.device.type == "cuda" else _eager_unpack
    launch(out, packed, absmax, code, nested, blocks)


@torch.library.custom_op("pantheraml::unpack_4bit", mutates_args=("out",))
def _unpack_4bit(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    """Fill ``out`` (N, K), stride 1 along a row.

    ``nested`` is empty, or absmax2, code2 and offset; ``blocks`` the blocksize, and with ``nested`` the one of absmax.
    """
    _eager_unpack(out, packed, absmax, code, nested, blocks)


@_unpack_4bit.register_kernel("cuda")
def _(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    with launching_on(out):
        triton_unpack(out, packed, absmax, code, nested, blocks)


@_unpack_4bit.register_fake
def _(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: list[Tensor], blocks: list[int]
) -> None:
    return None


def read_state(state: Any) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
    """absmax, code, nested and blocks of the operator, from a ``bitsandbytes.functional.QuantState``."""
    if not state.nested:
        return state.absmax, state.code, [], [state.blocksize]
    inner = state.state2
    return (
        state.absmax,
        state.code,
        [inner.absmax, inner.code, state.offset],
        [state.blocksize, inner.blocksize],
    )


def unpack_4bit(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """A 4-bit weight of bitsandbytes, unpacked.

    The result depends on nothing that autograd follows: packed weights are frozen.

    Args:
        packed: the bytes, in whatever dtype bitsandbytes stores them; contiguous.
        state: their ``bitsandbytes.functional.QuantState``: NF4 or FP4, any blocksize, nested or not.
        out: (N, K) of any floating dtype with stride 1 along a row, to be filled; rows may lie apart. None makes one in
            the dtype of ``state``.

    Returns:
        ``out``.
    """
    with torch.no_grad():
        if out is None:
            out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
        fill(out, packed, *read_state(state))
    return out
