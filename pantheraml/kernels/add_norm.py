"""Residual add and the RMSNorm that follows; and the norm's backward with both gradients in it.

Shapes: x, y, s, h (T, N), with stride 1 along a row and any stride between rows; weight (N,).

Forward, in float32, s and h each rounded once:
    s = x + y
    h = s / rms(s) * (offset + weight)

Backward of ``h`` with respect to s, given dh (T, N) and the gradient ds that comes by the residual:
    g  = dh * (offset + weight)
    dx = ds + rstd * (g - s_hat * mean(g * s_hat))
    dw = sum over rows of dh * s_hat            only where the weight is trained; s_hat rounded as in the forward
    h  is recomputed on the way when asked for, because the gradients of what reads it need it
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl
from pantheraml.kernels.rms_norm import RMSNorm
from pantheraml.kernels.row_tiles import num_processors, row_tile


@jit
def _add_norm_kernel(
    x_ptr, y_ptr, s_ptr, h_ptr, w_ptr, x_stride, y_stride, s_stride, h_stride, rows, cols, eps, offset,
    CAST_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (col < cols)[None, :]
    line = row.to(tl.int64)[:, None]
    element = s_ptr.dtype.element_ty
    s = tl.load(x_ptr + line * x_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    s += tl.load(y_ptr + line * y_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    rounded = s.to(element)
    tl.store(s_ptr + line * s_stride + col[None, :], rounded, mask=there)
    s = rounded.to(tl.float32)
    s_hat = s * tl.rsqrt(tl.sum(s * s, axis=1) / cols + eps)[:, None]
    if CAST_FIRST:
        s_hat = s_hat.to(element).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
    tl.store(h_ptr + line * h_stride + col[None, :], (s_hat * w[None, :]).to(element), mask=there)


@jit
def _row_back(
    row, dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, dh_stride, ds_stride, s_stride, dx_stride, h_stride, w, cols, eps,
    RESIDUAL: tl.constexpr, KEEP_H: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the backward; returns its share of dw."""
    row = tl.cast(row, tl.int64)  # rows x columns can pass 2^31
    col = tl.arange(0, BLOCK)
    there = col < cols
    element = dx_ptr.dtype.element_ty
    s = tl.load(s_ptr + row * s_stride + col, mask=there, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * dh_stride + col, mask=there, other=0.0).to(tl.float32)
    g = dh * w
    rstd = tl.rsqrt(tl.sum(s * s, axis=0) / cols + eps)
    s_hat = s * rstd
    dx = rstd * (g - s_hat * (tl.sum(g * s_hat, axis=0) / cols))
    if RESIDUAL:
        dx += tl.load(ds_ptr + row * ds_stride + col, mask=there, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * dx_stride + col, dx.to(element), mask=there)
    if CAST_FIRST:
        s_hat = s_hat.to(element).to(tl.float32)
    if KEEP_H:
        tl.store(h_ptr + row * h_stride + col, (s_hat * w).to(element), mask=there)
    return dh * s_hat


