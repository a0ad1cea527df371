"""How much memory this process uses, in GiB."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import psutil
import torch

from pantheraml.devices.inventory import gpu_device, num_gpus
from pantheraml.devices.peak_memory import CONTEXT_BYTES

GIB = 1024**3


def describe_bytes(count: int) -> str:
    """For people: ``39.1 GiB``, ``160 MiB``, ``12 KiB``."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def gpu_memory(index: int) -> dict[str, float]:
    """Memory of one GPU, in GiB.

    Args:
        index: GPU index as this process counts them.

    Returns:
        ``allocated``, ``reserved`` and ``peak_allocated`` of this process, ``total`` and ``free`` of the
        GPU (``free`` counts what other processes took).

    Raises:
        HardwareError: there is no such GPU.
    """
    device = gpu_device(index)
    free, total = torch.cuda.mem_get_info(device)  # pragma: no cover - needs a GPU
    # Asked for once: torch reads all its counters for each of memory_allocated, memory_reserved, ...
    told = torch.cuda.memory_stats(device)  # pragma: no cover - needs a GPU
    return {  # pragma: no cover - needs a GPU
        "allocated": told.get("allocated_bytes.all.current", 0) / GIB,
        "reserved": told.get("reserved_bytes.all.current", 0) / GIB,
        "peak_allocated": told.get("allocated_bytes.all.peak", 0) / GIB,
        "total": total / GIB,
        "free": free / GIB,
    }


def limit_gpu(index: int, size: int) -> None:
    """Let this process take at most ``size`` bytes of a GPU: an allocation above it fails as if there were no more.

    Args:
        index: as this process counts them.
        size: bytes in all; CUDA's own, before the first tensor, are among them.
    """
    total = torch.cuda.mem_get_info(index)[1]
    share = max(0.0, min(1.0, (size - CONTEXT_BYTES) / total))
    torch.cuda.set_per_process_memory_fraction(share, index)  # pyright: ignore[reportUnknownMemberType]


def forget_peak(device: torch.device) -> None:
    """Let ``peak_allocated`` of a GPU begin anew; nothing on the CPU, whose peak is the process's."""
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.reset_peak_memory_stats(device)


def free_gpu_bytes(device: torch.device) -> int:
    """What this process can still allocate on a GPU: what is free there and within its limit, and what its allocator
    holds unused.
    """
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def cpu_memory() -> dict[str, float]:
    """Memory of this process and its machine, in GiB: ``rss``, ``peak_rss`` and ``total``."""
    rss = psutil.Process().memory_info().rss
    return {
        "rss": rss / GIB,
        "peak_rss": max(rss, _peak_rss()) / GIB,
        "total": psutil.virtual_memory().total / GIB,
    }


def _peak_rss() -> int:
    """The most memory this process ever held, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def get_memory_stats() -> dict[str, dict[str, float]]:
    """Memory of every GPU that this process uses, in GiB.

    A GPU counts as used when it is the current one or holds tensors of this process: asking the driver
    about any other would create a CUDA context there, which costs that GPU hundreds of MiB.

    Returns:
        ``{"gpu_0": {"allocated", "reserved", "peak_allocated", "total", "free"}, ...}``; without a GPU
        ``{"cpu": {"rss", "peak_rss", "total"}}``.
    """
    count = num_gpus()
    if count == 0:
        return {"cpu": cpu_memory()}
    current = torch.cuda.current_device()  # pragma: no cover - needs a GPU
    used = [
        i for i in range(count) if i == current or torch.cuda.memory_reserved(i)
    ]  # pragma: no cover - needs a GPU
    return {f"gpu_{i}": gpu_memory(i) for i in used}  # pragma: no cover - needs a GPU


def format_memory_stats(stats: Mapping[str, Mapping[str, float]]) -> str:
    """``stats`` of ``get_memory_stats`` as a text table, one line per device, numbers in GiB."""
    columns = list(dict.fromkeys(name for row in stats.values() for name in row))
    header = ["GiB", *columns]
    rows = [
        [device, *(f"{row[c]:.2f}" if c in row else "-" for c in columns)] for device, row in stats.items()
    ]
    widths = [max(len(cells[i]) for cells in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        )
        for cells in (header, *rows)
    )
