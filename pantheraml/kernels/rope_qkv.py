"""Rotary positions for q, k and v side by side, in one launch; the formulas and what a head computes are in ``rope``.

Shapes: x (T, (heads + 2 kv_heads) * D), a product of three projections; biases (heads * D,), (kv_heads * D,) twice;
weights of the norms of q's and k's heads (D,) each; gradients of q, k and v (T, heads, D), (T, kv_heads, D) twice.

Small batches wait for the host, and what a launch costs there does not depend on how much is launched: every head of
the three tensors is a column of programs of one grid, and its place tells which tensor it belongs to. v is not turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pantheraml.kernels import rope_eager
from pantheraml.kernels.launch import jit, runs_triton, tl
from pantheraml.kernels.rms_norm import RMSNorm
from pantheraml.kernels.rope import (
    BLOCK_M,
    Rotary,
    head_shape,
    rotate_,
    turn_head,
    turn_head_back,
)

HeadNorms = tuple[RMSNorm, RMSNorm]  # of q and of k


# The branches repeat a head's code rather than choose among pointers: what the compiler knows of each tensor's
# alignment stays known, so every head is loaded and summed up as by the kernels of one tensor.
@jit
def _rotate_qkv_kernel(
    x_ptr, x_stride, y_ptr, y_stride, rows, heads, kv_heads, cos_ptr, sin_ptr, bias_q_ptr, bias_k_ptr, bias_v_ptr,
    w_q_ptr, eps_q, offset_q, w_k_ptr, eps_k, offset_k,
    BIAS_Q: tl.constexpr, BIAS_K: tl.constexpr, BIAS_V: tl.constexpr, NORM: tl.constexpr,
    CAST_FIRST_Q: tl.constexpr, CAST_FIRST_K: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    TAIL: tl.constexpr, TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + TAIL
    head = tl.program_id(0)
    k = heads * D
    v = (heads + kv_heads) * D
    if head < heads:
        turn_head(
            x_ptr, x_stride, y_ptr, y_stride, head, rows, cos_ptr, sin_ptr, bias_q_ptr, w_q_ptr, eps_q, offset_q,
            True, BIAS_Q, NORM, CAST_FIRST_Q, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip
    elif head < heads + kv_heads:
        turn_head(
            x_ptr + k, x_stride, y_ptr + k, y_stride, head - heads, rows, cos_ptr, sin_ptr,
            bias_k_ptr, w_k_ptr, eps_k, offset_k,
            True, BIAS_K, NORM, CAST_FIRST_K, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip
    else:
        turn_head(
            x_ptr + v, x_stride, y_ptr + v, y_stride, head - heads - kv_heads, rows, cos_ptr, sin_ptr,
            bias_v_ptr, w_k_ptr, eps_k, offset_k,
            False, BIAS_V, False, False, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip


@jit
def _rotate_qkv_back_kernel(
    dq_ptr, dq_token, dq_head, dk_ptr, dk_token, dk_head, dv_ptr, dv_token, dv_head, dx_ptr, dx_stride,
    rows, heads, kv_heads, cos_ptr, sin_ptr, x_ptr, x_stride, w_q_ptr, eps_q, offset_q, w_k_ptr, eps_k, offset_k,
    dw_ptr,
    NORM: tl.constexpr, CAST_FIRST_Q: tl.constexpr, CAST_FIRST_K: tl.constexpr, WITH_DW: tl.constexpr,
    HALF: tl.constexpr, LANES: tl.constexpr, TAIL: tl.constexpr, TAIL_LANES: tl.constexpr, COS_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dw (blocks of rows, heads + kv_heads, D) takes what each block adds to the gradients of the norms' weights."""
    D: tl.constexpr = 2 * HALF + TAIL
    head = tl.program_id(0)
    k = heads * D
    v = (heads + kv_heads) * D
    if head < heads:
        turn_head_back(
            dq_ptr, dq_token, dq_head, dx_ptr, dx_stride, head, rows, cos_ptr, sin_ptr,
            x_ptr, x_stride, w_q_ptr, eps_q, offset_q, dw_ptr, v,
            True, NORM, CAST_FIRST_Q, WITH_DW, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip
    elif head < heads + kv_heads:
        turn_head_back(
            dk_ptr, dk_token, dk_head, dx_ptr + k, dx_stride, head - heads, rows, cos_ptr, sin_ptr,
            x_ptr + k, x_stride, w_k_ptr, eps_k, offset_k, dw_ptr + k, v,
            True, NORM, CAST_FIRST_K, WITH_DW, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip
    else:
        turn_head_back(
            dv_ptr, dv_token, dv_head, dx_ptr + v, dx_stride, head - heads - kv_heads, rows, cos_ptr, sin_ptr,
            x_ptr, x_stride, w_k_ptr, eps_k, offset_k, dw_ptr, v,
            False, False, False, False, HALF, LANES, TAIL, TAIL_LANES, COS_WIDTH, BLOCK_M,
        )  # fmt: skip


def _for_each(
    rotary: Rotary, norms: HeadNorms | None
) -> tuple[tuple[Rotary, Rotary, None], Sequence[RMSNorm | None]]:
    """What turns q, k and v, and the norms of their heads."""
    return (rotary, rotary, None), (None, None, None) if norms is None else (*norms, None)


def rotate_qkv_(
    x: Tensor,
    widths: tuple[int, int, int],
    head_dim: int,
    rotary: Rotary,
    biases: Sequence[Tensor | None] = (None, None, None),
    norms: HeadNorms | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``rotate_`` for q, k and v: biases for all, head norms and turn for q and k.

    Args:
        x: (T, (heads + 2 kv_heads) * D), stride 1 along a row; changed: it holds the result, or with ``norms`` the sums
            of q and k (what it holds of v then is neither).
        widths: columns of q, k and v.
        head_dim: D.
        rotary: what turns q and k.
        biases: of q, k and v, each as wide as its tensor, or None.
        norms: of the heads of q and of k, or None.
        out: like x, for the result; needed with ``norms``.

    Returns:
        the result.
    """
    if out is None and all(bias is None for bias in biases):  # q and k alike, and v is there already
        rotate_(x[:, : widths[0] + widths[1]], head_dim, rotary)
        return x
    y = x if out is None else out
    if not runs_triton(x):
        turns, of_heads = _for_each(rotary, norms)
        parts = zip(x.split(widths, 1), turns, biases, of_heads, y.split(widths, 1), strict=True)
        for part, turn, bias, norm, target in parts:
            rotate_(part, head_dim, turn, bias, norm, target)
        return y
    rows, heads, kv_heads = x.shape[0], widths[0] // head_dim, widths[1] // head_dim
    heads_of_v = 0 if out is None and biases[2] is None else kv_heads
    bias_q, bias_k, bias_v = (x if bias is None else bias for bias in biases)
    q_norm, k_norm = norms or (RMSNorm(x, 0.0), RMSNorm(x, 0.0))
    _rotate_qkv_kernel[(heads + kv_heads + heads_of_v, -(-rows // BLOCK_M))](
        x, x.stride(0), y, y.stride(0), rows, heads, kv_heads, rotary.cos, rotary.sin, bias_q, bias_k, bias_v,
        *q_norm[:3], *k_norm[:3],
        BIAS_Q=biases[0] is not None, BIAS_K=biases[1] is not None, BIAS_V=biases[2] is not None,
        NORM=norms is not None, CAST_FIRST_Q=q_norm.cast_first, CAST_FIRST_K=k_norm.cast_first,
        **head_shape(head_dim, rotary),
    )  # fmt: skip
    return y


def rotate_qkv_back(
    grads: tuple[Tensor, Tensor, Tensor],
    rotary: Rotary,
    out: Tensor,
    norms: HeadNorms | None = None,
    x: Tensor | None = None,
    dw: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradients before the turn and the head norms: ``rotate_back`` for q, k and v.

    Args:
        grads: of q, k and v, (T, heads, D), (T, kv_heads, D) twice; any strides.
        rotary: what turned q and k.
        out: (T, (heads + 2 kv_heads) * D), stride 1 along a row; written.
        norms: as in ``rotate_qkv_``.
        x: with ``norms``: what ``rotate_qkv_`` left in its x.
        dw: (D,) float32 twice, or None: the gradients of the weights of ``norms`` are written here.

    Returns:
        out.
    """
    (rows, heads, head_dim), kv_heads = grads[0].shape, grads[1].shape[1]
    if not runs_triton(out):
        widths = [grad[0].numel() for grad in grads]
        raws = (None, None, None) if x is None else x.split(widths, 1)
        turns, of_heads = _for_each(rotary, norms)
        parts = zip(
            grads, turns, out.split(widths, 1), of_heads, raws, (*(dw or (None, None)), None), strict=True
        )
        for part in parts:
            rope_eager.backward(*part)
        return out
    dq, dk, dv = (grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads)
    q_norm, k_norm = norms or (RMSNorm(out, 0.0), RMSNorm(out, 0.0))
    raw = out if x is None else x
    blocks = -(-rows // BLOCK_M)
    shares = None if dw is None else out.new_empty(blocks, heads + kv_heads, head_dim, dtype=torch.float32)
    _rotate_qkv_back_kernel[(heads + 2 * kv_heads, blocks)](
        dq, *dq.stride()[:2], dk, *dk.stride()[:2], dv, *dv.stride()[:2], out, out.stride(0),
        rows, heads, kv_heads, rotary.cos, rotary.sin, raw, raw.stride(0), *q_norm[:3], *k_norm[:3],
        out if shares is None else shares,
        NORM=norms is not None, CAST_FIRST_Q=q_norm.cast_first, CAST_FIRST_K=k_norm.cast_first,
        WITH_DW=shares is not None, **head_shape(head_dim, rotary),
    )  # fmt: skip
    if dw is not None and shares is not None:
        for target, share in zip(dw, shares.split((heads, kv_heads), 1), strict=True):
            torch.sum(share, (0, 1), out=target)
    return out
