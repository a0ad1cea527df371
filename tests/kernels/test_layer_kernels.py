"""The kernels of a decoder layer on CPU: their plain paths, their custom ops, and that wrong ones are seen."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ConfigError
from pantheraml.kernels import add_norm, rope, rope_qkv, swiglu
from pantheraml.kernels.rms_norm import RMSNorm
from tests.kernels import layer_cases as cases
from tests.kernels.layer_cases import (
    Maker,
    check_add_norm,
    check_glu,
    check_rotate,
    check_rotate_qkv,
    check_trained_head_norms,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def makers(dtype, strided=False, seeds=6):
    return [Maker(dtype, seed=seed, strided=strided) for seed in range(seeds)]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "head_dim", "width", "halves"), [(1, 16, 16, 2), (6, 24, 16, 1), (5, 8, None, 2)]
)
def test_rotary_positions(tokens, head_dim, width, halves, norm, dtype, strided):
    make = makers(dtype, strided, seeds=40 if tokens == 1 else 6)
    check_rotate(make, tokens, 3, head_dim, width, bias=True, norm=norm, halves=halves)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves", "biased"),
    [
        (1, (3, 1), 16, 16, 2, "qkv"),
        (6, (4, 2), 24, 16, 1, ""),
        (5, (2, 2), 8, 8, 2, "qk"),
        (5, (2, 1), 8, 8, 2, "v"),
    ],
)
def test_rotary_positions_of_q_k_and_v(tokens, heads, head_dim, width, halves, biased, norm, dtype, strided):
    make = makers(dtype, strided, seeds=40 if tokens == 1 else 20)
    check_rotate_qkv(make, tokens, heads, head_dim, width, biased=biased, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("tokens", "head_dim", "width", "halves"), [(6, 24, 16, 1), (5, 8, 8, 2)])
def test_trained_head_norms(tokens, head_dim, width, halves, norm, dtype):
    make = makers(dtype, strided=True, seeds=20)
    check_trained_head_norms(make, tokens, (4, 2), head_dim, width, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (6, 33)])
def test_gated_activations(rows, cols, activation, dtype):
    make = makers(dtype, strided=True, seeds=40 if rows == 1 else 6)
    check_glu(make, rows, cols, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 100), (6, 33)])
def test_residual_and_norm(rows, cols, norm, dtype):
    check_add_norm(makers(dtype, strided=True), rows, cols, norm=norm)


def test_gradients_may_be_written_over_dy():
    make = Maker(torch.float32)
    g, u, dy = (make(5, 12) for _ in range(3))
    dg, du, y = cases.adapt_glu_back(dy, g, u, "silu")
    out = (torch.empty_like(g), torch.empty_like(g), dy)
    swiglu.glu_backward(dy, g, u, "silu", out)
    assert torch.equal(out[0], dg) and torch.equal(out[1], du) and torch.equal(dy, y)


def turned_the_other_way(x, head_dim, rotary, *rest):
    y = rope.rotate_(x.clone(), head_dim, rotary._replace(sin=-rotary.sin), *rest[:1])
    return y, y


def without_norm_of_gradient(dy, rotary, out, norm, raw):
    return rope.rotate_back(dy, rotary, out)


def norms_exchanged(x, widths, head_dim, rotary, biases, norms):
    out, raw = torch.empty_like(x), x.clone()
    return rope_qkv.rotate_qkv_(raw, widths, head_dim, rotary, biases, norms[::-1], out), raw


def v_turned_too(grads, rotary, out, norms, raw):
    rope_qkv.rotate_qkv_back(grads, rotary, out, norms, raw)
    rope.rotate_back(grads[2], rotary, out[:, -grads[2][0].numel() :])
    return out


def other_gelu(g, u, activation):
    return swiglu.glu_forward(g, u, "gelu_tanh", torch.empty_like(g))


def slope_of_another(dy, g, u, activation):
    out = tuple(torch.empty_like(g) for _ in range(3))
    swiglu.glu_backward(dy, g, u, "gelu", out)
    return out


def norm_before_the_sum(x, y, norm):
    h = torch.empty_like(x)
    return add_norm.add_norm(x, torch.zeros_like(y), norm, h) + y, h


def without_residual(dh, ds, s, norm):
    return add_norm.norm_backward(dh, None, s, norm, torch.empty_like(s)), cases.stock_norm(s, norm)


def of_the_first_rows(dh, ds, s, norm):
    dx, h = cases.adapt_norm_back(dh, ds, s, norm)
    part = slice(0, len(s) - 1)
    out, dw = torch.empty_like(s[part]), torch.empty_like(norm.weight, dtype=torch.float32)
    add_norm.norm_backward(dh[part], ds[part], s[part], norm, out, None, dw)
    return dx, h, dw


def weights_exchanged(grads, rotary, out, norms, raw):
    dw = tuple(torch.empty_like(norm.weight, dtype=torch.float32) for norm in norms)
    return rope_qkv.rotate_qkv_back(grads, rotary, out, norms, raw, dw), *dw[::-1]


@pytest.mark.parametrize(
    ("adapter", "wrong", "what", "check"),
    [
        ("adapt_rotate", turned_the_other_way, "output",
         lambda make: check_rotate(make, 6, 2, 16, 16)),
        ("adapt_rotate_back", without_norm_of_gradient, "dx",
         lambda make: check_rotate(make, 6, 2, 16, 16, norm=(0.0, True))),
        ("adapt_rotate_qkv", norms_exchanged, "output",
         lambda make: check_rotate_qkv(make, 6, (2, 1), 16, 16, norm=(0.0, True))),
        ("adapt_rotate_qkv_back", v_turned_too, "dx",
         lambda make: check_rotate_qkv(make, 6, (2, 1), 16, 16)),
        ("adapt_glu", other_gelu, "output", lambda make: check_glu(make, 6, 33, "gelu")),
        ("adapt_glu_back", slope_of_another, "dg", lambda make: check_glu(make, 6, 33, "silu")),
        ("adapt_add_norm", norm_before_the_sum, "h", lambda make: check_add_norm(make, 6, 33)),
        ("adapt_norm_back", without_residual, "dx", lambda make: check_add_norm(make, 6, 33)),
        ("adapt_trained_norm_back", of_the_first_rows, "dw", lambda make: check_add_norm(make, 6, 33)),
        ("adapt_trained_head_norms", weights_exchanged, "dw of q",
         lambda make: check_trained_head_norms(make, 6, (2, 1), 16, 16, norm=(0.0, True))),
    ],
)  # fmt: skip
def test_the_yardstick_refuses_a_wrong_kernel(adapter, wrong, what, check, monkeypatch):
    check(makers(torch.float32))
    monkeypatch.setattr(cases, adapter, wrong)
    with pytest.raises(AssertionError, match=what):
        check(makers(torch.float32))


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_glu_is_an_op(activation):
    make = Maker(torch.float32)
    g, u, dy = (make(5, 12).requires_grad_() for _ in range(3))
    torch.library.opcheck(torch.ops.pantheraml.glu, (g, u, activation))
    arguments = (dy.detach(), g.detach(), u.detach(), activation)
    torch.library.opcheck(torch.ops.pantheraml.glu_backward, arguments)
    y = swiglu.glu(g.view(5, 3, 4), u.view(5, 3, 4), activation)
    dg, du = torch.autograd.grad(y, (g, u), dy.view(5, 3, 4))
    again = cases.adapt_glu_back(*(t.detach() for t in (dy, g, u)), activation)
    assert torch.equal(dg, again[0]) and torch.equal(du, again[1])


def test_glu_of_other_things():
    for arguments in ((torch.ones(3), torch.ones(3), "relu"), (torch.ones(3), torch.ones(4))):
        with pytest.raises(ConfigError, match="g and u are alike"):
            swiglu.glu(*arguments)


@pytest.mark.parametrize("biased", [True, False])
def test_rotate_is_an_op(biased):
    make = Maker(torch.float32)
    x, bias, dy = make(6, 48).requires_grad_(), make(48).requires_grad_(), make(6, 48)
    angle = torch.cat([make(6, 4)] * 2, dim=-1)
    rotary = rope.Rotary(angle.cos(), angle.sin(), 8)
    bias = bias if biased else None
    torch.library.opcheck(torch.ops.pantheraml.rotate, (x, *rotary, 16, bias))
    torch.library.opcheck(torch.ops.pantheraml.rotate_backward, (dy, *rotary, 16))
    y = rope.rotate(x, 16, rotary, bias)
    y.backward(dy)
    exact = (
        x.detach().double().requires_grad_(),
        None if bias is None else bias.detach().double().requires_grad_(),
    )
    truth = cases.rope_reference.rotate(exact[0], *rotary, 16, exact[1])
    truth.backward(dy.double())
    torch.testing.assert_close(y, truth.float())
    torch.testing.assert_close(x.grad, exact[0].grad.float())
    if biased:
        torch.testing.assert_close(bias.grad, exact[1].grad.float())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
def test_residual_norm_is_an_op(offset, cast_first, trained):
    make = Maker(torch.float32)
    x, y, ds, dh = (make(5, 12) for _ in range(4))
    weight = make(12).requires_grad_(trained)
    x, y = x.requires_grad_(), y.requires_grad_()
    options = (1e-5, offset, cast_first)
    torch.library.opcheck(torch.ops.pantheraml.add_norm, (x, y, weight, *options))
    backward = (dh, ds, x.detach(), weight.detach(), *options)
    torch.library.opcheck(torch.ops.pantheraml.add_norm_backward, backward)
    outputs = add_norm.residual_norm(x, y, RMSNorm(weight, *options))
    leaves = (x, y, weight) if trained else (x, y)
    ours = torch.autograd.grad(outputs, leaves, (ds, dh))
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    s = doubles[0] + doubles[1]
    w = doubles[2] if trained else weight
    truth = torch.autograd.grad(
        (s, cases.norm_reference.rms_norm(s, w, 1e-5, offset)), doubles, (ds.double(), dh.double())
    )
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)
