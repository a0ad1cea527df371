"""Attention that drops probabilities, by tiles (Dao et al. 2022): no probability is stored.

    S = scale Q K^T + bias      P = softmax(S)      O = (M * P) V / (1 - p)

    dV = (M * P)^T dO / (1 - p)             dP = M * (dO V^T) / (1 - p)
    dS = P * (dP - rowsum(dO * O))          dQ = scale dS K         dK = scale dS^T Q

The bits of M are drawn before a kernel reads them (``drop_bits``), again in the backward, of so many heads at a time
that they stay in the GPU's cache. Of each query log2 sum exp S is kept. Exponents are of 2: S is in units of log 2.

Shapes: q (B, H, T, D), k (B, H, T, D), v (B, H, T, E), bias (B, H, T, T) of any strides, keys (B, T), seeds (H,).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.drop_bits import drawn_bits
from pantheraml.kernels.keyed_dropout import threshold_and_scale
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

_LOG2_E = 1.4426950408889634
# Of heads whose tiles have room in shared memory.
_MOST_WIDTH = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
# Of bits at a time; an H200 has 50 MiB of cache.
_AT_A_TIME = 2**25
_MOST_PROGRAMS = 2**16 - 1  # along the second axis of a launch


@jit
def _tile(ptr, row, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    there = (row < tokens)[:, None] & (col < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * WIDTH + col[None, :], mask=there, other=0.0)


@jit
def _put(ptr, x, row, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    there = (row < tokens)[:, None] & (col < WIDTH)[None, :]
    tl.store(ptr + row[:, None] * WIDTH + col[None, :], x.to(ptr.dtype.element_ty), mask=there)


@jit
def _scores(s, row, col, tokens, bias_ptr, bias_row, bias_col, BIAS: tl.constexpr, CAUSAL: tl.constexpr):
    # row and col broadcast to s, which is scaled; what is not seen is -inf.
    seen = (col <= row) if CAUSAL else (col < tokens)
    if BIAS != "none":
        at = bias_ptr + row.to(tl.int64) * bias_row + col.to(tl.int64) * bias_col
        there = seen & (row < tokens)
        if BIAS == "seen":
            seen = seen & (tl.load(at, mask=there, other=0) != 0)
        else:
            s += tl.load(at, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634  # log2 e
    return tl.where(seen, s, float("-inf"))


@jit
def _halves(bits_ptr, row, tokens, word):
    # Of each row the bits of 64 keys, from key 64 word on.
    words, there, shift = (tokens + 126) // 64, row < tokens, ((-row) & 63).to(tl.uint64)
    at = bits_ptr + row.to(tl.int64) * words + word
    one = tl.load(at, mask=there, other=0).to(tl.uint64)
    two = tl.load(at + 1, mask=there & (word + 1 < words), other=0).to(tl.uint64)
    both = (one >> shift) | ((two << 1) << (63 - shift))
    return both.to(tl.uint32), (both >> 32).to(tl.uint32)


@jit
def _kept(low, high, place):
    word = tl.where(place < 32, low, high)
    return ((word >> (place & 31).to(tl.uint32)) & 1) != 0


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bits_ptr, bias_ptr, bias_b, bias_h, bias_row, bias_col, heads, first, some,
    tokens, scale, keep_scale, BIAS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // some).to(tl.int64), (first + tl.program_id(1) % some).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with most to do go first
    begin = (b * heads + h) * tokens
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + begin * D, row, tokens, D, BLOCK_D)
    bias_ptr += b * bias_b + h * bias_h
    bits_ptr += tl.program_id(1).to(tl.int64) * tokens * ((tokens + 126) // 64)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    end = tl.minimum(tokens, (tile + 1) * BLOCK_M) if CAUSAL else tokens
    for start in range(0, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + begin * D, col, tokens, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _scores(s, row[:, None], col[None, :], tokens, bias_ptr, bias_row, bias_col, BIAS, CAUSAL)
        larger = tl.maximum(most, tl.max(s, 1))
        above = tl.where(larger == float("-inf"), 0.0, larger)  # nothing is seen yet
        p = tl.exp2(s - above[:, None])
        shrunk = tl.exp2(most - above)
        total = total * shrunk + tl.sum(p, 1)
        low, high = _halves(bits_ptr, row, tokens, start // 64)
        p = tl.where(_kept(low[:, None], high[:, None], (col % 64)[None, :]), p, 0.0)
        v = _tile(v_ptr + begin * E, col, tokens, E, BLOCK_E)
        out = out * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = larger
    out = out * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    _put(out_ptr + begin * E, out, row, tokens, E, BLOCK_E)
    # Of a query that sees nothing, so that its probabilities are 0 in the backward.
    lse = tl.where(total == 0.0, float("inf"), most + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + begin + row, lse, mask=row < tokens)


@jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, bits_ptr, bias_ptr, bias_b, bias_h, bias_row,
    bias_col, heads, first, some, tokens, scale, keep_scale, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // some).to(tl.int64), (first + tl.program_id(1) % some).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    begin = (b * heads + h) * tokens
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + begin * D, row, tokens, D, BLOCK_D)
    dout = _tile(dout_ptr + begin * E, row, tokens, E, BLOCK_E)
    out = _tile(out_ptr + begin * E, row, tokens, E, BLOCK_E)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + begin + row, delta, mask=row < tokens)
    lse = tl.load(lse_ptr + begin + row, mask=row < tokens, other=float("inf"))
    bias_ptr += b * bias_b + h * bias_h
    bits_ptr += tl.program_id(1).to(tl.int64) * tokens * ((tokens + 126) // 64)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(tokens, (tile + 1) * BLOCK_M) if CAUSAL else tokens
    for start in range(0, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + begin * D, col, tokens, D, BLOCK_D)
        v = _tile(v_ptr + begin * E, col, tokens, E, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _scores(s, row[:, None], col[None, :], tokens, bias_ptr, bias_row, bias_col, BIAS, CAUSAL)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee") * keep_scale
        low, high = _halves(bits_ptr, row, tokens, start // 64)
        dp = tl.where(_kept(low[:, None], high[:, None], (col % 64)[None, :]), dp, 0.0)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    # scale is in units of log 2.
    _put(dq_ptr + begin * D, dq * (scale * 0.6931471805599453), row, tokens, D, BLOCK_D)


@jit
def _dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bits_ptr, bias_ptr, bias_b, bias_h, bias_row,
    bias_col, heads, first, some, tokens, scale, keep_scale, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Tiles are keys x queries, so that probabilities need not be turned for the products.
    b, h = (tl.program_id(1) // some).to(tl.int64), (first + tl.program_id(1) % some).to(tl.int64)
    begin = (b * heads + h) * tokens
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + begin * D, col, tokens, D, BLOCK_D)
    v = _tile(v_ptr + begin * E, col, tokens, E, BLOCK_E)
    bias_ptr += b * bias_b + h * bias_h
    bits_ptr += tl.program_id(1).to(tl.int64) * tokens * ((tokens + 126) // 64)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0, tokens, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _tile(q_ptr + begin * D, row, tokens, D, BLOCK_D)
        dout = _tile(dout_ptr + begin * E, row, tokens, E, BLOCK_E)
        lse = tl.load(lse_ptr + begin + row, mask=row < tokens, other=float("inf"))
        delta = tl.load(delta_ptr + begin + row, mask=row < tokens, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        s = _scores(s, row[None, :], col[:, None], tokens, bias_ptr, bias_row, bias_col, BIAS, CAUSAL)
        low, high = _halves(bits_ptr, row, tokens, tl.program_id(0) * BLOCK_N // 64)
        kept = _kept(low[None, :], high[None, :], (col % 64)[:, None])
        p = tl.exp2(s - lse[None, :])
        dv += tl.dot(tl.where(kept, p, 0.0).to(dout.dtype), dout, input_precision="ieee")
        dp = tl.where(kept, tl.dot(v, tl.trans(dout), input_precision="ieee") * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    _put(dk_ptr + begin * D, dk * (scale * 0.6931471805599453), col, tokens, D, BLOCK_D)
    _put(dv_ptr + begin * E, dv * keep_scale, col, tokens, E, BLOCK_E)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels compute attention of these: on a GPU, in a dtype and of heads that tiles have room for."""
    return runs_triton(q) and max(q.shape[-1], v.shape[-1]) <= _MOST_WIDTH.get(q.dtype, 0)


