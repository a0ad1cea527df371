"""Products of narrow matrices that are kept in float32: written there, or added to what is there.

Tensor cores sum in float32 anyway; only the result would be rounded. Where it is scaled or added to afterwards, a
rounding in between costs: a bf16 sum over chunks errs 2 to 15 times more than one product of stock PyTorch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``: out (M, N) float32, left (M, K) and right (K, N) of one dtype."""
    if _is_narrow(left):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, shapes and dtypes as in ``write_product``."""
    if not _is_narrow(left):
        total.addmm_(left.float(), right.float())
    elif _adds_inside(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


def _is_narrow(x: Tensor) -> bool:
    """Whether x is of 16 bits on a GPU, where products can have a float32 result."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def _adds_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the product itself can add to a float32 total, which saves a pass; versions of torch differ."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), 1 + 2**-16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17 + 2**-16).all())
