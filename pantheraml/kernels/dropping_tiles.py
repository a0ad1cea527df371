"""Attention that drops probabilities, by tiles (Dao et al. 2022): nothing of the size rows x rows is stored.

    S = scale Q K^T + bias      P = softmax(S)      O = (M * P) V / (1 - p)

    dV = (M * P)^T dO / (1 - p)             dP = M * (dO V^T) / (1 - p)
    dS = P * (dP - rowsum(dO * O))          dQ = scale dS K         dK = scale dS^T Q

The mask M is that of ``attention_dropout``: its bits are drawn anew in each tile of each kernel, a call of the
generator for each probability, of which one part in eight is used. lse = log sum exp S of each query is kept.

Shapes: q (B, H, T, D), k (B, H, T, D), v (B, H, T, E), bias (B, H, T, T) of any strides, keys (B, T), seeds (H,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.keyed_dropout import LANES, ROUNDS, threshold_and_scale
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

_MOST_WIDTH = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@jit
def _factors(seed, low, high, far, threshold, keep_scale, LANES: tl.constexpr, ROUNDS: tl.constexpr):
    # As keyed_dropout's kernel draws column ``far`` of the row whose key is (low, high).
    zero = tl.zeros_like(far).to(tl.uint32)
    counter = ((far // (LANES * 8)) * LANES + far % LANES).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + low[:, None], zero + high[:, None], zero, ROUNDS)
    part = (far // LANES) % 8
    word = tl.where(part < 4, tl.where(part < 2, w0, w1), tl.where(part < 6, w2, w3))
    bits = (word >> (16 * (part % 2)).to(tl.uint32)) & 0xFFFF
    return tl.where(bits.to(tl.int32) >= threshold, keep_scale, 0.0)


@jit
def _scores(
    q, k, row, col, tokens, bias_ptr, bias_row, bias_col, scale, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    seen = (row < tokens)[:, None] & (col < tokens)[None, :]
    if CAUSAL:
        seen = seen & (col[None, :] <= row[:, None])
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    at = bias_ptr + row[:, None].to(tl.int64) * bias_row + col[None, :].to(tl.int64) * bias_col
    if BIAS == "seen":
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    if BIAS == "added":
        s += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@jit
def _tile(ptr, row, tokens, width, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    there = (row < tokens)[:, None] & (col < width)[None, :]
    return tl.load(ptr + row[:, None].to(tl.int64) * width + col[None, :], mask=there, other=0.0)


@jit
def _put(ptr, x, row, tokens, width, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    there = (row < tokens)[:, None] & (col < width)[None, :]
    at = ptr + row[:, None].to(tl.int64) * width + col[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=there)


@jit
def _distance(place, other, tokens):
    far = tl.abs(place[:, None] - other[None, :])
    return tl.minimum(far, tokens - 1).to(tl.int32)


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, keys_ptr, seeds_ptr, bias_b, bias_h, bias_row, bias_col, heads,
    tokens, width, out_width, scale, threshold, keep_scale, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = (b * heads + h) * tokens
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + first * width, row, tokens, width, BLOCK_D)
    key = tl.load(keys_ptr + b * tokens + row, mask=row < tokens, other=0)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    seed = tl.load(seeds_ptr + h)
    bias_ptr += b * bias_b + h * bias_h
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    end = tl.minimum(tokens, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else tokens
    for start in range(0, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + first * width, col, tokens, width, BLOCK_D)
        s = _scores(q, k, row, col, tokens, bias_ptr, bias_row, bias_col, scale, BIAS, CAUSAL)
        other = tl.load(keys_ptr + b * tokens + col, mask=col < tokens, other=0) & 0xFFFFFFFF
        far = _distance(key & 0xFFFFFFFF, other, tokens)
        larger = tl.maximum(most, tl.max(s, 1))
        above = tl.where(larger == float("-inf"), 0.0, larger)  # nothing is seen yet
        p = tl.exp(s - above[:, None])
        shrunk = tl.exp(most - above)
        total = total * shrunk + tl.sum(p, 1)
        p *= _factors(seed, low, high, far, threshold, keep_scale, LANES, ROUNDS)
        v = _tile(v_ptr + first * out_width, col, tokens, out_width, BLOCK_E)
        out = out * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = larger
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    _put(out_ptr + first * out_width, out, row, tokens, out_width, BLOCK_E)
    # Of a query that sees nothing, so that its probabilities are 0 in the backward.
    lse = tl.where(total == 0.0, float("inf"), most + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + first + row, lse, mask=row < tokens)


@jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, bias_ptr, keys_ptr, seeds_ptr, bias_b, bias_h, bias_row,
    bias_col, heads, tokens, width, out_width, scale, threshold, keep_scale, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = (b * heads + h) * tokens
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + first * width, row, tokens, width, BLOCK_D)
    dout = _tile(dout_ptr + first * out_width, row, tokens, out_width, BLOCK_E)
    at = first + row
    lse = tl.load(lse_ptr + at, mask=row < tokens, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=row < tokens, other=0.0)
    key = tl.load(keys_ptr + b * tokens + row, mask=row < tokens, other=0)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    seed = tl.load(seeds_ptr + h)
    bias_ptr += b * bias_b + h * bias_h
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(tokens, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else tokens
    for start in range(0, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + first * width, col, tokens, width, BLOCK_D)
        v = _tile(v_ptr + first * out_width, col, tokens, out_width, BLOCK_E)
        s = _scores(q, k, row, col, tokens, bias_ptr, bias_row, bias_col, scale, BIAS, CAUSAL)
        other = tl.load(keys_ptr + b * tokens + col, mask=col < tokens, other=0) & 0xFFFFFFFF
        far = _distance(key & 0xFFFFFFFF, other, tokens)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dp *= _factors(seed, low, high, far, threshold, keep_scale, LANES, ROUNDS)
        ds = tl.exp(s - lse[:, None]) * (dp - delta[:, None]) * scale
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _put(dq_ptr + first * width, dq, row, tokens, width, BLOCK_D)


@jit
def _dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, keys_ptr, seeds_ptr, bias_b, bias_h,
    bias_row, bias_col, heads, tokens, width, out_width, scale, threshold, keep_scale, BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = (b * heads + h) * tokens
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + first * width, col, tokens, width, BLOCK_D)
    v = _tile(v_ptr + first * out_width, col, tokens, out_width, BLOCK_E)
    other = tl.load(keys_ptr + b * tokens + col, mask=col < tokens, other=0) & 0xFFFFFFFF
    seed = tl.load(seeds_ptr + h)
    bias_ptr += b * bias_b + h * bias_h
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    begin = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    for start in range(begin, tokens, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _tile(q_ptr + first * width, row, tokens, width, BLOCK_D)
        dout = _tile(dout_ptr + first * out_width, row, tokens, out_width, BLOCK_E)
        at = first + row
        lse = tl.load(lse_ptr + at, mask=row < tokens, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=row < tokens, other=0.0)
        key = tl.load(keys_ptr + b * tokens + row, mask=row < tokens, other=0)
        low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
        s = _scores(q, k, row, col, tokens, bias_ptr, bias_row, bias_col, scale, BIAS, CAUSAL)
        far = _distance(key & 0xFFFFFFFF, other, tokens)
        factors = _factors(seed, low, high, far, threshold, keep_scale, LANES, ROUNDS)
        p = tl.exp(s - lse[:, None])
        dv += tl.dot(tl.trans((p * factors).to(dout.dtype)), dout, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee") * factors
        ds = p * (dp - delta[:, None]) * scale
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    _put(dk_ptr + first * width, dk, col, tokens, width, BLOCK_D)
    _put(dv_ptr + first * out_width, dv, col, tokens, out_width, BLOCK_E)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels compute attention of these: on a GPU, of no more than 32 bits, heads of up to 256 numbers."""
    return runs_triton(q) and q.dtype in _DTYPES and max(q.shape[-1], v.shape[-1]) <= _MOST_WIDTH


