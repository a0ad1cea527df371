"""GPUs that a plan can be made for without having one: memory, speed and links, from the makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pantheraml.devices.peaks import peak_tflops
from pantheraml.errors import ConfigError, did_you_mean

GIB = 2**30
# A GPU that is named by its memory alone is taken to be as fast as this one.
_USUAL = "A100"


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU.

    Attributes:
        name: as people write it.
        memory: bytes that CUDA sees.
        tflops: dense 16-bit TFLOP/s on paper.
        memory_gb_s: GB/s of its memory, on paper.
        link_gb_s: GB/s that a collective reaches to the other GPUs of a host; measured for the H200 (NCCL, 8 GPUs),
            for others the same share (0.78) of what the link gives one way on paper, half of it over PCIe.
        has_fp8: whether FP8 products run on it.
    """

    name: str
    memory: int
    tflops: float
    memory_gb_s: float
    link_gb_s: float
    has_fp8: bool = False


@dataclass(frozen=True)
class _Row:
    gib: float
    memory_gb_s: float
    link_gb_s: float
    has_fp8: bool


# GiB that CUDA tells (less than the name says), GB/s of memory and links.
_TABLE: dict[str, _Row] = {
    "B200": _Row(178.3, 8000, 700, True),
    "H200": _Row(139.8, 4800, 349, True),
    "H100": _Row(79.1, 3350, 349, True),
    "H100 PCIe": _Row(79.1, 2000, 32, True),
    "A100": _Row(79.1, 2039, 234, False),
    "A100-40GB": _Row(39.4, 1555, 234, False),
    "L40S": _Row(44.4, 864, 16, True),
    "L4": _Row(22.0, 300, 16, True),
    "A40": _Row(44.4, 696, 16, False),
    "A10G": _Row(22.0, 600, 16, False),
    "RTX 4090": _Row(23.5, 1008, 16, True),
    "RTX 3090": _Row(23.6, 936, 16, False),
    "V100": _Row(31.7, 900, 117, False),
    "T4": _Row(14.6, 320, 8, False),
}
_ALIASES = {"A100-80GB": "A100", "H100-PCIE": "H100 PCIe", "RTX4090": "RTX 4090", "RTX3090": "RTX 3090"}
_TEXT = re.compile(r"\s*(?:(\d+)\s*[x*]\s*)?(.+?)\s*", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(G|GB|GIB)", re.IGNORECASE)
_EXAMPLE = "Write 8xH200, 2xA100, or 4x80GB for GPUs of 80 GB."


def known_gpu(name: str) -> GpuKind | None:
    """The kind that people or torch call ``name`` (``h200``, ``NVIDIA H200``); None for one that is unknown."""
    wanted = name.casefold().strip()
    aliases = {alias.casefold(): kind for alias, kind in _ALIASES.items()}
    exact = {kind.casefold(): kind for kind in _TABLE} | aliases
    found = exact.get(wanted)
    if found is None and wanted.startswith(("nvidia", "tesla")):
        # The longest name that is part of it: "NVIDIA H100 PCIe" is no "H100".
        parts = [kind for kind in _TABLE if kind.casefold() in wanted]
        found = max(parts, key=len, default=None)
    if found is None:
        return None
    row, tflops = _TABLE[found], peak_tflops(found)
    assert tflops is not None, "every GPU of the table has a peak"
    return GpuKind(found, int(row.gib * GIB), tflops, row.memory_gb_s, row.link_gb_s, row.has_fp8)


def gpu_of(name: str, memory: int) -> GpuKind:
    """The kind of a GPU that is there: known by name or taken for a usual one, with the memory that it has.

    FP8 is not ruled out for one that is not known.
    """
    kind, usual = known_gpu(name), known_gpu(_USUAL)
    assert usual is not None
    return replace(kind or replace(usual, has_fp8=True), name=name, memory=memory)


def read_gpus(text: str, option: str = "--gpus") -> tuple[GpuKind, ...]:
    """The GPUs that ``8xH200``, ``H200``, ``2 x 80GB`` or ``4x24GiB`` means.

    Args:
        text: how many, and what they are.
        option: what the user wrote it for, for the error.

    Raises:
        ConfigError: a text that means none.
    """
    found = _TEXT.fullmatch(text)
    count = int(found[1]) if found is not None and found[1] else 1
    if found is None or not 1 <= count <= 4096:
        raise ConfigError(
            got=f"{option} {text!r} was given.",
            need="It is how many there are and what they are.",
            fix=_EXAMPLE,
        )
    size = _SIZE.fullmatch(found[2])
    if size is not None:
        unit = 10**9 if size[2].upper() == "GB" else GIB
        memory = int(float(size[1]) * unit)
        if memory < GIB:
            raise ConfigError(
                got=f"{option} {text!r} was given.",
                need="A GPU has 1 GiB of memory or more.",
                fix=_EXAMPLE,
            )
        return (gpu_of(found[2], memory),) * count
    kind = known_gpu(found[2])
    if kind is None:
        raise ConfigError(
            got=f"{option} {text!r} names {found[2]!r}, which is not in the table of GPUs.",
            need=f"It has {', '.join(_TABLE)}.",
            fix=f"{did_you_mean(found[2], list(_TABLE))} {_EXAMPLE}".strip(),
        )
    return (kind,) * count
