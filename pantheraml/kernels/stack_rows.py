"""Up to three matrices, one below the other, into a wider one, in one launch.

    [ W_1 ]
    [ W_2 ]  ->  target (N_1 + N_2 + N_3, K), whose rows may lie apart
    [ W_3 ]

torch copies rows into a wider matrix number by number, at less than half of what the memory gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

# Numbers of 16 bits that are loaded and stored at once, and how many such words a program takes.
_PER = 8
_WORDS = 512
_MOST = 3


@jit
def _stack_rows_kernel(
    first_ptr, second_ptr, third_ptr, target_ptr, first_words, second_words, third_words, words_in_row, gap,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Words are 8 numbers; ``gap`` numbers lie between the end of a row of the target and the next."""
    program = tl.program_id(0)
    first_tiles, second_tiles = tl.cdiv(first_words, WORDS), tl.cdiv(second_words, WORDS)
    is_second, is_third = program >= first_tiles, program >= first_tiles + second_tiles
    tile = program - tl.where(is_third, first_tiles + second_tiles, tl.where(is_second, first_tiles, 0))
    words = tl.where(is_third, third_words, tl.where(is_second, second_words, first_words))
    before = tl.where(is_third, first_words + second_words, tl.where(is_second, first_words, 0))
    source_ptr = tl.where(is_third, third_ptr, tl.where(is_second, second_ptr, first_ptr))
    source_ptr = tl.multiple_of(source_ptr, 16)  # what ``_is_even`` has made sure of
    word = tile * WORDS + tl.arange(0, WORDS)
    there = (word < words)[:, None]
    inside = tl.arange(0, 8)[None, :]
    value = tl.load(source_ptr + (word.to(tl.int64) * 8)[:, None] + inside, mask=there)
    row = (before + word) // words_in_row
    at = (before + word).to(tl.int64) * 8 + row.to(tl.int64) * gap
    tl.store(target_ptr + at[:, None] + inside, value, mask=there)


@torch.no_grad()
def stack_rows(sources: Sequence[Tensor], target: Tensor) -> None:
    """Copy ``sources``, (N_i, K) each, one below the other to ``target`` (sum of N_i, K), stride 1 along a row."""
    sources = [source.detach() for source in sources]
    if not _is_even(sources, target):
        for source, place in zip(sources, target.split([len(source) for source in sources]), strict=True):
            place.copy_(source)
        return
    words = [source.numel() // _PER for source in sources] + [0] * (_MOST - len(sources))
    given = [*sources, *sources[:1] * (_MOST - len(sources))]
    programs = sum(-(-count // _WORDS) for count in words)
    cols = target.shape[1]
    with launching_on(target):
        _stack_rows_kernel[(programs, 1, 1)](
            *given, target, *words, cols // _PER, target.stride(0) - cols, WORDS=_WORDS, num_warps=4
        )


def _is_even(sources: Sequence[Tensor], target: Tensor) -> bool:
    """Whether the kernel can take them: words of 16 bytes everywhere, of the target's own dtype."""
    cols, gap = target.shape[1], target.stride(0) - target.shape[1]
    return (
        runs_triton(target)
        and 0 < len(sources) <= _MOST
        and target.itemsize * _PER == 16
        and cols % _PER == 0
        and gap % _PER == 0
        and target.stride(1) == 1
        and target.data_ptr() % 16 == 0
        # Words are counted in int32, up to the end of the last tile.
        and target.shape[0] * cols // _PER + _WORDS < 2**31
        and all(
            source.dtype == target.dtype
            and source.is_contiguous()
            and source.data_ptr() % 16 == 0
            and source.device == target.device
            for source in sources
        )
    )
