"""How torch's allocator takes memory of GPUs: in segments that grow, whose blocks of many sizes leave few gaps.

Rows of all lengths make blocks of all sizes. Where each segment is a piece of its own, what is free there and too short
for the next block stays reserved beside a new segment (docs/memory.md has figures).
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from typing import Any

import torch

# Where somebody says how the allocator works; the second one is older.
_SAID = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")


def grow_segments(device: torch.device) -> None:
    """Let the allocator of this process take memory so from now on, unless the environment says how it is to work.

    Args:
        device: one that is about to be used; nothing happens for a CPU.
    """
    if device.type == "cuda" and not any(os.environ.get(name) for name in _SAID):
        _grow_once(device)


@cache
def _grow_once(device: torch.device) -> None:  # pragma: no cover - needs a GPU
    """Once for each device, so that what somebody sets later is left alone."""
    is_plain_linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if torch.version.hip is not None or not is_plain_linux:
        return
    _set("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some virtual GPUs cannot map memory
        _set("expandable_segments:False")


def _set(said: str) -> None:  # pragma: no cover - needs a GPU
    # torch has no public name for it; this is the one that its own, deprecated function calls.
    core: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    core._accelerator_setAllocatorSettings(said)
