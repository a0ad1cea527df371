"""Rows to quantise, their exact values, and how near FP8 must come, for the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch

# Rounding to 3 bits of mantissa leaves 31.5 dB on what has no scale of its own; outliers cost little.
LEAST_DB = 29.5


def sqnr(ours, exact):
    """Signal over quantisation noise in dB, the worst of all rows that are not zero (infinite without one)."""
    exact = exact.double()
    noise = (ours.double() - exact).pow(2).sum(1)
    power = exact.pow(2).sum(1)
    there = power > 0
    ratios = 10 * torch.log10(power[there] / noise[there].clamp(min=1e-300))
    return float(ratios.min()) if len(ratios) else float("inf")


def rows(kind, shape=(12, 200), dtype=torch.float32, device="cpu"):
    """(T, K) values of one kind."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator)
    if kind == "scales from 1e-12 to 1e12":
        x = x * torch.logspace(-12, 12, shape[0])[:, None]
    elif kind == "outlier columns":
        x[:, ::50] *= 300
    elif kind == "one outlier":
        x[:, -1] = 3000
    elif kind == "zero rows":
        x[::2] = 0
    elif kind == "gradients":
        x = x * 1e-7 * torch.exp(torch.randn(shape, generator=generator))
    return x.to(device, dtype)


KINDS = ["normal", "scales from 1e-12 to 1e12", "outlier columns", "one outlier", "zero rows", "gradients"]
