"""Packed weights and what bitsandbytes makes of them, for the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch

# (N, K), blocksize: odd rows, one row, a last block and a last word that are not full, more than one outer block
SHAPES = [
    ((128, 192), 64),
    ((1, 64), 64),
    ((33, 40), 32),
    ((5, 3), 64),
    ((7, 11), 64),
    ((300, 66), 128),
    ((16, 8192), 4096),
]


def packed(shape, dtype, blocksize=64, kind="nf4", nested=True, device="cpu", storage=torch.uint8):
    """Bytes and state of a random weight with a zero block and an outlier."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    weight.view(-1)[: min(blocksize, weight.numel() // 2)] = 0
    weight.view(-1)[-1] = 3.0
    return bnb.quantize_4bit(
        weight.to(device, dtype), blocksize=blocksize, compress_statistics=nested, quant_type=kind,
        quant_storage=storage,
    )  # fmt: skip


def theirs(data, state):
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(data, state)


def spread(shape, dtype, device="cpu", gap=5):
    """An output whose rows lie apart, and the whole it lies in, filled with a sign of what must not be touched."""
    whole = torch.full((shape[0], shape[1] + gap), 77.0, dtype=dtype, device=device)
    return whole[:, : shape[1]], whole
