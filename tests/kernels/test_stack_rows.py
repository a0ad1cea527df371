"""Matrices that are copied one below the other, by the kernel (interpreted, and compiled) and without it."""

from __future__ import annotations

import pytest
import torch
import triton

from pantheraml.kernels.stack_rows import _WORDS, _stack_rows_kernel, stack_rows
from tests.kernels.test_triton_without_gpu import compile_for

# Rows of each source, columns, columns beside them: whole words, more than one tile, and what the kernel does not take.
CASES = [
    ((3,), 64, 64),
    ((5, 2), 72, 8),
    ((130, 33, 33), 128, 64),
    ((7, 1, 2), 24, 0),
    ((1, 1, 1), 8, 8),
    ((4, 3), 30, 2),
    ((4, 3), 32, 5),
    ((2, 2, 2, 2), 16, 8),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols", "beside"), CASES)
def test_rows_arrive_and_nothing_else_changes(rows, cols, beside, dtype):
    sources = [torch.randn(n, cols).to(dtype) for n in rows]
    wide = torch.full((sum(rows) + 2, cols + beside), 7.0, dtype=dtype)
    stack_rows(sources, wide[: sum(rows), :cols])
    assert torch.equal(wide[: sum(rows), :cols], torch.cat(sources))
    assert (wide[sum(rows) :] == 7).all() and (wide[:, cols:] == 7).all()


@pytest.mark.skipif(not isinstance(_stack_rows_kernel, triton.JITFunction), reason="interpreted")
def test_it_moves_16_bytes_at_once():
    pointers = ("first_ptr", "second_ptr", "third_ptr", "target_ptr")
    numbers = ("first_words", "second_words", "third_words", "words_in_row", "gap")
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(numbers, "i32")
    ptx = compile_for(_stack_rows_kernel, types, {"WORDS": _WORDS}, 90, 4, (*pointers, "gap")).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert "ld.global.b16" not in ptx and "st.global.b16" not in ptx
