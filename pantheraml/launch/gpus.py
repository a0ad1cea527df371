"""How many GPUs this process would see, without torch and without CUDA: counting makes no context."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pantheraml.devices.nvml import open_nvml


def num_visible_gpus(variables: Mapping[str, str] | None = None, uuids: Sequence[str] | None = None) -> int:
    """Number of GPUs by NVML and ``CUDA_VISIBLE_DEVICES``, which is read as CUDA reads it.

    Args:
        variables: None reads those of the process.
        uuids: of the GPUs of the machine; None asks the driver.

    Returns:
        The number of visible GPUs. Of MIG slices a process sees one, however many are named.
    """
    given = os.environ if variables is None else variables
    if uuids is None:
        nvml = open_nvml()
        uuids = [] if nvml is None else nvml.uuids()
    visible = given.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(uuids)
    count, seen = 0, set[str]()
    for word in visible.split(","):
        name = word.strip()
        if name.startswith("MIG-"):
            return 1 if uuids else 0
        uuid = _find(name, uuids)
        if uuid is None or uuid in seen:  # CUDA stops at the first that it does not know
            return count if uuid is None else 0
        seen.add(uuid)
        count += 1
    return count


def _find(name: str, uuids: Sequence[str]) -> str | None:
    """The GPU that an entry means: an index, or the beginning of one UUID."""
    if name.isdecimal():
        return uuids[int(name)] if int(name) < len(uuids) else None
    found = [uuid for uuid in uuids if name.startswith("GPU-") and uuid.startswith(name)]
    return found[0] if len(found) == 1 else None
