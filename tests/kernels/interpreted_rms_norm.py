"""RMSNorm's Triton kernels under Triton's interpreter.

Not collected by itself: ``test_triton_without_gpu.py`` runs it in a process where TRITON_INTERPRET was
set before Triton was imported.
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import rms_norm as op
from tests.kernels.norm_cases import EPS, KINDS, check, make

CASES = [
    ((5, 33), torch.float32, "contiguous"),
    ((1, 100), torch.float32, "contiguous"),
    ((3, 4, 16), torch.float16, "transposed"),
    ((200, 7), torch.float32, "sliced"),
    ((3, 300), torch.float16, "strided"),
    ((2, 3000), torch.float32, "contiguous"),
    ((9, 1), torch.float32, "contiguous"),
]


def run(x, weight, dy, kind, with_dw=True):
    offset, cast_first = KINDS[kind]
    y = op.triton_forward(x, weight, EPS, offset, cast_first)
    return y, *op.triton_backward(dy.to(y.dtype), x, weight, EPS, offset, cast_first, with_dw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_forward_and_backward(kind, shape, dtype, layout):
    x, weight, dy = make(shape, dtype, layout=layout)
    check(run(x, weight, dy, kind), x, weight, dy, kind)


def test_bfloat16_by_one_unit():
    # the interpreter cuts float32 off where the GPU rounds it to bfloat16
    x, weight, dy = make((6, 64), torch.bfloat16)
    exact = run(x.float(), weight.float(), dy.float(), "gemma")
    for got, want in zip(run(x, weight, dy, "gemma"), exact, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6 * want.abs().max().item())


def test_a_frozen_weight():
    x, weight, dy = make((300, 16), torch.float32)
    _, dx, dw = run(x, weight, dy, "llama", with_dw=False)
    assert dw.numel() == 0 and torch.equal(dx, run(x, weight, dy, "llama")[1])


def test_offsets_past_2_to_the_31():
    # Rows 2^20 elements apart, so the last one starts past 2^31, in memory that is mostly never touched.
    rows, n, stride = 2**11 + 2, 64, 2**20
    x = torch.empty(rows * stride, dtype=torch.float16).as_strided((rows, n), (stride, 1))
    values, weight, dy = make((rows, n), torch.float16)
    x.copy_(values)
    for got, want in zip(run(x, weight, dy, "llama"), run(values, weight, dy, "llama"), strict=True):
        assert torch.equal(got, want)


def test_a_wrong_kernel_is_seen():
    x, weight, dy = make((5, 33), torch.float32)
    y, dx, dw = run(x, weight, dy, "llama")
    with pytest.raises(AssertionError, match="dx"):
        check((y, dx * (1 + 1e-5), dw), x, weight, dy, "llama")
