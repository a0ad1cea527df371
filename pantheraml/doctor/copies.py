"""Bytes that are copied, compared by checksum on the host, and timed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Writes the first tensor into the second.
Copy = Callable[["Tensor", "Tensor"], object]


def copy_now(source: Tensor, target: Tensor) -> None:
    """As torch copies."""
    target.copy_(source)


def random_bytes(size: int, seed: int) -> Tensor:
    """uint8 (size,) on the CPU."""
    import torch

    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def checksum(data: Tensor) -> str:
    """SHA-256 of uint8 (size,), wherever it lies."""
    return hashlib.sha256(data.cpu().numpy().tobytes()).hexdigest()


def arrives(data: Tensor, source: torch.device, target: torch.device, copy: Copy = copy_now) -> bool:
    """Whether bytes of the host that are brought to ``source`` and copied to ``target`` are the same there.

    Args:
        data: uint8 (size,) on the CPU.
        source: from where they are copied.
        target: to where.
        copy: how.
    """
    import torch

    there = torch.zeros(data.shape, dtype=data.dtype, device=target)
    copy(data.to(source, copy=True), there)
    return checksum(there) == checksum(data)


def gigabytes_per_second(source: Tensor, target: Tensor, copy: Copy = copy_now, *, repeats: int = 5) -> float:
    """Of the fastest of some copies, after one that does not count."""
    best = 0.0
    for repeat in range(repeats + 1):
        _wait(source, target)
        began = time.perf_counter()
        copy(source, target)
        _wait(source, target)
        if repeat:
            best = max(best, source.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def _wait(*tensors: Tensor) -> None:
    import torch

    for tensor in tensors:
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
