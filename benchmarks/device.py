"""Small things that every measurement asks of the device: waiting, peaks, versions, gradients."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

GIB = 2**30
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "liger-kernel",
)


class BadGradient(RuntimeError):
    """A gradient is zero or not finite, so the speed means nothing."""


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peaks() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free_cache() -> None:
    """Give back what PyTorch's allocator holds unused."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peaks() -> dict[str, float | None]:
    """Peak memory since ``reset_peaks`` in GiB, as PyTorch's allocator handed it out and as it reserved it."""
    import torch

    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None}
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def timed(function: Callable[[], object], runs: int = 15, warm: int = 5) -> float:
    """Median time of ``function`` in milliseconds."""
    import torch

    on_gpu = torch.cuda.is_available()
    for _ in range(warm if on_gpu else 1):
        function()
    if not on_gpu:
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for i in range(runs):
        function()
        events[i + 1].record()
    torch.cuda.synchronize()
    return sorted(events[i].elapsed_time(events[i + 1]) for i in range(runs))[runs // 2]


def checked_norm(parameters: Iterable[Any]) -> float:
    """Norm of all gradients.

    Raises:
        BadGradient: a trained parameter has no gradient, or one that is zero or not finite.
    """
    import torch

    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise BadGradient("nothing is trained")
    lost = sum(p.grad is None for p in trained)
    norms = torch.stack(
        [p.grad.detach().float().norm() for p in trained if p.grad is not None] or [torch.zeros(())]
    )
    odd = int((~torch.isfinite(norms)).sum())
    zero = int((norms == 0).sum())
    if lost or odd or zero:
        raise BadGradient(f"of {len(trained)} gradients {lost} are missing, {zero} zero, {odd} not finite")
    return check_norm(float(norms.norm()))


def check_norm(norm: float) -> float:
    """``norm`` itself; BadGradient if it is zero or not finite."""
    if not math.isfinite(norm) or norm <= 0:
        raise BadGradient(f"a gradient norm is {norm}")
    return norm


def versions() -> dict[str, str]:
    """Device, Python and the packages that are installed."""
    import torch

    import pantheraml

    found = {"python": platform.python_version(), "pantheraml": pantheraml.__version__}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
