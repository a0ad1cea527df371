"""How many GPUs a process sees, without CUDA and without torch.

CUDA is not initialised here, because a process that has done so holds memory on a GPU, and the ranks it starts need
that. NVML, the driver's own library, is asked by ctypes, and ``CUDA_VISIBLE_DEVICES`` is applied as CUDA does.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

NVML = "libnvidia-ml.so.1"
# There when AMD's driver is.
AMD_DRIVER = Path("/dev/kfd")
_AMD_VARIABLES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

_UUID_BYTES = 96


class Gpu(NamedTuple):
    """A GPU of this machine.

    Attributes:
        uuid: as ``nvidia-smi -L`` prints it (``GPU-...``).
        is_split: it is in MIG mode, so that processes see a slice of it at most.
    """

    uuid: str
    is_split: bool


def num_visible_gpus(
    variables: Mapping[str, str] = os.environ, library: str = NVML, amd_driver: Path = AMD_DRIVER
) -> int | None:
    """Number of GPUs that CUDA would show this process; 0 without NVIDIA's driver; None where only torch can tell.

    Args:
        variables: the environment; ``CUDA_VISIBLE_DEVICES`` is read, never written.
        library: file of NVML.
        amd_driver: exists where there may be AMD's GPUs, which NVML does not know. Their variables say the same, but
            only without NVML: SLURM sets them beside NVIDIA's GPUs, too.
    """
    gpus = read_gpus(library)
    if gpus is None:
        is_amd = amd_driver.exists() or any(variables.get(name) for name in _AMD_VARIABLES)
        return None if is_amd else 0
    return count_visible(gpus, variables.get("CUDA_VISIBLE_DEVICES"))


@functools.cache
def read_gpus(library: str = NVML) -> tuple[Gpu, ...] | None:
    """The GPUs this process may open, in NVML's order; None without a working driver. Asked once per process."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):  # not there, or not NVML
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        found = [_read_gpu(nvml, index) for index in range(count.value)]
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        nvml.nvmlShutdown()


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


def _read_gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None  # a container or a cgroup keeps it from us, and from CUDA
    uuid = ctypes.create_string_buffer(_UUID_BYTES)
    if nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(_UUID_BYTES)) != 0:
        return None
    mode, pending = ctypes.c_uint(), ctypes.c_uint()
    answer = nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(mode), ctypes.byref(pending))
    return Gpu(uuid.value.decode(), is_split=answer == 0 and mode.value == 1)
