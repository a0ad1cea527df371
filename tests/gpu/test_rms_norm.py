"""RMSNorm's Triton kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import rms_norm as op
from pantheraml.kernels.launch import why_no_triton
from tests.kernels.norm_cases import EPS, KINDS, check, gradients, make, stock

pytestmark = pytest.mark.gpu

SHAPES = [
    ((2, 1024, 4096), "contiguous"),
    ((3, 333), "contiguous"),
    ((1, 5120), "contiguous"),
    ((777,), "contiguous"),
]
SHAPES += [
    ((2, 64, 8, 128), "transposed"),
    ((50, 2000), "sliced"),
    ((50, 200), "strided"),
    ((5000, 1), "contiguous"),
]
SHAPES += [((4, 65536), "contiguous"), ((4, 70001), "contiguous")]


def run(x, weight, dy, kind):
    offset, cast_first = KINDS[kind]
    return gradients(lambda x, w: op.rms_norm(x, w, EPS, offset, cast_first), x, weight, dy)


def test_triton_launches():
    assert why_no_triton(torch.device("cuda", torch.cuda.current_device())) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_errors_are_at_most_twice_those_of_stock_pytorch(kind, dtype, shape, layout):
    x, weight, dy = make(shape, dtype, layout=layout, device="cuda")
    check(run(x, weight, dy, kind), x, weight, dy, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_with_bfloat16_inputs(kind):
    x, weight, dy = make((64, 512), torch.bfloat16, weight_dtype=torch.float32, device="cuda")
    check(run(x, weight, dy, kind), x, weight, dy, kind)


def test_a_wrong_kernel_is_seen():
    x, weight, dy = make((300, 512), torch.bfloat16, device="cuda")
    y, dx, dw = run(x, weight, dy, "llama")
    for wrong, name in (
        ((y * 1.02, dx, dw), "output"),
        ((y, dx * 1.02, dw), "dx"),
        ((y, dx, dw * 1.02), "dweight"),
    ):
        with pytest.raises(AssertionError, match=name):
            check(wrong, x, weight, dy, "llama")


def test_the_same_twice():
    x, weight, dy = make((4096, 1024), torch.bfloat16, device="cuda")
    for first, second in zip(run(x, weight, dy, "llama"), run(x, weight, dy, "llama"), strict=True):
        assert torch.equal(first, second)


def test_an_empty_batch():
    x = torch.empty(0, 64, device="cuda", requires_grad=True)
    weight = torch.ones(64, device="cuda", requires_grad=True)
    op.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == (0, 64) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_more_than_2_to_the_31_elements():
    rows, cols = 2**21 + 3, 1024
    weight = torch.rand(cols, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16).normal_()
    tail = slice(rows - 5, rows)
    y = op.rms_norm(x, weight, EPS)
    torch.testing.assert_close(y[tail], stock(x[tail], weight, *KINDS["llama"]), rtol=2**-7, atol=0)
    dx, _ = torch.ops.pantheraml.rms_norm_backward(y, x, weight, EPS, 0.0, True, False)
    part, _ = torch.ops.pantheraml.rms_norm_backward(y[tail], x[tail], weight, EPS, 0.0, True, False)
    assert torch.equal(dx[tail], part)


def test_opcheck():
    x, weight, _ = make((3, 4, 64), torch.bfloat16, device="cuda")
    arguments = (x.requires_grad_(), weight.requires_grad_(), EPS, 0.0, True)
    torch.library.opcheck(torch.ops.pantheraml.rms_norm, arguments)
