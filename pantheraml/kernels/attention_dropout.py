"""Dropout of attention's probabilities; the mask is a function of (seed of the head, token of the query, offset).

    P' = M * softmax(scale Q K^T + bias) / (1 - p)        O = P' V

M is drawn bit by bit (``drop_bits``): it does not say where in the batch a sample lies, or what it was cut off from.

Probabilities are not kept: the backward computes them and masks again, on a GPU by tiles (``dropping_tiles``), else
some heads at a time.

Shapes: q (B, H, T, D), k (B, H, S, D), v (B, H, S, E), probabilities (B, H, T, S), keys (B, T); S = T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.drop_bits import drawn_bits, signed, unpacked
from pantheraml.kernels.dropping_tiles import Tiles, takes

# Probabilities that are computed at a time.
_AT_A_TIME = 2**23


class HeadDropout(NamedTuple):
    """What is dropped of a layer's attention.

    Attributes:
        p: the share.
        seeds: of the heads, 64 bits each.
        keys: (B, T) int64: of each token; those that see each other lie side by side, as in their sample.
    """

    p: float
    seeds: tuple[int, ...]
    keys: Tensor

    def parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Heads, queries, and what their probabilities (B, heads, queries, S) are multiplied by, float32; in turn."""
        rows, tokens = self.keys.shape
        queries = max(1, min(tokens, _AT_A_TIME // (rows * tokens)))
        heads = max(1, min(len(self.seeds), _AT_A_TIME // (rows * tokens * queries)))
        keys, seeds = self.keys.contiguous(), signed(self.seeds, self.keys.device)
        for start in range(0, tokens, queries):
            some = range(start, min(start + queries, tokens))
            for first in range(0, len(self.seeds), heads):
                bits = drawn_bits(keys, seeds[first : first + heads], self.p, some)
                found = unpacked(bits, tokens, self.p, some)
                yield slice(first, first + found.shape[1]), slice(some.start, some.stop), found


class _Dropped(torch.autograd.Function):
    """Probabilities under their masks; the gradient is under the same ones."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, drop: HeadDropout) -> Tensor:
        """(B, H, T, S) of any floating dtype."""
        ctx.drop = drop
        out = torch.empty_like(probabilities)
        for heads, queries, factors in drop.parts():
            out[:, heads, queries] = (probabilities[:, heads, queries] * factors).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the probabilities."""
        return _Dropped.forward(ctx, gradient, ctx.drop), None


def dropped_probabilities(probabilities: Tensor, drop: HeadDropout) -> Tensor:
    """(B, H, T, S), some of them 0 and the others divided by ``1 - p``; differentiable."""
    found: Tensor = _Dropped.apply(probabilities, drop)
    return found


class _Mask(NamedTuple):
    """Who sees whom.

    Attributes:
        bias: (B, H, T, S): bool, True for what is seen, or what is added to the scores; None for nothing.
        causal: whether a query sees no later key.
        scale: of the scores.
    """

    bias: Tensor | None
    causal: bool
    scale: float

    def tiles(self, drop: HeadDropout) -> Tiles:
        """For the kernels."""
        seeds = signed(drop.seeds, drop.keys.device)
        return Tiles(self.bias, self.causal, self.scale, drop.p, seeds, drop.keys.contiguous())

    def probabilities(self, q: Tensor, k: Tensor, heads: slice, queries: slice) -> Tensor:
        """Of these heads and queries, float32 or wider; 0 for a query that sees no key."""
        scores = q[:, heads, queries] @ k[:, heads].transpose(-1, -2)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * self.scale
        if self.bias is not None:
            bias = self.bias[:, heads, queries]
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.causal:
            places = torch.arange(k.shape[2], device=k.device)
            scores = scores.masked_fill(places > places[queries, None], -math.inf)
        return scores.softmax(-1).masked_fill(scores == -math.inf, 0.0)


class _Attention(torch.autograd.Function):
    """O of q, k, v, which are what is kept; beside what tiles need."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: _Mask, drop: HeadDropout) -> Tensor:
        """(B, H, T, E), in the dtype of v."""
        ctx.tiles = mask.tiles(drop) if takes(q, v) else None
        if ctx.tiles is not None:
            out, lse = ctx.tiles.forward(q, k, v)
            ctx.save_for_backward(q, k, v, out, lse)
            return out
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.drop = mask, drop
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        for heads, queries, factors in drop.parts():
            some = mask.probabilities(q, k, heads, queries) * factors
            out[:, heads, queries] = some.to(v.dtype) @ v[:, heads]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of q, k and v; sums over queries are in float32 or wider."""
        if ctx.tiles is not None:
            return *ctx.tiles.backward(gradient, *ctx.saved_tensors), None, None
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for heads, queries, factors in ctx.drop.parts():
            exact = ctx.mask.probabilities(q, k, heads, queries)
            some = gradient[:, heads, queries]
            dv[:, heads] += (exact * factors).to(v.dtype).transpose(-1, -2) @ some
            change = (some @ v[:, heads].transpose(-1, -2)) * factors
            change = exact * (change - (change * exact).sum(-1, keepdim=True))
            change = (change * ctx.mask.scale).to(q.dtype)
            dq[:, heads, queries] = change @ k[:, heads]
            dk[:, heads] += change.transpose(-1, -2) @ q[:, heads, queries]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def dropping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drop: HeadDropout,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of which probabilities are dropped, as ``scaled_dot_product_attention`` has it; differentiable.

    Args:
        q: (B, H, T, D).
        k: (B, K, T, D); K divides H.
        v: (B, K, T, E).
        drop: the share, and what masks follow from.
        bias: broadcast to (B, H, T, T): bool, True for what is seen, or what is added to the scores.
        causal: whether a query sees no later key.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        (B, H, T, E). A query that sees no key has zeros.
    """
    device, heads = q.device.type, q.shape[1]
    if torch.is_autocast_enabled(device):
        q, k, v = (one.to(torch.get_autocast_dtype(device)) for one in (q, k, v))
    if k.shape[1] != heads:
        k, v = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (k, v))
    whole = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    mask = _Mask(whole, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    with torch.autocast(device, enabled=False):
        if bias is not None and bias.requires_grad:
            probabilities = mask.probabilities(q, k, slice(None), slice(None))
            return dropped_probabilities(probabilities, drop).to(v.dtype) @ v
        found: Tensor = _Attention.apply(q, k, v, mask, drop)
    return found
