"""Which GPUs of the machine CUDA shows this process, and how much of each is free, without touching CUDA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from pantheraml.devices.nvml import GIB, NVML, Gpu, GPUState, open_nvml


def visible_memory(
    what: Literal["free", "total"] = "free",
    variables: Mapping[str, str] | None = None,
    nvml: NVML | None = None,
) -> dict[int, int]:
    """Bytes of each GPU that this process sees, by its index in CUDA.

    NVML is asked, which creates no context; torch only where NVML cannot tell: without it, for slices of a GPU (MIG),
    and for unlike GPUs, which CUDA counts from the fastest on unless ``CUDA_DEVICE_ORDER`` is ``PCI_BUS_ID``.

    Args:
        what: ``"free"``: what no process has taken; ``"total"``: all of it.
        variables: the environment; None is that of this process.
        nvml: the driver's library; None is that of the machine.
    """
    states = visible_states(variables, nvml)
    if states is None:
        return _torch_memory(what)
    left = {index: state.total - (state.used if what == "free" else 0) for index, state in enumerate(states)}
    return {index: int(size * GIB) for index, size in left.items()}


def visible_states(
    variables: Mapping[str, str] | None = None, nvml: NVML | None = None
) -> list[GPUState] | None:
    """The GPUs that this process sees as they are now, in CUDA's order; None where NVML cannot tell.

    Args:
        variables: as for ``visible_memory``.
        nvml: likewise.
    """
    variables = os.environ if variables is None else variables
    nvml = nvml or open_nvml()
    if nvml is None:
        return None
    gpus = nvml.gpus()
    visible = select_visible(gpus, variables.get("CUDA_VISIBLE_DEVICES"))
    if visible is None or any(gpu.is_split for gpu in visible):
        return None
    everyone = [nvml.state(gpu.uuid) for gpu in gpus]
    in_order = variables.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not in_order and len({state.total for state in everyone if state is not None}) > 1:
        return None
    states = [everyone[gpus.index(gpu)] for gpu in visible]
    known = [state for state in states if state is not None]
    return known if len(known) == len(states) else None


def select_visible(gpus: Sequence[Gpu], selection: str | None) -> list[Gpu] | None:
    """Those of ``gpus`` that CUDA shows under a value of ``CUDA_VISIBLE_DEVICES`` (None: unset), in its order.

    CUDA reads the list up to the first entry that names no GPU, and takes a list that names one twice for empty.

    Returns:
        The GPUs, those in MIG mode included; None for a list of MIG slices.
    """
    if selection is None:
        return list(gpus)
    entries = [entry.strip() for entry in selection.split(",")]
    if entries[0].startswith("MIG-"):
        return None
    named: list[int] = []
    by_uuid = entries[0].startswith("GPU-")
    for entry in entries:
        index = _index_by_uuid(gpus, entry) if by_uuid else _leading_number(entry)
        if index is None or index >= len(gpus):
            break
        if index in named:
            return []
        named.append(index)
    return [gpus[index] for index in named]


def _index_by_uuid(gpus: Sequence[Gpu], prefix: str) -> int | None:
    found = [index for index, gpu in enumerate(gpus) if gpu.uuid.startswith(prefix)]
    return found[0] if prefix and len(found) == 1 else None


def _leading_number(entry: str) -> int | None:
    """The number an entry begins with, as C's strtol reads it; None without one, or below 0."""
    digits = entry.removeprefix("+")
    length = next((place for place, letter in enumerate(digits) if letter not in "0123456789"), len(digits))
    return int(digits[:length]) if length else None


def _torch_memory(what: Literal["free", "total"]) -> dict[int, int]:
    import torch

    from pantheraml.devices.inventory import num_gpus

    return {index: torch.cuda.mem_get_info(index)[what == "total"] for index in range(num_gpus())}
