"""Stacks of FP8 weights: products and gradients with LoRA in the margins, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.fused.fp8_stack import Fp8Stack
from pantheraml.models.fused.projection import Projection, read_projection
from pantheraml.models.fused.slots import factors
from tests.kernels.fp8_cases import sqnr

T, K, SIZES = 24, 256, (64, 16, 32)


def linears(zero=False):
    torch.manual_seed(0)
    found = [Fp8Linear(K, n, bias=False) for n in SIZES]
    for linear in found:
        if zero:
            linear.weight.data.zero_()
        linear.quantise_()
    return found


def projections(layers, ranks, scales=(1.0, 0.5, 2.0), size=0.02):
    torch.manual_seed(1)
    return tuple(
        Projection(
            layer,
            nn.Parameter(torch.randn(rank, K) / K**0.5) if rank else None,
            nn.Parameter(torch.randn(layer.out_features, rank) * size) if rank else None,
            scale if rank else 0.0,
        )
        for layer, rank, scale in zip(layers, ranks, scales, strict=True)
    )


def reference(x, parts, base=True):
    outputs = []
    for part in parts:
        y = x @ part.linear.dequantised().double().T if base else 0.0
        if part.a is not None:
            y = y + part.scale * (x @ part.a.double().T) @ part.b.double().T
        outputs.append(y if torch.is_tensor(y) else x.new_zeros(T, part.features))
    return torch.cat(outputs, dim=1)


def tensors():
    torch.manual_seed(2)
    return torch.randn(T, K), torch.randn(T, sum(SIZES)) * 1e-5


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 0, 40), (0, 0, 0), (0, 8, 0)])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("size", [1e-5, 0.02, 5.0])
def test_products_and_gradients(ranks, kept, size):
    layers = linears()
    for linear in layers:
        linear.keeps_turned = kept
    parts = projections(layers, ranks, size=size)
    bound = Fp8Stack().bind(parts)
    x, dy = tensors()
    exact_x = x.double().requires_grad_()
    y = reference(exact_x, parts)
    wanted = [exact_x, *[f for f in factors(*parts) if f is not None]]
    exact = torch.autograd.grad(y, wanted, dy.double())
    for _ in range(2):  # a turned weight that is kept is used again
        ours, t = bound.product(x)
        dx, inner = bound.input_gradient(dy)
        assert sqnr(ours, y.detach()) > 26 and sqnr(dx, exact[0]) > 26
    grads = [g for g in bound.factor_gradients(dy, inner, x, t) if g is not None]
    for a, b in zip(grads, exact[1:], strict=True):
        # of the factors nothing was quantised
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert (t is None) == (sum(ranks) == 0) == (inner is None)


@pytest.mark.parametrize("size", [1e-3, 0.02])
def test_the_adapters_share_alone(size):
    """Beside weights of zero it is as exact as in bfloat16, both ways."""
    parts = projections(linears(zero=True), (4, 4, 4), size=size)
    bound = Fp8Stack().bind(parts)
    x, dy = tensors()
    exact_x = x.double().requires_grad_()
    exact = reference(exact_x, parts, base=False)
    (want,) = torch.autograd.grad(exact, exact_x, dy.double())
    assert sqnr(bound.product(x).y, exact.detach()) > 42
    assert sqnr(bound.input_gradient(dy)[0], want) > 42


@pytest.mark.parametrize("block", [1, 2])
def test_a_margin_without_one_of_its_parts_is_seen(block):
    parts = projections(linears(zero=True), (4, 4, 4))
    bound = Fp8Stack().bind(parts)
    x, _ = tensors()
    bound.product(x)
    memory = bound._memory
    at = K + block * memory.margin
    memory.matrix.view(torch.uint8)[:, at : at + memory.margin] = 0
    y, _ = bound.product(x)  # the factors are placed already
    assert sqnr(y, reference(x.double(), parts, base=False).detach()) < 36


def test_parameters_are_views_and_get_their_own_memory_back():
    layers, stack = linears(), Fp8Stack()
    before = [linear.weight.view(torch.uint8).clone() for linear in layers]
    parameters = [linear.weight for linear in layers]
    parts = projections(layers, (4, 4, 4))
    first = stack.bind(parts)._memory
    assert stack.bind(tuple(Projection(*part) for part in parts))._memory is first
    assert len({linear.weight.untyped_storage().data_ptr() for linear in layers}) == 1
    assert [linear.weight for linear in layers] == parameters
    x, _ = tensors()
    assert sqnr(layers[1](x), x.double() @ layers[1].dequantised().double().T) > 26
    stack.release()
    assert len({linear.weight.untyped_storage().data_ptr() for linear in layers}) == 3
    for linear, old in zip(layers, before, strict=True):
        assert linear.weight.is_contiguous() and torch.equal(linear.weight.view(torch.uint8), old)


def test_other_factors_other_margins_and_other_weights_are_seen():
    layers, stack = linears(), Fp8Stack()
    x, dy = tensors()
    parts = projections(layers, (4, 4, 4))
    stack.bind(parts).product(x)
    parts[0].b.data.mul_(3)  # no version counter moves
    for parts_now in (tuple(Projection(*part) for part in parts), projections(layers, (40, 8, 8))):
        bound = stack.bind(parts_now)
        assert sqnr(bound.product(x).y, reference(x.double(), parts_now).detach()) > 26
        exact_x = x.double().requires_grad_()
        (want,) = torch.autograd.grad(reference(exact_x, parts_now), exact_x, dy.double())
        assert sqnr(bound.input_gradient(dy)[0], want) > 26
    layers[1].weight_scale = layers[1].weight_scale * 2
    parts = projections(layers, (4, 4, 4))
    assert sqnr(stack.bind(parts).product(x).y, reference(x.double(), parts).detach()) > 26


@pytest.mark.parametrize("kept", [True, False])
def test_a_backward_after_the_forward_of_another_adapter(kept):
    """DPO runs the policy and then the reference through one layer before it goes backward."""
    layers, stack = linears(), Fp8Stack()
    layers[0].keeps_turned = kept
    policy, other = projections(layers, (4, 4, 4)), projections(layers, (4, 4, 4), size=0.3)
    x, dy = tensors()
    first = stack.bind(policy)
    first.product(x)
    want, _ = first.input_gradient(dy)
    second = stack.bind(other)
    second.product(x)
    second.input_gradient(dy)
    assert torch.equal(first.input_gradient(dy)[0], want)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (0, 0, 0)])
def test_weights_that_only_pass_share_a_room(ranks):
    """Two layers take turns in it, and compute the same as where each has one of its own."""
    layers = [linears(), [linear.requires_grad_(False) for linear in linears()]]
    for linear in layers[1]:
        linear.weight.data = linear.weight.view(torch.uint8).flip(0).contiguous().view(linear.weight.dtype)
        linear.weight_scale = linear.weight_scale.flip(0).contiguous()
    x, dy = tensors()
    found = []
    for is_passing in (True, False):
        stacks = [Fp8Stack(), Fp8Stack()]
        parts = [projections(copy.deepcopy(own), ranks) for own in layers]
        for stack in stacks:
            stack.is_passing = is_passing
        first, second = (stack.bind(own) for stack, own in zip(stacks, parts, strict=True))
        assert (first._memory.room is second._memory.room) == is_passing
        found.append([first.product(x).y, second.product(x).y, first.product(x).y])
        found[-1] += [bound.input_gradient(dy)[0] for bound in (second, first)]
        storages = {linear.weight.untyped_storage().data_ptr() for linear, *_ in parts[0]}
        assert len(storages) == (3 if is_passing else 1)  # whose memory is not touched, or moves together
        for linear, *_ in parts[0]:  # gathered anew, elsewhere
            linear.weight.data = linear.weight.data.clone()
        assert first.renew() == is_passing
        assert not is_passing or torch.equal(first.product(x).y, found[-1][0])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][1]) and torch.equal(found[0][0], found[0][2])


def test_the_projection_knows_its_kind():
    linear = Fp8Linear(K, 32, dtype=torch.bfloat16).quantise_()
    found = read_projection(linear)
    assert isinstance(found, Projection) and found.is_fp8 and not found.is_packed
    assert found.dtype == torch.bfloat16
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight.view(torch.uint8), linear.weight.view(torch.uint8))
