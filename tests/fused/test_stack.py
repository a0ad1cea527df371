"""Stacked weights: the layers' Parameters are views of them, adapters act at once, and they can be given back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import factors
from pantheraml.models.fused.stack import Stack
from tests.fused.test_decoder_layer import ALL, build, run

T, K, SIZES = 9, 24, (40, 8, 16)


def linears(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Linear(K, n, bias=False, dtype=dtype).requires_grad_(False) for n in SIZES]


def projections(layers, ranks, scales=(1.0, 0.5, 2.0), seed=1):
    torch.manual_seed(seed)
    return tuple(
        Projection(
            layer,
            nn.Parameter(torch.randn(rank, K)) if rank else None,
            nn.Parameter(torch.randn(layer.out_features, rank)) if rank else None,
            scale if rank else 0.0,
        )
        for layer, rank, scale in zip(layers, ranks, scales, strict=True)
    )


def reference(x, parts):
    outputs = []
    for part in parts:
        y = x @ part.linear.weight.double().T
        if part.a is not None:
            y = y + part.scale * (x @ part.a.double().T) @ part.b.double().T
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 0, 70), (0, 0, 0), (0, 8, 0)])
@pytest.mark.parametrize("wide", [True, False])
def test_products_and_gradients(ranks, wide):
    parts = projections(linears(), ranks)
    bound = Stack().bind(parts)
    torch.manual_seed(2)
    x, dy = torch.randn(T, K), torch.randn(T, sum(SIZES))
    exact_x = x.double().requires_grad_()
    y = reference(exact_x, parts)
    wanted = [exact_x, *[f for f in factors(*parts) if f is not None]]
    exact = torch.autograd.grad(y, wanted, dy.double())
    given_x, given_dy = x, dy
    if wide:
        given_x, given_dy = bound.widened(x, K), bound.widened(dy, sum(SIZES))
        given_x[:, :K], given_dy[:, : sum(SIZES)] = x, dy
    ours, t = bound.product(given_x)
    dx, inner = bound.input_gradient(given_dy)
    grads = [g for g in bound.factor_gradients(given_dy, inner, given_x, t) if g is not None]
    assert (t is None) == (sum(ranks) == 0) == (inner is None)
    for a, b in zip((ours, dx, *grads), (y, *exact), strict=True):
        torch.testing.assert_close(a.double(), b.detach().double(), rtol=1e-5, atol=1e-4)
    if sum(ranks):
        torch.testing.assert_close(bound.inner(dy), inner)


def test_parameters_are_views_and_get_their_own_memory_back():
    layers = linears()
    before = [layer.weight.detach().clone() for layer in layers]
    parameters = [layer.weight for layer in layers]
    stack = Stack()
    stack.bind(projections(layers, (4, 4, 4)))
    storage = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storage) == 1 and [layer.weight for layer in layers] == parameters
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    stack.release()
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3
    assert all(layer.weight.is_contiguous() for layer in layers)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_weights_that_were_moved_or_replaced_are_stacked_anew():
    layers, stack = linears(), Stack()
    parts = projections(layers, (4, 4, 4))
    stack.bind(parts)
    layers[1].weight.data = torch.randn_like(layers[1].weight)
    x = torch.randn(T, K)
    assert torch.allclose(stack.bind(parts).product(x).y.double(), reference(x.double(), parts), atol=1e-5)
    wider = projections(layers, (40, 40, 40))
    assert torch.allclose(stack.bind(wider).product(x).y.double(), reference(x.double(), wider), atol=1e-4)


def test_factors_changed_behind_autograds_back_are_seen():
    layers, stack = linears(), Stack()
    parts = projections(layers, (4, 4, 4))
    stack.bind(parts).product(torch.randn(T, K))
    parts[0].b.data.mul_(3)  # no version counter moves
    parts = tuple(Projection(*part) for part in parts)
    x = torch.randn(T, K)
    assert torch.allclose(stack.bind(parts).product(x).y.double(), reference(x.double(), parts), atol=1e-5)


def test_a_backward_after_the_forward_of_another_adapter():
    """DPO runs the policy and then the reference through one layer before it goes backward."""
    layers, stack = linears(), Stack()
    policy, other = (projections(layers, (4, 4, 4), seed=seed) for seed in (1, 5))
    x, dy = torch.randn(T, K), torch.randn(T, sum(SIZES))
    first = stack.bind(policy)
    first.product(x)
    want, _ = first.input_gradient(dy)
    stack.bind(other).product(x)
    assert torch.equal(first.input_gradient(dy)[0], want)


def test_a_model_with_stacked_weights_saves_and_copies(tmp_path):
    model, patches = build("llama", ALL, True)
    plain, _ = build("llama", ALL, False)
    run(model)
    base = model.get_base_model()
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not weight.is_contiguous()
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin)[0], run(model)[0])
    state = model.state_dict()
    assert weight.is_contiguous() and all(value.is_contiguous() for value in state.values())
    run(model)
    assert not weight.is_contiguous()
    merged, reference_model = model.merge_and_unload(), plain.merge_and_unload()
    merged.save_pretrained(tmp_path / "ours")
    reference_model.save_pretrained(tmp_path / "theirs")
    again = type(merged).from_pretrained(tmp_path / "ours").state_dict()
    for name, value in type(merged).from_pretrained(tmp_path / "theirs").state_dict().items():
        assert torch.equal(again[name], value), name
    patches.revert()
    assert all(parameter.is_contiguous() for parameter in merged.parameters())


def test_memory_taken_under_inference_mode_serves_training():
    layers, stack = linears(), Stack()
    with torch.inference_mode():
        stack.bind(projections(layers, (4, 4, 4))).product(torch.randn(T, K))
    assert not any(layer.weight.is_inference() for layer in layers)
    layers[0].weight.data.add_(1.0)
    parts = projections(layers, (4, 4, 4))
    x = torch.randn(T, K)
    assert torch.allclose(stack.bind(parts).product(x).y.double(), reference(x.double(), parts), atol=1e-4)


def test_packed_weights_that_are_gathered_elsewhere_are_read_there():
    """Ranks that share weights out gather them for the forward, and for the backward to other memory."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = [bnb.nn.Linear4bit(64, n, bias=False, quant_type="nf4") for n in SIZES]
    for layer in layers:
        weight = torch.randn(layer.out_features, 64)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    stack, other = Stack(), Stack()
    stack.is_passing = other.is_passing = True
    bound = stack.bind(tuple(Projection(layer, None, None, 0.0) for layer in layers))
    dy = torch.randn(T, sum(SIZES))
    before, _ = bound.input_gradient(dy)
    neighbour = [copy.deepcopy(layer) for layer in layers]
    for _ in range(12):
        other.bind(tuple(Projection(layer, None, None, 0.0) for layer in neighbour)).input_gradient(dy)
        for layer in layers:
            old = layer.weight.data
            layer.weight.data = old.clone()
            old.zero_()
        assert torch.equal(bound.input_gradient(dy)[0], before)
