"""Attention's dropout by tiles under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import drop_bits, dropping_tiles
from pantheraml.kernels.attention_dropout import HeadDropout, dropping_attention

SEEDS = (2**62 + 1, 2**64 - 3, 5, 2**63)


def make(shape, dtype=torch.float32, kv_heads=2):
    """q, k, v, and the gradient of the result."""
    batch, heads, tokens, width, out_width = shape
    generator = torch.Generator().manual_seed(tokens)
    shapes = (
        (batch, heads, tokens, width), (batch, kv_heads, tokens, width), (batch, kv_heads, tokens, out_width),
        (batch, heads, tokens, out_width),
    )  # fmt: skip
    return [torch.randn(one, generator=generator).to(dtype) for one in shapes]


def keys(batch, tokens, cut=None):
    """Of rows of one sample each, or of two; the second one is a part that begins at place 7."""
    places = torch.arange(tokens)
    if cut is not None:
        places = torch.where(places < cut, places, places - cut + 7)
    return (torch.arange(1, batch + 1)[:, None] << 33) | places


def biases(batch, heads, tokens):
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(batch, 1, tokens, tokens, generator=generator) > 0.3
    seen[0, :, 4] = False  # a query that sees nothing
    added = torch.randn(heads, tokens, tokens, generator=generator)
    return {
        "none": {},
        "causal": dict(causal=True),
        "added": dict(bias=added, scale=0.3),
        "seen, causal": dict(bias=seen, causal=True),
    }


def results(tensors, dtype, drop, how):
    q, k, v = (one.to(dtype, copy=True).requires_grad_() for one in tensors[:3])
    bias = how.get("bias")
    if bias is not None and bias.dtype != torch.bool:
        how = how | dict(bias=bias.to(dtype))
    out = dropping_attention(q, k, v, drop, **how)
    out.backward(tensors[3].to(dtype))
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *[((2, 2, 37, 24, 16), kind) for kind in ("none", "seen, causal")],
        *[((1, 2, 70, 100, 40), kind) for kind in ("causal", "added")],
        ((1, 2, 1, 16, 16), "causal"),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_path(shape, kind):
    """Which computes in float64 here, and takes heads as they are."""
    batch, heads, tokens = shape[:3]
    drop = HeadDropout(0.3, SEEDS[:heads], keys(batch, tokens, cut=19 if tokens > 19 else None))
    how, tensors = biases(batch, heads, max(tokens, 5)), make(shape)
    how = {name: one[..., :tokens, :tokens] if name == "bias" else one for name, one in how[kind].items()}
    assert dropping_tiles.takes(tensors[0], tensors[2])
    for mine, exact in zip(
        results(tensors, torch.float32, drop, how), results(tensors, torch.float64, drop, how), strict=True
    ):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_in_16_bits():
    tensors = make((1, 4, 90, 32, 32), torch.float16)
    drop = HeadDropout(0.25, SEEDS, keys(1, 90))
    how = dict(causal=True)
    for mine, exact in zip(
        results(tensors, torch.float16, drop, how), results(tensors, torch.float64, drop, how), strict=True
    ):
        assert mine.dtype == torch.float16
        torch.testing.assert_close(mine.double(), exact, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "queries"), [(1, range(1)), (70, range(70)), (130, range(60, 70))])
def test_bits_are_those_of_plain_pytorch(tokens, queries, causal):
    seeds = drop_bits.signed(SEEDS, torch.device("cpu"))
    told = keys(2, tokens, cut=19 if tokens > 19 else None), seeds, 0.3, queries
    plain = drop_bits._eager_bits(*told, 8 * ((tokens + 126) // 64)).view(torch.int64)
    mine, exact = (
        drop_bits.unpacked(bits, tokens, 0.3, queries)
        for bits in (drop_bits.drawn_bits(*told, causal=causal), plain)
    )
    if causal:
        mine, exact = (one.tril(queries.start) for one in (mine, exact))
    assert torch.equal(mine, exact)


def test_heads_in_turn(monkeypatch):
    """As many at a time as their bits have room."""
    drop, tensors, results_of = HeadDropout(0.3, SEEDS, keys(1, 20)), make((1, 4, 20, 16, 16)), []
    for room in (1, dropping_tiles._AT_A_TIME):
        monkeypatch.setattr(dropping_tiles, "_AT_A_TIME", room)
        results_of.append(results(tensors, torch.float32, drop, dict(causal=True)))
    assert all(map(torch.equal, *results_of))


def test_a_wrong_kernel_is_seen(monkeypatch):
    tensors = make((1, 2, 37, 16, 16))
    drop = HeadDropout(0.3, SEEDS[:2], keys(1, 37))
    exact = results(tensors, torch.float64, drop, {})
    monkeypatch.setattr(dropping_tiles, "_LOG2_E", dropping_tiles._LOG2_E * 1.001)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            results(tensors, torch.float32, drop, {})[0].double(), exact[0], rtol=1e-5, atol=2e-6
        )
