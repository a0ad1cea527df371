"""Memory that is written, read by the next kernel, and free again: one buffer for each stream, never returned.

Work on a stream runs in order, so what one kernel left in the buffer is read before the next one writes there. Nothing
borrowed may be kept: not by autograd, not over another ``borrow`` on the stream, not on another stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# (device type, index, stream) -> bytes
_buffers: dict[tuple[str, int | None, int], Tensor] = {}


def borrow(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with undefined values, valid until the next call for the same stream.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: where; on a GPU the stream that is current there.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device.type, device.index, stream)
    size = math.prod(shape) * dtype.itemsize
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        _buffers.pop(key, None)  # freed first: the larger one may take its place
        buffer = _buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(shape)


def release_buffers() -> None:
    """Give all buffers back to the allocator; later calls ask it anew."""
    _buffers.clear()
