"""The GPU helpers of the guide, by its names; the work is done in ``pantheraml.devices``.

Scripts that run on a machine without a GPU keep working where a sensible answer exists:
``get_current_gpu_index`` is None and ``clear_gpu_cache`` does nothing; the other two raise.
"""

from __future__ import annotations

import gc

import torch

from pantheraml.devices.inventory import gpu_device, num_gpus
from pantheraml.devices.memory import gpu_memory
from pantheraml.kernels.workspace import release_buffers


def get_current_gpu_index() -> int | None:
    """Index of the GPU that new tensors go to, None without a GPU."""
    return torch.cuda.current_device() if num_gpus() else None


def set_gpu_device(index: int) -> None:
    """Make GPU ``index`` the current one.

    Raises:
        HardwareError: there is no such GPU.
    """
    torch.cuda.set_device(gpu_device(index))


def get_gpu_memory_info(index: int | None = None) -> dict[str, float]:
    """Memory of a GPU in GiB: ``allocated``, ``reserved``, ``peak_allocated``, ``total``, ``free``.

    Args:
        index: GPU index; None is the current one.

    Raises:
        HardwareError: there is no such GPU, or no GPU at all.
    """
    return gpu_memory(get_current_gpu_index() or 0 if index is None else index)


def clear_gpu_cache() -> None:
    """Give cached, unused GPU memory of this process back to the driver; nothing without a GPU."""
    release_buffers()
    gc.collect()
    if num_gpus():
        torch.cuda.empty_cache()
