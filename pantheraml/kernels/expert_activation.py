"""The gated activation between an expert's two products, and its gradient with the routing weight inside.

    silu:     v = silu(g) * u
    clamped:  v = (u' + 1) * g' * sigmoid(alpha * g')     g' = min(g, limit), u' = u kept within +-limit   (gpt_oss)

Shapes: gu (S, 2 I) holds g and u, side by side ([g | u]) or in turn (g0 u0 g1 u1 …); v (S, I).

Backward: dv (S, I) is the gradient of v before the routing weight w (S,) of its row. In float32, rounded once:
    dgu = w * dv * dv/dgu
    dw  = sum over I of dv * v        the gradient of w, because the row's output is w * (v W^T)
    wv  = w * v                       recomputed for the gradients of the product that follows
A clamped value has no gradient, a value on the limit has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, tl, triton

FORWARD_TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}
BACKWARD_TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}


class Gate(NamedTuple):
    """Which activation it is.

    Attributes:
        in_turn: g and u alternate, instead of lying side by side.
        clamped: gpt_oss's, with ``alpha`` and ``limit``; else SwiGLU.
        alpha: slope inside the sigmoid.
        limit: where g and u are cut off.
    """

    in_turn: bool = False
    clamped: bool = False
    alpha: float = 1.0
    limit: float = 0.0


@jit
def _gate(g, u, alpha, limit, CLAMPED: tl.constexpr):
    """v, dv/dg and dv/du in float32."""
    if CLAMPED:
        low = tl.minimum(g, limit)
        mid = tl.minimum(tl.maximum(u, -limit), limit)
        s = tl.sigmoid(alpha * low)
        swish = low * s
        value = (mid + 1) * swish
        dg = tl.where(g <= limit, (mid + 1) * (s + alpha * swish * (1 - s)), 0.0)
        du = tl.where((u >= -limit) & (u <= limit), swish, 0.0)
    else:
        s = tl.sigmoid(g)
        du = g * s
        value = du * u
        dg = u * (s + du * (1 - s))
    return value, dg, du


@jit
def _load_pair(
    gu_ptr, row, first, rows, cols, IN_TURN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """g and u of the columns from ``first`` on, (BLOCK_M, BLOCK_N) float32 each."""
    at = gu_ptr + row[:, None] * (2 * cols)
    if IN_TURN:  # read as they lie, side by side in memory, and taken apart in registers
        col = 2 * first + tl.arange(0, 2 * BLOCK_N)
        both = tl.load(at + col[None, :], mask=(row < rows)[:, None] & (col < 2 * cols)[None, :], other=0.0)
        g, u = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_N, 2)))
    else:
        col = first + tl.arange(0, BLOCK_N)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        g = tl.load(at + col[None, :], mask=there, other=0.0)
        u = tl.load(at + cols + col[None, :], mask=there, other=0.0)
    return g.to(tl.float32), u.to(tl.float32)


@jit
def _store_pair(
    gu_ptr, g, u, row, first, rows, cols, IN_TURN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Write g and u where ``_load_pair`` read them."""
    element = gu_ptr.dtype.element_ty
    at = gu_ptr + row[:, None] * (2 * cols)
    if IN_TURN:
        col = 2 * first + tl.arange(0, 2 * BLOCK_N)
        both = tl.reshape(tl.join(g.to(element), u.to(element)), (BLOCK_M, 2 * BLOCK_N))
        tl.store(at + col[None, :], both, mask=(row < rows)[:, None] & (col < 2 * cols)[None, :])
    else:
        col = first + tl.arange(0, BLOCK_N)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        tl.store(at + col[None, :], g.to(element), mask=there)
        tl.store(at + cols + col[None, :], u.to(element), mask=there)


