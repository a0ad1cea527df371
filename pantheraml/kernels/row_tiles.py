"""How kernels that normalise rows cut their work: short rows are taken together, a long one by as many warps."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements a program works on at a time: short rows (the heads of q and k norms) are taken together.
_TILE = 2048


def row_tile(cols: int) -> dict[str, int]:
    """Tile shape and warps for rows of ``cols`` elements and nothing else: one size compiles once."""
    block_n = 1 << (cols - 1).bit_length()
    block_m = max(1, _TILE // block_n)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": min(32, max(1, block_m * block_n // 512))}


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, N) with stride 1 along a row; a view where its strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
