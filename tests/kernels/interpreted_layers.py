"""The Triton kernels of a decoder layer under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import math

import pytest
import torch

from pantheraml.kernels import elementary, rope, rope_qkv, swiglu
from pantheraml.kernels.launch import runs_triton, tl, triton
from pantheraml.kernels.place_factors import Placement, Table
from tests.kernels import layer_cases as cases
from tests.kernels.layer_cases import (
    Maker,
    check_add_norm,
    check_glu,
    check_rotate,
    check_rotate_qkv,
    check_trained_head_norms,
)
from tests.kernels.test_layer_kernels import makers, v_turned_too

# bfloat16 products are wrong in the interpreter
DTYPES = [torch.float32, torch.float16]


def test_the_interpreter_runs():
    assert runs_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves"),
    [(1, 2, 16, 16, 2), (40, 2, 64, 64, 1), (6, 3, 24, 16, 2), (33, 1, 20, 12, 1), (5, 2, 16, None, 2)],
)
def test_rotary_positions(tokens, heads, head_dim, width, halves, norm, dtype):
    make = makers(dtype, strided=True, seeds=40 if tokens == 1 else 4)
    check_rotate(make, tokens, heads, head_dim, width, bias=True, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves", "biased"),
    [
        (1, (2, 1), 16, 16, 2, "qkv"),
        (40, (2, 1), 64, 64, 1, ""),
        (6, (3, 1), 24, 16, 2, "qk"),
        (33, (1, 1), 20, 12, 1, "v"),
    ],
)
def test_rotary_positions_of_q_k_and_v(tokens, heads, head_dim, width, halves, biased, norm, dtype):
    make = makers(dtype, strided=True, seeds=12 if tokens == 1 else 4)
    check_rotate_qkv(make, tokens, heads, head_dim, width, biased=biased, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves"), [(70, (2, 1), 16, 16, 2), (6, (3, 2), 24, 16, 1)]
)
def test_trained_head_norms(tokens, heads, head_dim, width, halves, norm, dtype):
    make = makers(dtype, strided=True, seeds=4)
    check_trained_head_norms(make, tokens, heads, head_dim, width, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "cols", "strided"), [(1, 7, False), (37, 130, True)])
def test_gated_activations(rows, cols, strided, activation, dtype):
    check_glu(makers(dtype, strided, seeds=40 if rows == 1 else 4), rows, cols, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "cols", "strided"), [(1, 100, False), (18, 300, True)])
def test_residual_and_norm(rows, cols, strided, norm, dtype):
    check_add_norm(makers(dtype, strided), rows, cols, norm=norm)
    check_add_norm(makers(dtype, strided, seeds=2), rows, cols, norm=norm, residual=False)


def far(t):
    """The rows of ``t`` (3, N) 2^30 elements apart, so the last one starts at 2^31, in memory hardly touched."""
    spread = torch.empty(2**31 + t.shape[1], dtype=t.dtype).as_strided(t.shape, (2**30, 1))
    return spread.copy_(t)


def test_offsets_past_2_to_the_31():
    make = Maker(torch.float16)
    x, y, z = (make(3, 32) for _ in range(3))
    norm = make.norm(32, 0.0, True)
    rotary = rope.Rotary(make(3, 16), make(3, 16), 16)
    narrow, widths = rope.Rotary(make(3, 8), make(3, 8), 8), (16, 8, 8)
    biases, norms = [make(n) for n in widths], (make.norm(8, 0.0, True), make.norm(8, 0.0, True))

    def run(x, y, z):
        like = (lambda t: t.clone()) if x.is_contiguous() else far
        grads = tuple(t.unflatten(1, (-1, 8)) for t in y.split(widths, dim=1))
        dg, du, value = cases.adapt_glu_back(x, y, z, "silu")
        return (
            *cases.adapt_add_norm(x, y, norm),
            *cases.adapt_norm_back(x, y, z, norm),
            *cases.adapt_trained_norm_back(x, y, z, norm),
            swiglu.glu_forward(x, y, "gelu", torch.empty(3, 32, dtype=x.dtype)),
            *(t.clone() for t in (dg, du, value)),
            rope.rotate_(like(x), 16, rotary),
            rope_qkv.rotate_qkv_(like(x), widths, 8, narrow, biases, norms, like(z)),
            rope_qkv.rotate_qkv_back(grads, narrow, like(z), norms, x),
        )

    near = run(x, y, z)
    spread = run(far(x), far(y), far(z))
    for got, want in zip(spread, near, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_placed(dtype):
    torch.manual_seed(0)
    stack = torch.zeros(300, 80, dtype=dtype)
    a, b = torch.randn(7, 64), torch.randn(200, 16)
    table = Table()
    for scale in (0.5, 0.25):
        table.write([Placement(a, stack[250:257, :64], 1.0), Placement(b, stack[:200, 64:], scale)])
        expected = torch.zeros_like(stack)
        expected[250:257, :64], expected[:200, 64:] = a, b * scale
        assert torch.equal(stack, expected)


@triton.jit
def _elementary_kernel(
    x_ptr, exp_ptr, log_ptr, tanh_ptr, slope_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(exp_ptr + at, elementary.exp(x, EXACT))
    tl.store(log_ptr + at, elementary.log(tl.abs(x) + 1.0, EXACT))
    tanh, slope = elementary.tanh(x, EXACT)
    tl.store(tanh_ptr + at, tanh)
    tl.store(slope_ptr + at, slope)


def test_elementary_functions():
    x = torch.cat([torch.linspace(-86, 88, 4000), torch.linspace(-2, 2, 4000), torch.randn(192) * 1e-3])
    exact = x.double()
    # 4 exp(-2|x|) / (1 + exp(-2|x|))^2 cancels nowhere
    e = torch.exp(-2 * exact.abs())
    truth = (exact.exp(), (x.abs() + 1).double().log(), exact.tanh(), 4 * e / (1 + e) ** 2)
    found = [torch.empty_like(x) for _ in truth]
    _elementary_kernel[(8,)](x, *found, EXACT=True, BLOCK=1024)
    for name, one, other in zip(("exp", "log", "tanh", "slope"), found, truth, strict=True):
        # Exponentials below 1e-38 are 0; the logarithm of a sum is as good as the sum.
        size = other.abs().clamp(min=1.0 if name == "log" else 1e-30)
        error = ((one.double() - other).abs() / size).max().item()
        assert error <= (4e-7 if name == "slope" else 2e-7), (name, error)
    # The interpreter rounds within a fused multiply-add, hence the tolerance.
    ends = torch.tensor([-200.0, 0.0, 80.0, float("nan")])
    found = [torch.empty_like(ends) for _ in truth]
    for exact_too in (True, False):
        _elementary_kernel[(1,)](ends, *found, EXACT=exact_too, BLOCK=4)
        assert (
            found[0][:3].tolist() == [0.0, 1.0, pytest.approx(math.exp(80), rel=2e-6)] and found[0][3].isnan()
        )
        assert found[2][:3].tolist() == [-1.0, 0.0, 1.0]


def test_a_wrong_gradient_of_v_is_seen(monkeypatch):
    check_rotate_qkv(makers(torch.float32), 5, (2, 1), 16, 16)
    monkeypatch.setattr(cases, "adapt_rotate_qkv_back", v_turned_too)
    with pytest.raises(AssertionError, match="dx"):
        check_rotate_qkv(makers(torch.float32), 5, (2, 1), 16, 16)


def test_a_wrong_kernel_is_seen(monkeypatch):
    right = cases.adapt_glu_back

    def wrong(*arguments):
        dg, *rest = right(*arguments)
        return dg * (1 + 1e-5), *rest

    check_glu(makers(torch.float32), 5, 33, "silu")
    monkeypatch.setattr(cases, "adapt_glu_back", wrong)
    with pytest.raises(AssertionError, match="dg"):
        check_glu(makers(torch.float32), 5, 33, "silu")