@jit
def _forward_kernel(
    gu_ptr, v_ptr, rows, cols, alpha, limit,
    IN_TURN: tl.constexpr, CLAMPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    g, u = _load_pair(gu_ptr, row, first, rows, cols, IN_TURN, BLOCK_M, BLOCK_N)
    value, _, _ = _gate(g, u, alpha, limit, CLAMPED)
    col = first + tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(v_ptr + row[:, None] * cols + col[None, :], value.to(v_ptr.dtype.element_ty), mask=there)


@jit
def _backward_kernel(
    dv_ptr, gu_ptr, w_ptr, dgu_ptr, wv_ptr, dw_ptr, rows, cols, alpha, limit,
    IN_TURN: tl.constexpr, CLAMPED: tl.constexpr, WITH_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    w = tl.load(w_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, cols, BLOCK_N):
        g, u = _load_pair(gu_ptr, row, first, rows, cols, IN_TURN, BLOCK_M, BLOCK_N)
        col = first + tl.arange(0, BLOCK_N)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        narrow = row[:, None] * cols + col[None, :]
        dv = tl.load(dv_ptr + narrow, mask=there, other=0.0).to(tl.float32)
        value, dg, du = _gate(g, u, alpha, limit, CLAMPED)
        dw += dv * value
        _store_pair(dgu_ptr, w * dv * dg, w * dv * du, row, first, rows, cols, IN_TURN, BLOCK_M, BLOCK_N)
        if WITH_VALUE:
            tl.store(wv_ptr + narrow, (w * value).to(dgu_ptr.dtype.element_ty), mask=there)
    tl.store(dw_ptr + row, tl.sum(dw, axis=1), mask=row < rows)


def triton_activate(gu: Tensor, gate: Gate) -> Tensor:
    """Our kernel; arguments as ``activate``."""
    rows, cols = gu.shape[0], gu.shape[1] // 2
    v = torch.empty((rows, cols), dtype=gu.dtype, device=gu.device)
    grid = (-(-rows // FORWARD_TILE["BLOCK_M"]), -(-cols // FORWARD_TILE["BLOCK_N"]))
    _forward_kernel[grid](
        gu, v, rows, cols, gate.alpha, gate.limit, IN_TURN=gate.in_turn, CLAMPED=gate.clamped, **FORWARD_TILE
    )
    return v


def triton_activate_back(
    dv: Tensor, gu: Tensor, weights: Tensor, gate: Gate, with_value: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Our kernel; arguments as ``activate_back``."""
    rows, cols = dv.shape
    dgu = torch.empty_like(gu)
    value = torch.empty_like(dv) if with_value else None
    dw = torch.empty(rows, dtype=torch.float32, device=dv.device)
    _backward_kernel[(-(-rows // BACKWARD_TILE["BLOCK_M"]),)](
        dv, gu, weights, dgu, dv if value is None else value, dw, rows, cols, gate.alpha, gate.limit,
        IN_TURN=gate.in_turn, CLAMPED=gate.clamped, WITH_VALUE=with_value, **BACKWARD_TILE,
    )  # fmt: skip
    return dgu, dw, value


def _eager(gu: Tensor, gate: Gate) -> Tensor:
    """v in float32, differentiable."""
    gu = gu.float()
    g, u = (gu[:, ::2], gu[:, 1::2]) if gate.in_turn else gu.chunk(2, dim=1)
    if not gate.clamped:
        return torch.nn.functional.silu(g) * u
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + 1) * (g * torch.sigmoid(gate.alpha * g))


def _eager_back(
    dv: Tensor, gu: Tensor, weights: Tensor, gate: Gate, with_value: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.enable_grad():
        leaf = gu.detach().float().requires_grad_()
        v = _eager(leaf, gate)
        (dgu,) = torch.autograd.grad(v, leaf, dv.float() * weights.float()[:, None])
    v = v.detach()
    value = (v * weights.float()[:, None]).to(gu.dtype) if with_value else None
    return dgu.to(gu.dtype), (dv.float() * v).sum(1), value


def activate(gu: Tensor, gate: Gate) -> Tensor:
    """v (S, I) of gu (S, 2 I), contiguous; without autograd."""
    if gu.device.type == "cuda" and triton is not None:
        with torch.cuda.device(gu.device):
            return triton_activate(gu, gate)
    return _eager(gu, gate).to(gu.dtype)


def activate_back(
    dv: Tensor, gu: Tensor, weights: Tensor, gate: Gate, *, with_value: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gu and of the routing weights, and the weighted value once more.

    Args:
        dv: (S, I), contiguous: the gradient of v without the routing weight.
        gu: (S, 2 I), as in the forward.
        weights: (S,), contiguous, any floating dtype.
        gate: as in the forward.
        with_value: whether ``w * v`` is wanted.

    Returns:
        dgu (S, 2 I), dw (S,) float32, and wv (S, I) or None.
    """
    if gu.device.type == "cuda" and triton is not None:
        with torch.cuda.device(gu.device):
            return triton_activate_back(dv, gu, weights, gate, with_value)
    return _eager_back(dv, gu, weights, gate, with_value)


@torch.library.custom_op("pantheraml::expert_activation", mutates_args=())
def _expert_activation(gu: Tensor, in_turn: bool, clamped: bool, alpha: float, limit: float) -> Tensor:
    return activate(gu, Gate(in_turn, clamped, alpha, limit))


@_expert_activation.register_fake
def _(gu: Tensor, in_turn: bool, clamped: bool, alpha: float, limit: float) -> Tensor:
    return gu.new_empty((gu.shape[0], gu.shape[1] // 2))
