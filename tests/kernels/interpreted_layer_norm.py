"""LayerNorm's Triton kernels under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import layer_norm as op
from pantheraml.kernels.launch import runs_triton
from tests.kernels.layer_norm_cases import check, make, make_several
from tests.kernels.test_layer_norm import run

CASES = [
    ((5, 33), torch.float32, "contiguous"),
    ((3, 4, 16), torch.float16, "transposed"),
    ((200, 7), torch.float32, "sliced"),
    ((3, 300), torch.float16, "strided"),
    ((2, 3000), torch.float32, "contiguous"),
]


# A single row takes many inputs to be judged by.
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "biased"),
    [
        ((1, 100), torch.float32, "contiguous", True),
        *((*case, biased) for case in CASES for biased in (True, False)),
    ],
)
def test_forward_and_backward(shape, dtype, layout, biased):
    assert runs_triton(torch.zeros(1))
    check(run, make_several(shape, dtype, layout, biased))


def test_bfloat16_by_one_unit():
    # the interpreter cuts float32 off where the GPU rounds it to bfloat16
    inputs = make((6, 64), torch.bfloat16)
    exact = run(*(t.float() for t in inputs))
    for got, want in zip(run(*inputs), exact, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6 * want.abs().max().item())


def test_frozen_parameters():
    x, weight, bias, dy = make((300, 16), torch.float32)
    backward = torch.ops.pantheraml.layer_norm_backward
    dx, dw, db = backward(dy, x, weight, 1e-5, False)
    assert dw.numel() == db.numel() == 0 and torch.equal(dx, run(x, weight, bias, dy)[1])


def test_offsets_past_2_to_the_31():
    # Rows 2^30 elements apart, so the last one starts at 2^31, in memory that is mostly never touched.
    values, weight, bias, dy = make((3, 64), torch.float16)
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    x.copy_(values)
    for got, want in zip(run(x, weight, bias, dy), run(values, weight, bias, dy), strict=True):
        assert torch.equal(got, want)


def test_a_wrong_kernel_is_seen():
    def wrong(*inputs):
        y, dx, *rest = run(*inputs)
        return y, dx * (1 + 1e-4), *rest

    with pytest.raises(AssertionError, match="dx"):
        check(wrong, make_several((5, 33), torch.float32))


def test_rows_too_long_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(op, "MAX_COLUMNS", 32)
    check(run, make_several((5, 33), torch.float32))
