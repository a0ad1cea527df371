"""How fast a device multiplies: a short measurement, by which GPUs that differ can be told apart."""

from __future__ import annotations

import time

import torch

# Rows and columns: products of this size keep a GPU busy, and take a core milliseconds.
_ON_GPU, _ON_CPU = 4096, 384


def products_per_second(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Multiplications and additions a second (FLOP/s) of products of square matrices.

    Args:
        device: that multiplies; what else runs on it counts, as it will later.
        dtype: of the matrices.
        seconds: how long it is measured, after a first product that is not.
    """
    size = _ON_GPU if device.type == "cuda" else _ON_CPU
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    found = torch.empty_like(left)
    torch.mm(left, left, out=found)
    _wait(device)
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        for _ in range(4):
            torch.mm(left, left, out=found)
        _wait(device)
        count += 4
    return 2 * size**3 * count / passed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.synchronize(device)
