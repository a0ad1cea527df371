"""Attention's dropout by tiles under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pantheraml.kernels import dropping_tiles
from pantheraml.kernels.attention_dropout import HeadDropout, dropping_attention
from pantheraml.kernels.keyed_dropout import LANES, ROUNDS, kept_values

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
        "seen": dict(bias=seen),
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
        *[((2, 2, 37, 24, 16), kind) for kind in biases(1, 1, 5)],
        *[((1, 2, 70, 160, 40), kind) for kind in ("causal", "added")],
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


@triton.jit
def _column_kernel(
    far_ptr, out_ptr, seed, low, high, N: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr
):
    at = tl.arange(0, N)
    row = tl.zeros((1,), tl.int64)
    far = tl.load(far_ptr + at)[None, :]
    found = dropping_tiles._factors(
        seed, (row + low).to(tl.uint32), (row + high).to(tl.uint32), far, 2**15, 2.0, LANES, ROUNDS
    )
    tl.store(out_ptr + at[None, :], found)


def test_distances_past_a_group_of_columns():
    far, out = torch.arange(4096, dtype=torch.int32), torch.empty(4096)
    seed, key = 2**62 + 1, (3 << 32) + 9
    _column_kernel[(1,)](far, out, seed, key & 0xFFFFFFFF, key >> 32, N=4096, LANES=LANES, ROUNDS=ROUNDS)
    assert torch.equal(out > 0, kept_values(torch.tensor([key]), 4096, 0.5, seed)[0])


def test_a_wrong_kernel_is_seen(monkeypatch):
    tensors = make((1, 2, 37, 16, 16))
    drop = HeadDropout(0.3, SEEDS[:2], keys(1, 37))
    exact = results(tensors, torch.float64, drop, {})
    monkeypatch.setattr(dropping_tiles, "ROUNDS", 6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            results(tensors, torch.float32, drop, {})[0].double(), exact[0], rtol=1e-5, atol=2e-6
        )
