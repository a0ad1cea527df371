"""Stacks whose adapters drop values of their input or have a bias, against float64 with the same masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pantheraml.kernels.keyed_dropout import kept_values
from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.fused.fp8_stack import Fp8Stack
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import factors
from pantheraml.models.fused.stack import Stack
from tests.kernels.fp8_cases import sqnr

T, K, SIZES = 20, 128, (64, 16, 32)


def projections(kind, biases, shares, ranks=(4, 0, 3), scales=(1.0, 0.5, 2.0)):
    torch.manual_seed(0)
    found = []
    for n, rank, scale, bias, p in zip(SIZES, ranks, scales, biases, shares, strict=True):
        linear = Fp8Linear(K, n, bias=False) if kind is Fp8Stack else nn.Linear(K, n, bias=False)
        linear.requires_grad_(False)
        if kind is Fp8Stack:
            linear.quantise_()
        if not rank:
            found.append(Projection(linear, None, None, 0.0))
            continue
        a, b = nn.Parameter(torch.randn(rank, K) / K**0.5), nn.Parameter(torch.randn(n, rank))
        found.append(Projection(linear, a, b, scale, nn.Parameter(torch.randn(n)) if bias else None, p))
    return tuple(found)


def reference(x, parts, seeds, first_row=0):
    outputs = []
    for index, part in enumerate(parts):
        linear = part.linear
        weight = linear.dequantised() if isinstance(linear, Fp8Linear) else linear.weight
        y = x @ weight.double().T
        if part.a is not None:
            read = x
            if part.dropout:
                keys = torch.arange(first_row, first_row + x.shape[0])
                read = x * kept_values(keys, K, part.dropout, seeds[index]) / (1 - part.dropout)
            y = y + part.scale * read @ part.a.double().T @ part.b.double().T
        if part.lora_bias is not None:
            y = y + part.scale * part.lora_bias.double()
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (False, False, True)])
@pytest.mark.parametrize("shares", [(0.0,) * 3, (0.4,) * 3, (0.0, 0.0, 0.5)])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", [Stack, Fp8Stack])
def test_products_and_gradients(kind, wide, shares, biases):
    parts = projections(kind, biases, shares)
    bound = kind().bind(parts)
    torch.manual_seed(2)
    x, dy = torch.randn(T, K), torch.randn(T, sum(SIZES))
    exact_x = x.double().requires_grad_()
    y = reference(exact_x, parts, bound.inputs.seeds)
    wanted = [exact_x, *[f for f in factors(*parts) if f is not None]]
    exact = torch.autograd.grad(y, wanted, dy.double())
    given_x, given_dy = x, dy
    if wide:
        given_x, given_dy = bound.widened(x, K), bound.widened(dy, sum(SIZES))
        given_x[:, :K], given_dy[:, : sum(SIZES)] = x, dy
    ours, t = bound.product(given_x)
    dx, inner = bound.input_gradient(given_dy)
    torch.testing.assert_close(bound.thin(x), t)
    torch.testing.assert_close(bound.inner(dy), inner)
    if kind is Stack:
        torch.testing.assert_close(ours.double(), y.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dx.double(), exact[0], rtol=1e-5, atol=1e-4)
    else:
        assert sqnr(ours, y.detach()) > 26 and sqnr(dx, exact[0]) > 26
    grads = bound.factor_gradients(given_dy, inner, given_x, t)
    assert [g is None for g in grads] == [f is None for f in factors(*parts)]
    for a, b in zip([g for g in grads if g is not None], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("kind", [Stack, Fp8Stack])
def test_parts_drop_as_the_whole(kind):
    parts = projections(kind, (True,) * 3, (0.4,) * 3)
    bound = kind().bind(parts)
    torch.manual_seed(2)
    x, dy = torch.randn(T, K), torch.randn(T, sum(SIZES))
    whole = bound.product(x), bound.input_gradient(dy)
    sums = [torch.zeros(()) for _ in factors(*parts)]
    for rows in (slice(0, 7), slice(7, 8), slice(8, T)):
        part = bound.at(rows.start)
        y, t = part.product(x[rows])
        dx, inner = part.input_gradient(dy[rows])
        torch.testing.assert_close((y, t, dx), (whole[0].y[rows], whole[0].t[rows], whole[1][0][rows]))
        grads = part.factor_gradients(dy[rows], inner, x[rows], t)
        sums = [a if b is None else a + b for a, b in zip(sums, grads, strict=True)]
    for a, b in zip(sums, bound.factor_gradients(dy, whole[1][1], x, whole[0].t), strict=True):
        assert b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bound.at(1).product(x).y, whole[0].y, atol=1e-2)
    plain = kind().bind(projections(kind, (True,) * 3, (0.0,) * 3))
    assert plain.at(5) is plain


def test_every_call_and_every_adapter_has_masks_of_its_own_whose_mean_is_no_dropout():
    stack, count, x = Stack(), 400, torch.randn(T, K)
    parts = projections(Stack, (False,) * 3, (0.5,) * 3)
    seeds, outputs = [], []
    for _ in range(count):
        bound = stack.bind(tuple(Projection(*part) for part in parts))
        seeds += bound.inputs.seeds.values()
        outputs.append(bound.product(x).y)
    assert len(set(seeds)) == 2 * count
    outputs = torch.stack(outputs)
    exact = stack.bind(tuple(part._replace(dropout=0.0) for part in parts)).product(x).y
    sigma = outputs.std(0) / count**0.5
    adapted = sigma > 1e-4  # the second projection has no adapter
    assert adapted.float().mean() == (SIZES[0] + SIZES[2]) / sum(SIZES)
    assert ((outputs.mean(0) - exact)[adapted].abs() <= 5 * sigma[adapted]).all()


def test_a_layout_that_changes_leaves_nothing_behind():
    """One buffer serves adapters with and without a bias, in turn."""
    stack, x = Stack(), torch.randn(T, K)
    biased = projections(Stack, (True,) * 3, (0.0,) * 3)
    plain = tuple(part._replace(lora_bias=None) for part in biased)
    for parts in (biased, plain, tuple(Projection(*part) for part in biased)):
        y = stack.bind(parts).product(x).y
        torch.testing.assert_close(y.double(), reference(x.double(), parts, {}), rtol=1e-5, atol=1e-4)