@jit
def _norm_backward_kernel(
    dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, w_ptr, dh_stride, ds_stride, s_stride, dx_stride, h_stride, cols, eps,
    offset,
    RESIDUAL: tl.constexpr, KEEP_H: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
    _row_back(
        tl.program_id(0), dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, dh_stride, ds_stride, s_stride, dx_stride, h_stride,
        w, cols, eps, RESIDUAL, KEEP_H, CAST_FIRST, BLOCK,
    )  # fmt: skip


@jit
def _trained_norm_backward_kernel(
    dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, w_ptr, dw_ptr, dh_stride, ds_stride, s_stride, dx_stride, h_stride, rows,
    cols, eps, offset,
    RESIDUAL: tl.constexpr, KEEP_H: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program walks over rows and leaves the sum of their shares in a row of dw (programs, N)."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        dw += _row_back(
            row, dh_ptr, ds_ptr, s_ptr, dx_ptr, h_ptr, dh_stride, ds_stride, s_stride, dx_stride, h_stride, w, cols,
            eps, RESIDUAL, KEEP_H, CAST_FIRST, BLOCK,
        )  # fmt: skip
    tl.store(dw_ptr + program * cols + col, dw, mask=col < cols)


def add_norm(x: Tensor, y: Tensor, norm: RMSNorm, out: Tensor) -> Tensor:
    """``s = x + y`` and its norm.

    Args:
        x: (T, N): the residual.
        y: (T, N): what is added.
        norm: the norm.
        out: (T, N) in the dtype of x: h is written here.

    Returns:
        s: (T, N), contiguous, in the dtype of x.
    """
    if not runs_triton(x):
        s = torch.add(x, y)
        out.copy_(_eager_norm(s, norm)[-1])
        return s
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, cols = x.shape
    weight, eps, offset, cast_first = norm
    blocks, tensors = row_tile(cols), (x, y, s, out)
    _add_norm_kernel[(-(-rows // blocks["BLOCK_M"]),)](
        *tensors, weight, *(tensor.stride(0) for tensor in tensors), rows, cols, eps, offset,
        CAST_FIRST=cast_first, **blocks,
    )  # fmt: skip
    return s


def norm_backward(
    dh: Tensor,
    ds: Tensor | None,
    s: Tensor,
    norm: RMSNorm,
    out: Tensor,
    h: Tensor | None = None,
    dw: Tensor | None = None,
) -> Tensor:
    """The gradient of the norm's input, with the residual's gradient added.

    Args:
        dh: (T, N): gradient of the norm's output.
        ds: (T, N): gradient that comes by the residual, or None.
        s: (T, N): the norm's input.
        norm: the norm.
        out: (T, N) in the dtype of s; the gradient is written here.
        h: (T, N) in the dtype of s, or None: the norm's output is written here.
        dw: (N,) float32, or None: the gradient of the norm's weight is written here.

    Returns:
        out.
    """
    if not runs_triton(dh):
        return _eager_backward(dh, ds, s, norm, out, h, dw)
    rows, cols = s.shape
    weight, eps, offset, cast_first = norm
    block = 1 << (cols - 1).bit_length()
    tensors = (dh, dh if ds is None else ds, s, out, out if h is None else h)
    strides = [tensor.stride(0) for tensor in tensors]
    constants: dict[str, int] = dict(
        RESIDUAL=ds is not None, KEEP_H=h is not None, CAST_FIRST=cast_first, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    if dw is None:
        _norm_backward_kernel[(rows,)](*tensors, weight, *strides, cols, eps, offset, **constants)
        return out
    # Few programs with many rows each: their sums are added up afterwards, in a fixed order.
    programs = min(rows, 4 * num_processors(s.device))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=s.device)
    _trained_norm_backward_kernel[(programs,)](
        *tensors, weight, partial, *strides, rows, cols, eps, offset, **constants
    )
    torch.sum(partial, 0, out=dw)
    return out


def _eager_norm(s: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rstd, s_hat (float32), s_hat as it is rounded before the weight, and h (dtype of s)."""
    s32 = s.float()
    rstd = torch.rsqrt(s32.pow(2).mean(-1, keepdim=True) + norm.eps)
    s_hat = s32 * rstd
    rounded = s_hat.to(s.dtype).float() if norm.cast_first else s_hat
    return rstd, s_hat, rounded, (rounded * (norm.weight.float() + norm.offset)).to(s.dtype)


def _eager_backward(
    dh: Tensor,
    ds: Tensor | None,
    s: Tensor,
    norm: RMSNorm,
    out: Tensor,
    h: Tensor | None,
    dw: Tensor | None,
) -> Tensor:
    g = dh.float() * (norm.weight.float() + norm.offset)
    rstd, s_hat, rounded, output = _eager_norm(s, norm)
    dx = rstd * (g - s_hat * (g * s_hat).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.float()
    if h is not None:
        h.copy_(output)
    if dw is not None:
        torch.sum(dh.float() * rounded, 0, out=dw)
    return out.copy_(dx)


@torch.library.custom_op("pantheraml::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """s and h."""
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with launching_on(x):
        return add_norm(x, y, RMSNorm(weight, eps, offset, cast_first), h), h


@_add_norm.register_fake
def _(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    s, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return s, h


@torch.library.custom_op("pantheraml::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dh: Tensor, ds: Tensor, s: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> Tensor:
    out = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dh, ds = (x if x.stride(1) == 1 else x.contiguous() for x in (dh, ds))
    with launching_on(s):
        return norm_backward(dh, ds, s, RMSNorm(weight, eps, offset, cast_first), out)


@_add_norm_backward.register_fake
def _(
    dh: Tensor, ds: Tensor, s: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> Tensor:
    return torch.empty(s.shape, dtype=s.dtype, device=s.device)


def _keep(ctx, inputs, output) -> None:
    _, _, weight, *ctx.options = inputs
    ctx.save_for_backward(output[0], weight)


def _differentiate(ctx, ds: Tensor, dh: Tensor):
    s, weight = ctx.saved_tensors
    dw = None
    if ctx.needs_input_grad[2]:
        dw = torch.ops.pantheraml.rms_norm_backward(dh, s, weight, *ctx.options, True)[1]
    dx = _add_norm_backward(dh, ds, s, weight, *ctx.options)
    return dx, dx, dw, None, None, None


_add_norm.register_autograd(_differentiate, setup_context=_keep)


def residual_norm(x: Tensor, y: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """``s = x + y`` and the norm of s as one differentiable operation.

    Args:
        x: (..., N): the residual.
        y: like x: what is added.
        norm: the norm; its weight may be trained.

    Returns:
        s and h, like x and contiguous.
    """
    rows = (t.reshape(-1, t.shape[-1]) for t in (x, y))
    left, right = (t if t.stride(1) == 1 else t.contiguous() for t in rows)
    s, h = _add_norm(left, right, *norm)
    return s.view(x.shape), h.view(x.shape)