def signed(seeds: Sequence[int]) -> Tensor:
    """Seeds of 64 bits as int64, on the CPU."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds])


class Tiles(NamedTuple):
    """What all three kernels are told.

    Attributes:
        bias: (B, H, T, T), bool or floating, None for nothing.
        causal: whether a query sees no later key.
        scale: of the scores.
        p: the share that is dropped.
        seeds: (H,) int64, on the device.
        keys: (B, T) int64.
    """

    bias: Tensor | None
    causal: bool
    scale: float
    p: float
    seeds: Tensor
    keys: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """O (B, H, T, E) in the dtype of v, and lse (B, H, T) in float32."""
        q, k, v = (one.contiguous() for one in (q, k, v))
        out, lse = torch.empty_like(v), q.new_empty(q.shape[:3], dtype=torch.float32)
        with launching_on(q):
            self._launch(_forward_kernel, q, k, v, out, lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v, in their dtypes."""
        q, k, v, dout = (one.contiguous() for one in (q, k, v, dout))
        delta = (dout.float() * out.float()).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with launching_on(q):
            self._launch(_dq_kernel, q, k, v, dout, lse, delta, dq)
            self._launch(_dk_dv_kernel, q, k, v, dout, lse, delta, dk, dv)
        return dq, dk, dv

    def _launch(self, kernel: Any, *tensors: Tensor) -> None:
        q, _, v = tensors[:3]
        batch, heads, tokens, width = q.shape
        out_width = v.shape[-1]
        kind, bias, strides = "none", q, (0, 0, 0, 0)
        if self.bias is not None:
            is_seen = self.bias.dtype == torch.bool
            kind, bias = "seen" if is_seen else "added", self.bias.view(torch.uint8) if is_seen else self.bias
            strides = self.bias.stride()
        widest = max(width, out_width)
        block = 32 if widest > 128 or q.dtype == torch.float32 else 64
        sides = {
            name: max(16, 1 << (size - 1).bit_length()) for name, size in (("D", width), ("E", out_width))
        }
        kernel[(-(-tokens // block), batch * heads)](
            *tensors, bias, self.keys, self.seeds, *strides, heads, tokens, width, out_width, self.scale,
            *threshold_and_scale(self.p), BIAS=kind, CAUSAL=self.causal, BLOCK_M=block, BLOCK_N=block,
            BLOCK_D=sides["D"], BLOCK_E=sides["E"], LANES=LANES, ROUNDS=ROUNDS, num_warps=4 if widest <= 64 else 8,
        )  # fmt: skip
