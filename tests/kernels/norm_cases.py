"""Inputs and checks for RMSNorm, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch

from tests.references import rms_norm as reference
from tests.references.yardstick import assert_as_good_as

# name -> (offset, cast_first), as the families have them
KINDS = {"llama": (0.0, True), "gemma": (1.0, False), "gpt_oss": (0.0, False)}
EPS = 1e-5


def make(shape, dtype, weight_dtype=None, device="cpu", layout="contiguous", seed=0):
    """x (*shape), weight and dy: x and dy with the layout, values over several orders of magnitude."""
    torch.manual_seed(seed)
    n = shape[-1]

    def tensor():
        t = torch.randn(shape) * torch.logspace(-2, 1, max(1, t_rows(shape))).reshape(*shape[:-1], 1)
        t = t.to(device, dtype)
        if layout == "transposed":
            return t.transpose(0, -2).contiguous().transpose(0, -2)
        if layout == "sliced":  # rows inside wider rows
            wide = torch.full((*shape[:-1], n + 5), 1e4, dtype=dtype, device=device)
            wide[..., 2 : 2 + n] = t
            return wide[..., 2 : 2 + n]
        if layout == "strided":  # every other element
            wide = torch.full((*shape[:-1], 2 * n), 1e4, dtype=dtype, device=device)
            wide[..., ::2] = t
            return wide[..., ::2]
        return t

    weight = (torch.rand(n) + 0.5).to(device, weight_dtype or dtype)
    return tensor(), weight, tensor()


def t_rows(shape):
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def stock(x, weight, offset, cast_first):
    """What transformers writes, in plain PyTorch."""
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    if cast_first:
        return weight * x_hat.to(x.dtype)
    return (x_hat * (offset + weight.float())).to(x.dtype)


def gradients(function, x, weight, dy):
    """(y, dx, dw) of ``function(x, weight)``."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype)))


def check(ours, x, weight, dy, kind):
    """Hold (y, dx, dw) against the reference and against stock PyTorch."""
    offset, cast_first = KINDS[kind]
    exact = gradients(
        lambda x, w: reference.rms_norm(x, w, EPS, offset), x.double(), weight.double(), dy.double()
    )
    theirs = gradients(lambda x, w: stock(x, w, offset, cast_first), x, weight, dy)
    for name, a, b, c in zip(("output", "dx", "dweight"), ours, theirs, exact, strict=True):
        assert_as_good_as(a, b, c, name)
