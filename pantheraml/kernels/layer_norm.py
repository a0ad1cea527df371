"""LayerNorm: ``y = (x - mean(x)) / std(x) * weight + bias`` over the last dim.

Shapes: x (..., N) with stride 1 or not, weight (N,), bias (N,) or None; any number of rows, also none.

Forward, in float32, rounded once to the dtype of x:
    rstd  = 1 / sqrt(mean((x - mean(x))^2) + eps)
    x_hat = (x - mean(x)) * rstd
    y     = x_hat * weight + bias

Backward, with g = dy * weight, everything in float32:
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dw = sum over rows of dy * x_hat
    db = sum over rows of dy

mean and rstd are cheap to have again from x, which the backward reads anyway, so only x and weight are kept.
Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), and the derivative written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl
from pantheraml.kernels.row_tiles import as_rows, num_processors, row_tile

# Longest row one program holds; longer ones take the plain PyTorch path.
MAX_COLUMNS = 65536


@jit
def _normalised(x, there, cols, eps):
    """x_hat, 0 outside the row, and rstd, of a tile of whole rows."""
    centred = tl.where(there, x - (tl.sum(x, axis=1) / cols)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / cols + eps)[:, None]
    return centred * rstd, rstd


@jit
def _layer_norm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, x_stride, rows, cols, eps,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (col < cols)[None, :]
    row = row.to(tl.int64)[:, None]  # rows x cols can pass 2^31
    x = tl.load(x_ptr + row * x_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    x_hat, _ = _normalised(x, there, cols, eps)
    y = x_hat * tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(b_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def _layer_norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, db_ptr, dy_stride, x_stride, rows, cols, eps,
    WITH_DW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program walks over blocks of rows and leaves one row of partial sums in dw and db (programs, N)."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(program * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        there = (row < rows)[:, None] & (col < cols)[None, :]
        row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * x_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
        x_hat, rstd = _normalised(x, there, cols, eps)
        if WITH_DW:
            dw += tl.sum(dy * x_hat, axis=0)
            db += tl.sum(dy, axis=0)
        g = dy * w
        along = (tl.sum(g * x_hat, axis=1) / cols)[:, None]
        dx = rstd * (g - (tl.sum(g, axis=1) / cols)[:, None] - x_hat * along)
        tl.store(dx_ptr + row * cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)
    if WITH_DW:
        at = program.to(tl.int64) * cols + col
        tl.store(dw_ptr + at, dw, mask=col < cols)
        tl.store(db_ptr + at, db, mask=col < cols)


def _triton_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, blocks = as_rows(x), row_tile(x.shape[-1])
    _layer_norm_kernel[(-(-rows.shape[0] // blocks["BLOCK_M"]),)](
        rows, weight, weight if bias is None else bias, y, rows.stride(0), *rows.shape, eps,
        BIAS=bias is not None, **blocks,
    )  # fmt: skip
    return y


def _triton_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy_rows, rows, blocks = as_rows(dy), as_rows(x), row_tile(x.shape[-1])
    programs = -(-rows.shape[0] // blocks["BLOCK_M"])
    if with_dw:
        # Few programs with many rows each: their partial sums are added up afterwards, in a fixed order.
        programs = min(programs, 4 * num_processors(x.device))
    sums = torch.empty((2, programs if with_dw else 0, x.shape[-1]), dtype=torch.float32, device=x.device)
    _layer_norm_backward_kernel[(programs,)](
        dy_rows, rows, weight, dx, sums[0], sums[1], dy_rows.stride(0), rows.stride(0), *rows.shape, eps,
        WITH_DW=with_dw, **blocks,
    )  # fmt: skip
    if not with_dw:
        return dx, weight.new_empty(0), weight.new_empty(0)
    return dx, sums[0].sum(0).to(weight.dtype), sums[1].sum(0).to(weight.dtype)


def _eager_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    shift = None if bias is None else bias.float()
    return functional.layer_norm(x.float(), weight.shape, weight.float(), shift, eps).to(x.dtype).contiguous()


def _eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x32, dy32 = x.float(), dy.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = centred * rstd
    g = dy32 * weight.float()
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dx = dx.to(x.dtype).contiguous()
    if not with_dw:
        return dx, weight.new_empty(0), weight.new_empty(0)
    width = x.shape[-1]
    dw, db = (dy32 * x_hat).reshape(-1, width).sum(0), dy32.reshape(-1, width).sum(0)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def _fits_triton(x: Tensor) -> bool:
    return runs_triton(x) and x.numel() > 0 and x.shape[-1] <= MAX_COLUMNS


@torch.library.custom_op("pantheraml::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    with launching_on(x):
        return (_triton_forward if _fits_triton(x) else _eager_forward)(x, weight, bias, eps)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("pantheraml::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dw and db like weight, (0,) unless ``with_dw``."""
    with launching_on(x):
        return (_triton_backward if _fits_triton(x) else _eager_backward)(dy, x, weight, eps, with_dw)


@_layer_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = weight.shape if with_dw else (0,)
    dw, db = (torch.empty(shape, dtype=weight.dtype, device=x.device) for _ in range(2))
    return dx, dw, db


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    _, for_weight, for_bias, _ = ctx.needs_input_grad
    dx, dw, db = _layer_norm_backward(dy, x, weight, ctx.eps, for_weight or for_bias)
    return dx, dw if for_weight else None, db.to(ctx.bias_dtype) if for_bias else None, None


_layer_norm.register_autograd(_differentiate, setup_context=_keep)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dim, computed in float32.

    Args:
        x: (..., N), any floating dtype and strides.
        weight: (N,), any floating dtype; without ``requires_grad`` no gradient is computed for it.
        bias: (N,) or None.
        eps: added to the variance.

    Returns:
        (..., N), contiguous, in the dtype of x.
    """
    return _layer_norm(x, weight, bias, eps)
