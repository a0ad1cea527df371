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

    CUDA reads the list up to the first entry that names no GPU, takes a list that names one twice for empty, and shows
    one MIG slice to a process, however many are named.
    """
    if selection is None:
        return _usable(gpus)
    entries = [entry.strip() for entry in selection.split(",")]
    if entries[0].startswith("MIG-"):
        return min(1, len(gpus))
    named: list[int] = []
    by_uuid = entries[0].startswith("GPU-")
    for entry in entries:
        index = _index_by_uuid(gpus, entry) if by_uuid else _leading_number(entry)
        if index is None or index >= len(gpus):
            break
        if index in named:
            return 0
        named.append(index)
    return _usable([gpus[index] for index in named])


def _usable(gpus: Sequence[Gpu]) -> int:
    whole = sum(not gpu.is_split for gpu in gpus)
    return whole or min(1, len(gpus))


def _index_by_uuid(gpus: Sequence[Gpu], prefix: str) -> int | None:
    found = [index for index, gpu in enumerate(gpus) if gpu.uuid.startswith(prefix)]
    return found[0] if prefix and len(found) == 1 else None


def _leading_number(entry: str) -> int | None:
    """The number an entry begins with, as C's strtol reads it; None without one, or below 0."""
    digits = entry.removeprefix("+")
    length = next((place for place, letter in enumerate(digits) if letter not in "0123456789"), len(digits))
    return int(digits[:length]) if length else None