def _blocks(kernel: Any, widest: int, dtype: torch.dtype, small: bool) -> dict[str, int]:
    """Sides of tiles, of which those along keys divide 64, and what the compiler is told; measured on an H200."""
    wide = (widest > 64) + (widest > 128)  # of up to 64, 128, 256 numbers
    if dtype == torch.float32:
        queries = keys = (32, 16)[wide]
    elif small:
        queries = keys = (64, 32, 16)[wide]
    elif kernel is _dk_dv_kernel:
        queries, keys = ((64, 64), (32, 64), (32, 32))[wide]
    else:
        queries, keys = ((64, 64), (64, 32), (32, 32))[wide]
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4 if small or wide < 2 else 8}


@lru_cache(maxsize=16)
def _is_small(device: torch.device) -> bool:
    """Whether a program may use 64 KiB of shared memory and no more, as on Turing."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


class Tiles(NamedTuple):
    """What all three kernels are told.

    Attributes:
        bias: (B, H, T, T), bool or floating, None for nothing.
        causal: whether a query sees no later key.
        scale: of the scores.
        p: the share that is dropped.
        seeds: (H,) int64, on the device.
        keys: (B, T) int64, contiguous.
    """

    bias: Tensor | None
    causal: bool
    scale: float
    p: float
    seeds: Tensor
    keys: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """O (B, H, T, E) in the dtype of v, and log2 sum exp S (B, H, T) in float32."""
        q, k, v = (one.contiguous() for one in (q, k, v))
        out, lse = torch.empty_like(v), q.new_empty(q.shape[:3], dtype=torch.float32)
        for first, bits in self._bits():
            self._launch(_forward_kernel, first, bits, q, k, v, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v, in their dtypes."""
        q, k, v, dout = (one.contiguous() for one in (q, k, v, dout))
        delta, dq, dk, dv = (torch.empty_like(one) for one in (lse, q, k, v))
        for first, bits in self._bits():
            self._launch(_dq_kernel, first, bits, q, k, v, dout, out, lse, delta, dq)
            self._launch(_dk_dv_kernel, first, bits, q, k, v, dout, lse, delta, dk, dv)
        return dq, dk, dv

    def _bits(self) -> Iterator[tuple[int, Tensor]]:
        """First heads, and the bits of theirs and the following ones (B, heads, T, W); in turn."""
        batch, tokens = self.keys.shape
        heads = max(1, min(_AT_A_TIME // (batch * tokens * (tokens // 8 + 8)), _MOST_PROGRAMS // batch))
        for first in range(0, len(self.seeds), heads):
            seeds = self.seeds[first : first + heads]
            yield first, drawn_bits(self.keys, seeds, self.p, range(tokens), causal=self.causal)

    def _launch(self, kernel: Any, first: int, bits: Tensor, *tensors: Tensor) -> None:
        q, _, v = tensors[:3]
        (_, heads, tokens, width), out_width = q.shape, v.shape[-1]
        batch, some = bits.shape[:2]
        kind, bias, strides = "none", q, (0, 0, 0, 0)
        if self.bias is not None:
            is_seen = self.bias.dtype == torch.bool
            kind, bias = "seen" if is_seen else "added", self.bias.view(torch.uint8) if is_seen else self.bias
            strides = self.bias.stride()
        blocks = _blocks(kernel, max(width, out_width), q.dtype, _is_small(q.device))
        side = blocks["BLOCK_N" if kernel is _dk_dv_kernel else "BLOCK_M"]
        with launching_on(q):
            kernel[(-(-tokens // side), batch * some)](
                *tensors, bits, bias, *strides, heads, first, some, tokens, self.scale * _LOG2_E,
                threshold_and_scale(self.p)[1], BIAS=kind, CAUSAL=self.causal, D=width, E=out_width,
                BLOCK_D=_padded(width), BLOCK_E=_padded(out_width), **blocks,
            )  # fmt: skip
