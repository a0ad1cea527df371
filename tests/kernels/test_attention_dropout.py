"""Attention of which probabilities are dropped: torch's attention, the plain formula, its gradient, and its parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pantheraml.kernels import attention_dropout as op
from pantheraml.kernels.attention_dropout import HeadDropout, dropped_probabilities, dropping_attention
from pantheraml.kernels.keyed_dropout import philox

B, H, K, T, D, E = 2, 4, 2, 13, 8, 6
SEEDS = tuple(2**62 + 2 * head + 1 for head in range(H))


def keys(first=0, rows=B):
    """Of rows of T tokens, each a sample of its own."""
    return (torch.arange(3, 3 + rows)[:, None] << 32) | torch.arange(first, first + T)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, T, D), (B, K, T, D), (B, K, T, E)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [one.requires_grad_() for one in found]


def biases():
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[0, :, 4] = False  # a query that sees nothing
    added = torch.randn(H, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {
        "none": {},
        "causal": dict(causal=True),
        "bool": dict(bias=seen),
        "float": dict(bias=added, scale=0.3),
    }


def factors(p):
    """What probabilities are multiplied by, from the definition: one query and key at a time."""
    found = torch.zeros(B, H, T, T)
    for batch, head, query, key in itertools.product(*map(range, found.shape)):
        row, column = keys()[batch, query], torch.tensor(key - query)
        words = philox(
            [(column >> 3) & 0xFFFFFFFF, row & 0xFFFFFFFF, row >> 32, torch.tensor(0)], SEEDS[head]
        )
        bits = (int(words[int(column) % 8 // 2]) >> int(column) % 2 * 16) & 0xFFFF
        found[batch, head, query, key] = (bits >= round(p * 2**16)) / (1 - p)
    return found.double()


def plain(q, k, v, factors, bias=None, causal=False, scale=None):
    k, v = (one.repeat_interleave(H // K, dim=1) for one in (k, v))
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) * factors @ v


@pytest.mark.parametrize("kind", biases())
def test_without_dropout_it_is_torchs(kind):
    q, k, v = inputs()
    how = biases()[kind]
    told = dict(attn_mask=how.get("bias"), is_causal=how.get("causal", False), scale=how.get("scale"))
    wanted = scaled_dot_product_attention(q, k, v, enable_gqa=True, **told)
    found = dropping_attention(q, k, v, HeadDropout(0.0, SEEDS, keys()), **how)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 3 * B * T, op._AT_A_TIME])
@pytest.mark.parametrize("kind", biases())
def test_values_and_gradients_are_those_of_the_formula(kind, at_a_time, monkeypatch):
    monkeypatch.setattr(op, "_AT_A_TIME", at_a_time)
    how, results = biases()[kind], []
    for compute, drop in ((plain, factors(0.25)), (dropping_attention, HeadDropout(0.25, SEEDS, keys()))):
        q, k, v = inputs()
        out = compute(q, k, v, drop, **how)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
        results.append([out, *(gradient.nan_to_num(0.0) for gradient in gradients)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_bias_that_is_trained_has_a_gradient():
    results = []
    for compute, drop in ((plain, factors(0.25)), (dropping_attention, HeadDropout(0.25, SEEDS, keys()))):
        q, k, v = inputs()
        bias = biases()["float"]["bias"].clone().requires_grad_()
        out = compute(q, k, v, drop, bias=bias)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_probabilities_of_a_model_are_under_the_same_masks():
    probabilities = torch.rand(B, H, T, T, dtype=torch.float64).requires_grad_()
    drop = HeadDropout(0.25, SEEDS, keys())
    found = dropped_probabilities(probabilities, drop)
    torch.testing.assert_close(found, probabilities * factors(0.25), rtol=1e-7, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), probabilities)
    torch.testing.assert_close(gradient, factors(0.25), rtol=1e-7, atol=0)


def test_masks_follow_tokens_wherever_they_are():
    """Behind padding, in another row, cut off from what was before them: the places begin elsewhere."""
    whole = torch.zeros(1, H, T, T)
    [(_, _, one)] = HeadDropout(0.5, SEEDS, keys(rows=1)).parts()
    whole += one
    padded = torch.cat([keys(rows=1)[:, :1].expand(1, 3), keys(rows=1)[:, :-3]], dim=1)
    [(_, _, found)] = HeadDropout(0.5, SEEDS, padded).parts()
    assert torch.equal(found[:, :, 3:, 3:], whole[:, :, :-3, :-3])
    [(_, _, found)] = HeadDropout(0.5, SEEDS, keys(rows=1)[:, 5:]).parts()
    assert torch.equal(found, whole[:, :, 5:, 5:])
    [(_, _, found)] = HeadDropout(
        0.5, SEEDS, torch.cat([keys(7, 1)[:, :4] + (9 << 32), keys(rows=1)], 1)
    ).parts()
    assert torch.equal(found[:, :, 4:, 4:], whole)
    assert len({tuple(head.flatten().tolist()) for head in whole[0]}) == H, "heads have masks of their own"
    assert abs(float((whole == 0).float().mean()) - 0.5) < 0.05
    assert not torch.equal(whole, whole.transpose(-1, -2)), "a key before a query is not one behind it"


def test_16_bits_are_as_near_as_torchs():
    drop = HeadDropout(0.25, SEEDS, keys())
    exact = dropping_attention(*inputs(), drop, causal=True).detach()
    found = dropping_attention(*inputs(torch.bfloat16), drop, causal=True).detach()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        cast = dropping_attention(*inputs(torch.float32), drop, causal=True)
    torch.testing.assert_close(cast.detach(), found)
