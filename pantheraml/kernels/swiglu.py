"""SwiGLU and GeGLU: ``act(g) * u``.

Shapes: g, u, y (T, N), each with stride 1 along a row and any stride between rows.

Forward, in float32 per tile, rounded once:
    y  = silu(g) * u                (gelu_tanh(g) * u for Gemma, gelu(g) * u by the error function)

Backward, with dy (T, N):
    dg = dy * u * act'(g)
    du = dy * act(g)
    y  is recomputed on the way, because the gradient of the next product's LoRA needs it
    silu'(g) = s + g s (1 - s) with s = sigmoid(g);  gelu'(g) = Phi(g) + g phi(g) of the normal distribution
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pantheraml.errors import ConfigError
from pantheraml.kernels.elementary import sigmoid
from pantheraml.kernels.launch import jit, launching_on, runs_triton, tl

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@jit
def _activate(g, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(g) and act'(g); ACTIVATION counts in ACTIVATIONS, EXACT is for results in float32."""
    if ACTIVATION == 2:
        normal = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        value = g * normal
        slope = normal + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == 0 and not EXACT:
        s = tl.sigmoid(g)
        value = g * s
        slope = s + value * (1 - s)
    else:
        x, rise = g, 1.0
        if ACTIVATION == 1:  # 0.5 (1 + tanh(x)) is sigmoid(2x)
            x = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            rise = 1.5957691216057308 * (1 + 3 * 0.044715 * g * g)
        s, rest, other = sigmoid(x, EXACT)
        value = g * s
        bend = value * other * rise
        if EXACT:
            value = tl.fma(g, s, g * rest)
            bend += rest
        slope = s + bend
    return value, slope


@jit
def _glu_forward_kernel(
    g_ptr, u_ptr, y_ptr, g_stride, u_stride, y_stride, rows, cols,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = row.to(tl.int64)[:, None]
    there = (row < rows)[:, None] & (col < cols)[None, :]
    g = tl.load(g_ptr + line * g_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + line * u_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    value, _ = _activate(g, ACTIVATION, y_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + line * y_stride + col[None, :], (value * u).to(y_ptr.dtype.element_ty), mask=there)


@jit
def _glu_backward_kernel(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, y_ptr, dy_stride, g_stride, u_stride, dg_stride, du_stride, y_stride,
    rows, cols, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = row.to(tl.int64)[:, None]
    there = (row < rows)[:, None] & (col < cols)[None, :]
    g = tl.load(g_ptr + line * g_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + line * u_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + line * dy_stride + col[None, :], mask=there, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACTIVATION, y_ptr.dtype.element_ty == tl.float32)
    element = dg_ptr.dtype.element_ty
    tl.store(dg_ptr + line * dg_stride + col[None, :], (dy * u * slope).to(element), mask=there)
    tl.store(du_ptr + line * du_stride + col[None, :], (dy * value).to(element), mask=there)
    tl.store(y_ptr + line * y_stride + col[None, :], (value * u).to(element), mask=there)


_FORWARD = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}
_BACKWARD = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}


def _grid(tensor: Tensor, blocks: dict[str, int]) -> tuple[int, int]:
    rows, cols = tensor.shape
    return (-(-cols // blocks["BLOCK_N"]), -(-rows // blocks["BLOCK_M"]))


def glu_forward(g: Tensor, u: Tensor, activation: str, out: Tensor) -> Tensor:
    """``act(g) * u``.

    Args:
        g: (T, N), stride 1 along a row; so are u and out.
        u: (T, N).
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"``.
        out: (T, N) in the dtype of g; written.

    Returns:
        out.
    """
    if not runs_triton(g):
        return out.copy_(_eager_activation(g.float(), activation)[0] * u.float())
    tensors = (g, u, out)
    _glu_forward_kernel[_grid(g, _FORWARD)](
        *tensors, *(tensor.stride(0) for tensor in tensors), *g.shape, ACTIVATION=ACTIVATIONS.index(activation),
        **_FORWARD,
    )  # fmt: skip
    return out


def glu_backward(
    dy: Tensor, g: Tensor, u: Tensor, activation: str, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Gradients of ``glu_forward`` and its value once more.

    Args:
        dy: (T, N), stride 1 along a row, as every tensor here.
        g: as in the forward; so are u and activation.
        u: (T, N).
        activation: as in the forward.
        out: dg, du and y, (T, N) each; written. dy itself may be one of them.
    """
    dg, du, y = out
    if not runs_triton(g):
        grads = _eager_backward(dy, g, u, activation)
        for target, value in zip(out, grads, strict=True):
            target.copy_(value)
        return
    tensors = (dy, g, u, dg, du, y)
    _glu_backward_kernel[_grid(g, _BACKWARD)](
        *tensors, *(tensor.stride(0) for tensor in tensors), *g.shape, ACTIVATION=ACTIVATIONS.index(activation),
        **_BACKWARD,
    )  # fmt: skip


def _eager_activation(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(g) and act'(g) of g in float32."""
    if activation == "silu":
        s = g.sigmoid()
        return g * s, s + g * s * (1 - s)
    if activation == "gelu":
        normal = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * normal, normal + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    outer = 2 * math.sqrt(2 / math.pi)
    x = outer * (g + 0.044715 * g**3)
    s = torch.sigmoid(x)
    return g * s, s + g * s * torch.sigmoid(-x) * outer * (1 + 3 * 0.044715 * g * g)


def _eager_backward(dy: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    dy, g, u = dy.float(), g.float(), u.float()
    value, slope = _eager_activation(g, activation)
    return dy * u * slope, dy * value, value * u


@torch.library.custom_op("pantheraml::glu", mutates_args=())
def _glu(g: Tensor, u: Tensor, activation: str) -> Tensor:
    with launching_on(g):
        return glu_forward(g, u, activation, torch.empty(g.shape, dtype=g.dtype, device=g.device))


@_glu.register_fake
def _(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return torch.empty(g.shape, dtype=g.dtype, device=g.device)


@torch.library.custom_op("pantheraml::glu_backward", mutates_args=())
def _glu_backward(dy: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dg, du, y = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(3))
    with launching_on(g):
        glu_backward(dy if dy.stride(1) == 1 else dy.contiguous(), g, u, activation, (dg, du, y))
    return dg, du


@_glu_backward.register_fake
def _(dy: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dg, du = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    return dg, du


def _keep(ctx, inputs, output) -> None:
    g, u, ctx.activation = inputs
    ctx.save_for_backward(g, u)


def _differentiate(ctx, dy: Tensor):
    return *_glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_differentiate, setup_context=_keep)


def glu(g: Tensor, u: Tensor, activation: str = "silu") -> Tensor:
    """``act(g) * u`` as one differentiable operation, for code of your own and for ``torch.compile``.

    Args:
        g: (..., N), any floating dtype.
        u: like g.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"``.

    Returns:
        Like g, contiguous.

    Raises:
        ConfigError: another activation, or g and u differ in shape or dtype.
    """
    if activation not in ACTIVATIONS or g.shape != u.shape or g.dtype != u.dtype:
        raise ConfigError(
            got=f"activation={activation!r}, g {tuple(g.shape)} {g.dtype}, u {tuple(u.shape)} {u.dtype}.",
            need=f"g and u are alike, and the activation is one of {', '.join(ACTIVATIONS)}.",
            fix="Use the gate's and the up projection's outputs of one MLP.",
        )
    rows = (x.reshape(-1, x.shape[-1]) for x in (g, u))
    left, right = (x if x.stride(1) == 1 else x.contiguous() for x in rows)
    return _glu(left, right, activation).view(g.shape)
