"""Dropout for the CPU, interpreter and GPU tests: inputs in every layout, and the formula beside a given mask."""

from __future__ import annotations

import torch

# (T, N): narrow, one row, more than one call of the generator for a lane, a last group that is not full
SHAPES = [(5, 33), (1, 2048), (3, 2500), (9, 4096), (130, 64)]
SHARES = [0.0, 0.05, 0.5, 1.0]
SEED = 2**62 + 12345


def make(shape, dtype, device="cpu", gap=7):
    """x and a total whose rows lie apart, and the whole that the total lies in."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    x, whole = (
        torch.randn(shape[0], shape[1] + gap, generator=generator).to(device, dtype) for _ in range(2)
    )
    return x[:, : shape[1]], whole[:, : shape[1]], whole


def expected(x, kept, p, total=None):
    """``dropped`` or, with a total, ``add_dropped``, for a mask."""
    scale = torch.tensor(0.0 if p == 1 else 1 / (1 - p), dtype=torch.float32, device=x.device)
    y = torch.where(kept, x.float() * scale, 0.0)
    return (y if total is None else total.float() + y).to(x.dtype)
