"""RMSNorm: ``y = x / rms(x) * (offset + weight)`` over the last dim.

Shapes: x (..., N) with stride 1 or not, weight (N,); any number of rows, also none.

Forward, in float32 (``cast`` rounds to the dtype of x):
    rstd  = 1 / sqrt(mean(x^2) + eps)
    x_hat = x * rstd
    y     = cast(x_hat) * (offset + weight)     cast_first: Llama and most others; y has the dtype
                                                that x and weight promote to
    y     = cast(x_hat * (offset + weight))     otherwise: Gemma (offset 1) and gpt_oss

Backward, with g = dy * (offset + weight), everything in float32:
    dx = rstd * (g - x_hat * mean(g * x_hat))
    dw = sum over rows of dy * x_hat            (of dy * cast(x_hat) with cast_first)

rstd is cheap to have again from x, which the backward reads anyway, so only x and weight are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, runs_triton, tl, triton
from pantheraml.kernels.row_tiles import as_rows, num_processors, row_tile


class RMSNorm(NamedTuple):
    """A norm as fused functions pass it: weight (N,), and the settings that ``rms_norm`` explains."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    cast_first: bool = True

    @property
    def is_trained(self) -> bool:
        """Whether the weight gets a gradient."""
        return self.weight.requires_grad


# Longest row one program holds; longer ones take the plain PyTorch path.
MAX_COLUMNS = 65536


@jit
def _forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_stride,
    y_stride,
    rows,
    cols,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (col < cols)[None, :]
    row = row.to(tl.int64)[:, None]  # rows x cols can pass 2^31

    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
    x = tl.load(x_ptr + row * x_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    x_hat = x * tl.rsqrt(tl.sum(x * x, axis=1) / cols + eps)[:, None]
    if CAST_FIRST:
        x_hat = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = x_hat * w[None, :]
    tl.store(y_ptr + row * y_stride + col[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    dw_ptr,
    dy_stride,
    x_stride,
    rows,
    cols,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    WITH_DW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program walks over blocks of rows and leaves one row of partial sums in dw (programs, N)."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)

    for start in range(program * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * x_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / cols + eps)[:, None]
        x_hat = x * rstd
        if WITH_DW:
            rounded = x_hat
            if CAST_FIRST:
                rounded = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
            dw += tl.sum(dy * rounded, axis=0)
        g = dy * w[None, :]
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=1) / cols)[:, None])
        tl.store(dx_ptr + row * cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)

    if WITH_DW:
        tl.store(dw_ptr + program.to(tl.int64) * cols + col, dw, mask=col < cols)


def triton_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, out: Tensor | None = None
) -> Tensor:
    """The forward by Triton; arguments as ``rms_norm_into`` and ``rms_norm``."""
    y = _empty_output(x, weight, cast_first) if out is None else out
    rows = as_rows(x)
    blocks = row_tile(x.shape[-1])
    programs = -(-rows.shape[0] // blocks["BLOCK_M"])
    y_stride = x.shape[-1] if out is None else out.stride(0)
    _forward_kernel[(programs,)](
        rows, weight, y, rows.stride(0), y_stride, *rows.shape, eps, offset, CAST_FIRST=cast_first, **blocks
    )
    return y


def triton_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    """The backward by Triton: dx like x, and dw like weight (empty unless ``with_dw``)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy_rows, rows = as_rows(dy), as_rows(x)
    blocks = row_tile(x.shape[-1])
    programs = -(-rows.shape[0] // blocks["BLOCK_M"])
    if with_dw:
        # Few programs with many rows each: their partial sums are added up afterwards, in a fixed order.
        programs = min(programs, 4 * num_processors(x.device))
    partial = torch.empty((programs if with_dw else 0, weight.numel()), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dy_rows,
        rows,
        weight,
        dx,
        partial,
        dy_rows.stride(0),
        rows.stride(0),
        *rows.shape,
        eps,
        offset,
        CAST_FIRST=cast_first,
        WITH_DW=with_dw,
        **blocks,
    )
    return dx, partial.sum(0).to(weight.dtype) if with_dw else weight.new_empty(0)


def _empty_output(x: Tensor, weight: Tensor, cast_first: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _eager_forward(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """The forward in plain PyTorch, rounding where and in the order transformers does."""
    x_hat = x.to(torch.float32)
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        scale = weight + offset if offset else weight
        return (scale * x_hat.to(x.dtype)).contiguous()
    scale = weight.to(torch.float32)
    return (x_hat * (offset + scale if offset else scale)).to(x.dtype).contiguous()


def _eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    """The backward in plain PyTorch, in float32 throughout."""
    x32, dy32 = x.to(torch.float32), dy.to(torch.float32)
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = x32 * rstd
    g = dy32 * (weight.to(torch.float32) + offset)
    dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    if not with_dw:
        return dx.to(x.dtype).contiguous(), weight.new_empty(0)
    rounded = x_hat.to(x.dtype).to(torch.float32) if cast_first else x_hat
    dw = (dy32 * rounded).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)


def _fits_triton(x: Tensor) -> bool:
    return triton is not None and x.numel() > 0 and x.shape[-1] <= MAX_COLUMNS


@torch.library.custom_op("pantheraml::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    return _eager_forward(x, weight, eps, offset, cast_first)


@_rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    with torch.cuda.device(x.device):
        forward = triton_forward if _fits_triton(x) else _eager_forward
        return forward(x, weight, eps, offset, cast_first)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    return _empty_output(x, weight, cast_first)


@torch.library.custom_op("pantheraml::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    return _eager_backward(dy, x, weight, eps, offset, cast_first, with_dw)


@_rms_norm_backward.register_kernel("cuda")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(x.device):
        backward = triton_backward if _fits_triton(x) else _eager_backward
        return backward(dy, x, weight, eps, offset, cast_first, with_dw)


@_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(weight.shape if with_dw else (0,), dtype=weight.dtype, device=x.device)


def _keep(ctx, inputs, output) -> None:
    x, weight, *options = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = options


def _differentiate(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    with_dw = ctx.needs_input_grad[1]
    dx, dw = _rms_norm_backward(dy, x, weight, *ctx.options, with_dw)
    return dx, dw if with_dw else None, None, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_keep)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    """RMSNorm over the last dim, computed in float32.

    Args:
        x: (..., N), any floating dtype and strides.
        weight: (N,), any floating dtype; without ``requires_grad`` no gradient is computed for it.
        eps: added to the mean of squares.
        offset: added to the weight, 0 or 1.
        cast_first: round the normalised x to its dtype before the weight multiplies it (Llama), or only
            the product (Gemma, gpt_oss).

    Returns:
        (..., N), contiguous; the dtype x and weight promote to with ``cast_first``, else that of x. On CPU
        it equals what transformers computes, bit by bit.
    """
    return _rms_norm(x, weight, eps, offset, cast_first)


def rms_norm_into(out: Tensor, x: Tensor, norm: RMSNorm) -> Tensor:
    """``rms_norm`` of x (T, N) without a gradient, written to ``out`` (T, N), stride 1 along a row; returns out."""
    if runs_triton(x) and _fits_triton(x):
        return triton_forward(x, *norm, out)
    return out.copy_(_eager_forward(x, *norm))
