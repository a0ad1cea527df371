"""LayerNorm on CPU: the plain path, and its custom op."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import layer_norm as op
from tests.kernels.layer_norm_cases import EPS, check, gradients, make, make_several

SHAPES = [
    ((3, 5, 64), "contiguous"),
    ((7, 33), "contiguous"),
    ((1, 100), "contiguous"),
    ((257,), "contiguous"),
    ((4, 6, 48), "transposed"),
    ((5, 20), "sliced"),
    ((5, 20), "strided"),
]


def run(x, weight, bias, dy):
    return gradients(lambda x, w, b: op.layer_norm(x, w, b, EPS), x, weight, bias, dy)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_errors_are_at_most_twice_those_of_stock_pytorch(biased, dtype, shape, layout):
    check(run, make_several(shape, dtype, layout, biased))


def test_float32_weights_with_half_precision_inputs():
    x, weight, bias, dy = make((6, 40), torch.bfloat16, weight_dtype=torch.float32)
    assert [t.dtype for t in run(x, weight, bias, dy)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    check(run, [(x, weight, bias, dy)])


def test_an_empty_batch():
    x, weight, bias, _ = make((2, 8), torch.float32)
    x, weight, bias = (t.requires_grad_() for t in (x[:0].detach(), weight, bias))
    y = op.layer_norm(x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8) and (weight.grad == 0).all() and (bias.grad == 0).all()


def test_frozen_parameters_cost_no_gradient():
    x, weight, bias, dy = make((4, 16), torch.float32)
    y = op.layer_norm(x.requires_grad_(), weight, bias)
    y.backward(dy)
    dx, dw, db = torch.ops.pantheraml.layer_norm_backward(dy, x.detach(), weight, 1e-5, False)
    assert torch.equal(dx, x.grad) and weight.grad is None and dw.numel() == db.numel() == 0
    only_bias = bias.clone().requires_grad_()
    op.layer_norm(x.detach(), weight, only_bias).backward(dy)
    torch.testing.assert_close(only_bias.grad, dy.sum(0))


def uncentred(x, weight, bias, dy):
    """RMSNorm in its place."""
    normal = lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w + b  # noqa: E731
    return gradients(normal, x, weight, bias, dy)


def without_mean(x, weight, bias, dy):
    """Forgets that the mean depends on x."""
    y, dx, dw, db = run(x, weight, bias, dy)
    std = (x.float().var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return y, (dx + (dy * weight).float().mean(-1, keepdim=True) / std).to(x.dtype), dw, db


@pytest.mark.parametrize(("wrong", "what"), [(uncentred, "output"), (without_mean, "dx")])
def test_the_yardstick_refuses_a_wrong_kernel(wrong, what):
    cases = [make((40, 64), torch.bfloat16)]
    check(run, cases)
    with pytest.raises(AssertionError, match=what):
        check(wrong, cases)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(biased, frozen):
    x, weight, bias, dy = make((3, 4, 8), torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_(not frozen)]
    leaves.append(bias.requires_grad_(not frozen) if biased else None)
    torch.library.opcheck(torch.ops.pantheraml.layer_norm, (*leaves, EPS))
    arguments = (dy, x.detach(), weight.detach(), EPS, not frozen)
    torch.library.opcheck(torch.ops.pantheraml.layer_norm_backward, arguments)
