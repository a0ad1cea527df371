"""Inputs and checks for LayerNorm, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.kernels import norm_cases
from tests.kernels.loss_cases import check_all, num_seeds
from tests.references import layer_norm as reference

EPS = 1e-5


def make(shape, dtype, weight_dtype=None, device="cpu", layout="contiguous", seed=0):
    """x (*shape) off its zero mean, weight, bias and dy."""
    x, weight, dy = norm_cases.make(shape, dtype, weight_dtype, device, layout, seed)
    bias = torch.randn(shape[-1]).to(weight.device, weight.dtype)
    x += 3 * x.float().abs().mean().to(x.dtype)
    return x, weight, bias, dy


def make_several(shape, dtype, layout="contiguous", biased=True, device="cpu"):
    """Inputs from several seeds."""
    seeds = range(num_seeds(norm_cases.t_rows(shape)))
    cases = [make(shape, dtype, layout=layout, device=device, seed=seed) for seed in seeds]
    return cases if biased else [(x, weight, None, dy) for x, weight, _, dy in cases]


def stock(x, weight, bias):
    """PyTorch's own, in one dtype; with float32 weights as it is computed by mixed-precision models."""
    if weight.dtype != x.dtype:
        shift = None if bias is None else bias.float()
        return functional.layer_norm(x.float(), weight.shape, weight.float(), shift, EPS).to(x.dtype)
    return functional.layer_norm(x, weight.shape, weight, bias, EPS)


def gradients(function, x, weight, bias, dy):
    """(y, dx, dweight[, dbias]) of ``function(x, weight, bias)``."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, *([None] if bias is None else []))
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check(function, cases):
    """Hold (y, dx, dweight[, dbias]) of ``function(x, weight, bias, dy)`` against the reference and stock PyTorch."""

    def judge(x, weight, bias, dy):
        doubles = (None if t is None else t.double() for t in (x, weight, bias, dy))
        exact = gradients(lambda *t: reference.layer_norm(*t, EPS), *doubles)
        return function(x, weight, bias, dy), gradients(stock, x, weight, bias, dy), exact

    names = ("output", "dx", "dweight", "dbias")[: 4 if cases[0][2] is not None else 3]
    check_all(names, [judge(*case) for case in cases])
