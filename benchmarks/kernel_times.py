"""Where a step's time on the GPU goes: kernels in groups, and the gaps between them.

Times come from torch's profiler with device activity alone, which slows the host least. A gap is a time in which no
kernel runs: intervals that overlap are merged first.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any

Interval = tuple[str, float, float]  # name, start and end in microseconds

_ATTENTION = re.compile(r"fmha|flash|sdpa|attention", re.I)
_GEMM = re.compile(r"nvjet|gemm|cutlass|xmma|cublas|splitk", re.I)
_COPY = re.compile(r"memcpy|memset", re.I)
_NCCL = re.compile(r"nccl[A-Za-z]*_([A-Za-z]+)")
_OPTIMIZER = re.compile(r"adam|multi_tensor", re.I)
_NARROW_US = 60.0


@lru_cache(maxsize=1)
def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels in ``pantheraml.kernels``."""
    import pantheraml.kernels
    from pantheraml.kernels.launch import triton

    if triton is None:
        return frozenset()
    found = set()
    for module in pkgutil.iter_modules(pantheraml.kernels.__path__):
        members = vars(import_module(f"pantheraml.kernels.{module.name}")).values()
        found |= {kernel.__name__ for kernel in members if isinstance(kernel, triton.runtime.KernelInterface)}
    return frozenset(found)


def group_of(name: str, microseconds: float, ours: frozenset[str]) -> str:
    """The group that a kernel belongs to."""
    if name in ours:
        return f"ours: {name}"
    if told := _NCCL.match(name):
        return f"NCCL: {told[1]}"
    if _COPY.search(name):
        return "copies"
    if _ATTENTION.search(name):
        return "attention"
    if _GEMM.search(name):
        return f"GEMM, {'below' if microseconds < _NARROW_US else 'from'} {_NARROW_US:.0f} us"
    if _OPTIMIZER.search(name):
        return "optimizer"
    if "triton" in name:
        return f"other Triton: {name[:40]}"
    if "reduce" in name:
        return "reductions"
    if "elementwise" in name or "vectorized" in name:
        return "elementwise"
    return f"other: {name[:40]}"


def group(intervals: Iterable[Interval], layers: int, ours: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Milliseconds and launches of each group, largest first, with the span, the busy time and the gaps.

    ``waiting_ms`` is the part of the busy time in which ranks talk and nothing is computed.
    """
    ordered = sorted(intervals, key=lambda interval: interval[1])
    if not ordered:
        empty = dict.fromkeys(("span_ms", "busy_ms", "gaps_ms", "waiting_ms"), 0.0)
        return {"layers": layers, **empty, "launches": 0, "groups": {}}
    totals: dict[str, list[float]] = {}
    for name, start, stop in ordered:
        entry = totals.setdefault(group_of(name, stop - start, ours), [0.0, 0])
        entry[0] += (stop - start) / 1e3
        entry[1] += 1
    busy = _covered(ordered)
    span = (max(stop for _, _, stop in ordered) - ordered[0][1]) / 1e3
    return {
        "layers": layers,
        "span_ms": span,
        "busy_ms": busy,
        "gaps_ms": span - busy,
        "waiting_ms": busy - _covered(one for one in ordered if not _NCCL.match(one[0])),
        "launches": len(ordered),
        "groups": dict(sorted(totals.items(), key=lambda item: -item[1][0])),
    }


def _covered(ordered: Iterable[Interval]) -> float:
    """Milliseconds in which at least one of the intervals, which begin one after the other, runs."""
    covered, end = 0.0, float("-inf")
    for _, start, stop in ordered:
        covered += max(0.0, stop - max(start, end)) / 1e3
        end = max(end, stop)
    return covered


def start() -> Any:
    """A running profiler of device activity (on a CPU: of operators)."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True
    )
    profiler.start()
    return profiler


def summary(profiler: Any, layers: int) -> dict[str, Any]:
    """``group`` of what a stopped ``profiler`` saw on the device."""
    import torch

    cuda = torch.autograd.DeviceType.CUDA
    intervals = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == cuda and not getattr(event, "is_user_annotation", False)
    ]
    return group(intervals, layers, our_kernels())


def table(kernels: dict[str, Any]) -> str:
    """The groups per step and per layer, as lines of a Markdown table."""
    layers, span = kernels["layers"], kernels["span_ms"] or 1.0
    lines = [
        "| kernels of one step or call | ms | share | us per layer | launches |",
        "|---|---|---|---|---|",
    ]
    rows = [(name, ms, count) for name, (ms, count) in kernels["groups"].items()]
    rows.append(("ranks talk, nothing is computed", kernels["waiting_ms"], 0))
    rows.append(("gaps, nothing runs", kernels["gaps_ms"], 0))
    rows.append(("span", kernels["span_ms"], kernels["launches"]))
    for name, ms, count in rows:
        lines.append(f"| {name} | {ms:.2f} | {ms / span:.1%} | {1e3 * ms / layers:.0f} | {count:.0f} |")
    return "\n".join(lines)
