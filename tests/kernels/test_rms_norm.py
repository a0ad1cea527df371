"""RMSNorm on CPU: the plain path, and its custom op."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import rms_norm as op
from tests import tiny
from tests.kernels.norm_cases import EPS, KINDS, check, gradients, make

SHAPES = [
    ((3, 5, 64), "contiguous"),
    ((7, 33), "contiguous"),
    ((1, 100), "contiguous"),
    ((257,), "contiguous"),
]
SHAPES += [((4, 6, 48), "transposed"), ((5, 20), "sliced"), ((5, 20), "strided"), ((9, 1), "contiguous")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_errors_are_at_most_twice_those_of_stock_pytorch(kind, dtype, shape, layout):
    offset, cast_first = KINDS[kind]
    x, weight, dy = make(shape, dtype, layout=layout)
    ours = gradients(lambda x, w: op.rms_norm(x, w, EPS, offset, cast_first), x, weight, dy)
    check(ours, x, weight, dy, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_with_half_precision_inputs(kind):
    offset, cast_first = KINDS[kind]
    x, weight, dy = make((6, 40), torch.bfloat16, weight_dtype=torch.float32)
    ours = gradients(lambda x, w: op.rms_norm(x, w, EPS, offset, cast_first), x, weight, dy)
    assert ours[0].dtype is (torch.float32 if cast_first else torch.bfloat16)
    check(ours, x, weight, dy, kind)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "llama"),
        ("qwen3", "llama"),
        ("gemma2", "gemma"),
        ("gemma3_text", "gemma"),
        ("gpt_oss", "gpt_oss"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_output_equals_transformers_bitwise(family, kind, dtype, weight_dtype):
    norm = tiny.build_model(family, num_hidden_layers=1).model.norm
    offset, cast_first = KINDS[kind]
    x, weight, _ = make((5, 7, 64), dtype, weight_dtype=weight_dtype)
    norm.weight.data = weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    theirs, ours = norm(x), op.rms_norm(x, weight, eps, offset, cast_first)
    assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)


def test_an_empty_batch():
    x = torch.empty(2, 0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = op.rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 0, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_a_frozen_weight_costs_no_gradient():
    x, weight, dy = make((4, 16), torch.float32)
    y = op.rms_norm(x.requires_grad_(), weight)
    seen = []
    with torch.autograd.profiler.profile() as profile:
        y.backward(dy)
    seen = [event for event in profile.function_events if event.name == "pantheraml::rms_norm_backward"]
    assert len(seen) == 1 and weight.grad is None
    _, dw = torch.ops.pantheraml.rms_norm_backward(dy, x.detach(), weight, 1e-6, 0.0, True, False)
    assert dw.numel() == 0


def wrong_mean(dy, x, weight, eps, offset, cast_first, with_dw):
    """Forgets that rms(x) depends on x."""
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    dw = torch.ops.pantheraml.rms_norm_backward(dy, x, weight, eps, offset, cast_first, True)[1]
    return (dy * (weight.float() + offset) * rstd).to(x.dtype), dw


def wrong_sum(dy, x, weight, eps, offset, cast_first, with_dw):
    """Adds up dw in the input's dtype, row by row."""
    dx, _ = torch.ops.pantheraml.rms_norm_backward(dy, x, weight, eps, offset, cast_first, False)
    x_hat = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    dw = torch.zeros_like(weight)
    for row in range(x.shape[0]):
        dw += dy[row] * x_hat[row]
    return dx, dw


@pytest.mark.parametrize(("backward", "what"), [(wrong_mean, "dx"), (wrong_sum, "dweight")])
def test_the_yardstick_refuses_a_wrong_backward(backward, what):
    x, weight, dy = make((400, 64), torch.bfloat16)
    y = op.rms_norm(x, weight, EPS)
    with pytest.raises(AssertionError, match=what):
        check((y, *backward(dy, x, weight, EPS, 0.0, True, True)), x, weight, dy, "llama")


def test_the_yardstick_refuses_a_wrong_forward():
    x, weight, dy = make((40, 64), torch.bfloat16)
    right = gradients(lambda x, w: op.rms_norm(x, w, EPS), x, weight, dy)
    check(right, x, weight, dy, "llama")
    with pytest.raises(AssertionError, match="output"):
        check((op.rms_norm(x, weight, EPS * 10), *right[1:]), x, weight, dy, "llama")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(kind, frozen):
    offset, cast_first = KINDS[kind]
    x, weight, dy = make((3, 4, 8), torch.float32)
    x.requires_grad_()
    weight.requires_grad_(not frozen)
    torch.library.opcheck(torch.ops.pantheraml.rms_norm, (x, weight, EPS, offset, cast_first))
    arguments = (dy, x.detach(), weight.detach(), EPS, offset, cast_first, not frozen)
    torch.library.opcheck(torch.ops.pantheraml.rms_norm_backward, arguments)


def test_gradcheck():
    # float32 inside: the finite differences are as coarse as float32 makes them
    x, weight, _ = make((3, 6), torch.float64)
    function = lambda x, w: op.rms_norm(x, w, 1e-2, 1.0, False)  # noqa: E731
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-2, rtol=2e-2)
