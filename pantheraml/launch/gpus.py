"""How many GPUs a process sees, without CUDA and without torch.

CUDA is not initialised here, because a process that has done so holds memory on a GPU, and the ranks it starts need
that. NVML, the driver's own library, is asked by ctypes, and ``CUDA_VISIBLE_DEVICES`` is applied as CUDA does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pantheraml.devices.nvml import NVML, NVML_LIBRARY, Gpu
from pantheraml.devices.visible_gpus import select_visible

# There when AMD's driver is.
AMD_DRIVER = Path("/dev/kfd")
_AMD_VARIABLES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def num_visible_gpus(
    variables: Mapping[str, str] | None = None, library: str = NVML_LIBRARY, amd_driver: Path = AMD_DRIVER
) -> int | None:
    """Number of GPUs that CUDA would show this process; 0 without NVIDIA's driver; None where only torch can tell.

    Args:
        variables: the environment; None is that of this process. ``CUDA_VISIBLE_DEVICES`` is read, never written.
        library: file of NVML.
        amd_driver: exists where there may be AMD's GPUs, which NVML does not know. Their variables say the same, but
            only without NVML: SLURM sets them beside NVIDIA's GPUs, too.
    """
    variables = os.environ if variables is None else variables
    gpus = read_gpus(library)
    if gpus is None:
        is_amd = amd_driver.exists() or any(variables.get(name) for name in _AMD_VARIABLES)
        return None if is_amd else 0
    return count_visible(gpus, variables.get("CUDA_VISIBLE_DEVICES"))


@functools.cache
def read_gpus(library: str = NVML_LIBRARY) -> tuple[Gpu, ...] | None:
    """The GPUs this process may open, in NVML's order; None without a working driver. Asked once per process."""
    try:
        return tuple(NVML(library).gpus())
    except OSError:
        return None


def count_visible(gpus: Sequence[Gpu], selection: str | None) -> int:
    """Number of ``gpus`` that CUDA shows under a value of ``CUDA_VISIBLE_DEVICES`` (None: unset).

    CUDA shows one MIG slice to a process, however many are named.
    """
    visible = select_visible(gpus, selection)
    return min(1, len(gpus)) if visible is None else _usable(visible)


def _usable(gpus: Sequence[Gpu]) -> int:
    whole = sum(not gpu.is_split for gpu in gpus)
    return whole or min(1, len(gpus))
