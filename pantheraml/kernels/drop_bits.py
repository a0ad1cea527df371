"""Which probabilities of attention stay, a bit for each: a function of (seed of the head, query's token, key's offset).

The bit of query i and key j is that of column j - i in a row of random numbers that the query's token names. So it does
not say where in the batch a sample lies, behind how much padding, or what it was cut off from, as long as the tokens
that see each other lie side by side.

One call of Philox (Salmon et al. 2011; ``keyed_dropout``) gives 8 times 16 bits, for 8 neighbouring columns; calls
begin where 8 divides j - i. Row i is stored behind -i mod 64 bits of no meaning: bit j + (-i mod 64) is that of key j,
so that calls and bytes begin together, and where words of 64 bits begin follows from i alone.

Shapes: keys (B, T) int64 of the tokens; bits (B, H, Q, W) int64 of Q queries, W = ceil((T + 63) / 64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.keyed_dropout import ROUNDS, philox, threshold_and_scale
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

_BLOCKS = {"BLOCK_Q": 16, "BLOCK_C": 64, "num_warps": 4}


@jit
def _draw_kernel(
    out_ptr, keys_ptr, seeds_ptr, heads, tokens, first, queries, threshold, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    # One call fills one byte, of eight keys.
    at = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    call = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here, query, calls = at < queries, first + at, (tokens + 126) // 64 * 8
    if CAUSAL and tl.program_id(1) * BLOCK_C * 8 > first + (tl.program_id(0) + 1) * BLOCK_Q + 63:
        return  # nobody looks at later keys
    batch, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    key = tl.load(keys_ptr + batch * tokens + query, mask=here, other=0)
    zero = tl.zeros((BLOCK_Q, BLOCK_C), tl.uint32)
    counter = zero + (call[None, :] - ((query + 63) // 64 * 8)[:, None]).to(tl.uint32)
    low = zero + (key & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zero + (key >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seeds_ptr + head), counter, low, high, zero, ROUNDS)
    byte = tl.zeros((BLOCK_Q, BLOCK_C), tl.int32)
    for part in tl.static_range(8):
        word = w0 if part < 2 else (w1 if part < 4 else (w2 if part < 6 else w3))
        kept = ((word >> (16 * (part % 2))) & 0xFFFF).to(tl.int32) >= threshold
        byte |= tl.where(kept, 1 << part, 0)
    row = (tl.program_id(2).to(tl.int64) * queries + at) * calls
    there = here[:, None] & (call < calls)[None, :]
    tl.store(out_ptr + row[:, None] + call[None, :], byte.to(tl.uint8), mask=there)


def _eager_bits(keys: Tensor, seeds: Tensor, p: float, queries: range, calls: int) -> Tensor:
    """(B, H, Q, calls) uint8 by plain PyTorch, the same bits."""
    query = torch.arange(queries.start, queries.stop, device=keys.device)[:, None]
    counter = (torch.arange(calls, device=keys.device) - (query + 63) // 64 * 8) & 0xFFFFFFFF
    key = keys[:, queries.start : queries.stop, None]
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    found = []
    for seed in seeds.tolist():
        words = philox([counter, low, high, torch.zeros_like(low)], seed)
        parts = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16)]
        kept = [(part >= threshold_and_scale(p)[0]).byte() << bit for bit, part in enumerate(parts)]
        found.append(torch.stack(kept).sum(0, dtype=torch.uint8))
    return torch.stack(found, dim=1)


def drawn_bits(keys: Tensor, seeds: Tensor, p: float, queries: range, *, causal: bool = False) -> Tensor:
    """The bits of some queries.

    Args:
        keys: (B, T) int64, contiguous: each token's.
        seeds: (H,) int64: the heads', on the device of ``keys``.
        p: the share that is dropped.
        queries: of which tokens, Q of them.
        causal: bits of keys behind a query may be anything.

    Returns:
        (B, H, Q, W) int64, 1 for what stays.
    """
    (batch, tokens), heads = keys.shape, len(seeds)
    words = (tokens + 126) // 64
    if not runs_triton(keys):
        return _eager_bits(keys, seeds, p, queries, 8 * words).view(torch.int64)
    out = torch.empty(batch, heads, len(queries), words, dtype=torch.int64, device=keys.device)
    grid = (-(-len(queries) // _BLOCKS["BLOCK_Q"]), -(-8 * words // _BLOCKS["BLOCK_C"]), batch * heads)
    with launching_on(keys):
        _draw_kernel[grid](
            out.view(torch.uint8), keys, seeds, heads, tokens, queries.start, len(queries), threshold_and_scale(p)[0],
            CAUSAL=causal, ROUNDS=ROUNDS, **_BLOCKS,
        )  # fmt: skip
    return out


def unpacked(bits: Tensor, tokens: int, p: float, queries: range) -> Tensor:
    """What probabilities are multiplied by: (B, H, Q, T) float32, from bits (B, H, Q, W) that are not causal."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    each = ((bits.view(torch.uint8)[..., None] >> places) & 1).flatten(-2)
    query = torch.arange(queries.start, queries.stop, device=bits.device)[:, None]
    at = torch.arange(tokens, device=bits.device) + (-query) % 64
    return each.gather(-1, at.expand(*bits.shape[:3], tokens)) * threshold_and_scale(p)[1]


def signed(seeds: tuple[int, ...], device: torch.device) -> Tensor:
    """Seeds of 64 bits as int64 (H,) on a device; the host does not wait for it."""
    found = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds])
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
