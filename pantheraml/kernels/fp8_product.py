"""Products with frozen FP8 weights, forward and for the input's gradient, by one set of e4m3 values.

Shapes: x (T, K) and dy (T, N) quantised by rows; W = Wq * w (N, K) with Wq in e4m3 and w (N,) float32, so one scale
for each output.

    y  = (xq Wq^T) * scale_t * w_n                accumulated in float32, given in bfloat16
    dx = (quantised(dy * w) Wq) * scale_t         the weight's scales go into dy before it is quantised

A scale may never vary along the summed dim. For y the weight's scales belong to an output; for dx they would belong to
the sum, so they are taken into dy, which costs no accuracy (28.5 dB against 28.6 dB with a second set of weights that
has scales of its own) and no pass. Hopper's e4m3 products want both operands with the summed dim contiguous, so dx
reads Wq turned (K, N): the same bytes, turned when needed (2 bytes of traffic each) or kept beside the others.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pantheraml.kernels.fp8 import DTYPE, Fp8Rows, quantise_rows
from pantheraml.kernels.launch import jit, tl, triton

# Sums inside the tensor core alone, without float32 sums beside it: an error well below FP8's own.
FAST_ACCUMULATION = True
_TURN = {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8}


@jit
def _turn_kernel(
    w_ptr, out_ptr, rows, cols, stride, out_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = tl.load(
        w_ptr + n.to(tl.int64)[:, None] * stride + k[None, :],
        mask=(n < rows)[:, None] & (k < cols)[None, :],
        other=0,
    )
    tl.store(
        out_ptr + k.to(tl.int64)[:, None] * out_stride + n[None, :],
        tl.trans(tile),
        mask=(k < cols)[:, None] & (n < rows)[None, :],
    )


def triton_turn(weight: Tensor, out: Tensor) -> None:
    """``turn`` by Triton."""
    source, target = weight.view(torch.uint8), out.view(torch.uint8)
    rows, cols = source.shape
    grid = (-(-cols // _TURN["BLOCK_K"]), -(-rows // _TURN["BLOCK_N"]))
    _turn_kernel[grid](source, target, rows, cols, source.stride(0), target.stride(0), **_TURN)


def turn(weight: Tensor, out: Tensor) -> Tensor:
    """``out`` (K, N) becomes ``weight`` (N, K) turned: one byte an element, stride 1 along a row of both."""
    if weight.is_cuda and triton is not None:
        triton_turn(weight, out)
    else:
        out.view(torch.uint8).copy_(weight.view(torch.uint8).T)
    return out


@lru_cache(maxsize=64)
def _ones(size: int, device: torch.device) -> Tensor:
    return torch.ones(1, size, device=device)


def multiply(
    rows: Fp8Rows, weight: Tensor, scales: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``rows weight^T``, with the scales of both.

    Args:
        rows: (T, K).
        weight: (N, K) e4m3 with stride 1 along a row; on a GPU N and K are multiples of 16.
        scales: (N,) float32 of the weight's rows; None for 1.
        dtype: of the result. A GPU computes it in bfloat16 and casts, for no other is offered with scales by rows.

    Returns:
        (T, N).
    """
    if rows.values.device.type != "cuda":
        dense = weight.float() if scales is None else weight.float() * scales[:, None]
        return (rows.dense() @ dense.T).to(dtype)
    if rows.values.shape[0] == 0:
        return rows.scales.new_empty((0, weight.shape[0]), dtype=dtype)
    if not weight.is_contiguous() and not takes_views(weight.device):
        weight = weight.contiguous()
    return _scaled_product(rows, weight, scales).to(dtype)


def _scaled_product(rows: Fp8Rows, weight: Tensor, scales: Tensor | None) -> Tensor:
    b = _ones(weight.shape[0], weight.device) if scales is None else scales.view(1, -1)
    return torch._scaled_mm(
        rows.values, weight.t(), scale_a=rows.scales, scale_b=b, out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )  # fmt: skip


def _example(device: torch.device) -> tuple[Fp8Rows, Tensor, Tensor, Tensor]:
    """Rows, weight, scales, and their product as it should be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator) * torch.logspace(-3, 3, 40)[:, None]
    w = torch.randn(48, 64, generator=generator) * torch.logspace(-2, 2, 48)[:, None]
    rows, weight = quantise_rows(x.to(device)), quantise_rows(w.to(device))
    scales = weight.scales.flatten()
    exact = rows.dense() @ weight.dense().T
    return rows, weight.values, scales, exact


def _is_near(product: Tensor, exact: Tensor) -> bool:
    error = (product.float() - exact).abs().amax(1)
    return bool((error <= 1e-2 * exact.abs().amax(1)).all())


@lru_cache(maxsize=16)
def takes_views(device: torch.device) -> bool:
    """Whether the product on ``device`` reads a weight whose rows lie apart as it should."""
    rows, weight, scales, exact = _example(device)
    wide = torch.cat([weight.view(torch.uint8)] * 2, dim=1).view(DTYPE)
    try:
        return _is_near(_scaled_product(rows, wide[:, :64], scales), exact)
    except RuntimeError:
        return False


@lru_cache(maxsize=16)
def why_no_fp8(device: torch.device) -> str | None:
    """Why FP8 products do not run on ``device``, or None when they do; on a CPU they are computed in float32.

    On a GPU one small product is tried, forward and with a turned weight, once per device.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"FP8 products need an NVIDIA GPU, the model is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if torch.version.cuda is not None and (major, minor) < (8, 9):
        return f"{name} has compute capability {major}.{minor}; FP8 products begin at 8.9 (Ada, Hopper, Blackwell)"
    try:
        rows, weight, scales, exact = _example(device)
        right = _is_near(multiply(rows, weight, scales), exact)
        turned = turn(weight, torch.empty(64, 48, dtype=DTYPE, device=device))
        back = quantise_rows(exact, scales)
        right &= _is_near(multiply(back, turned), back.dense() @ weight.float())
    except Exception as error:
        return f"an FP8 product did not run on {name} ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return None if right else f"an FP8 product ran on {name} and gave wrong numbers"
