"""Which errors say that memory has run out."""

from __future__ import annotations

import torch
import torch.distributed as dist

# What is said by those that do not raise torch's own error: the driver, Triton, cuBLAS, the allocator of host memory.
_SAID = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a GPU, or the host, has no memory left.

    A collective that failed is no such error, whatever the reason: the ranks are apart then.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or (dist.is_available() and isinstance(error, dist.DistError)):
        return False
    return any(text in str(error) for text in _SAID)
