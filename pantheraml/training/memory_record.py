"""The memory that was predicted for a run beside what was measured, kept as numbers: ``memory.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pantheraml.devices.memory import GIB
from pantheraml.devices.peak_memory import MemoryEstimate
from pantheraml.errors import first_line
from pantheraml.log import say_once

NAME = "memory.json"


def memory_record(
    predicted: Mapping[torch.device, MemoryEstimate], measured: Sequence[Sequence[float]] = ()
) -> list[dict[str, Any]]:
    """One entry for each device of a rank, in bytes.

    Args:
        predicted: by device.
        measured: peaks in GiB, ``measured[rank][device]``, of which the highest counts; empty before the run.

    Returns:
        ``device``; ``predicted`` by component, when that is (``moment``), its sum as torch allocates it
        (``predicted_allocated``) and with what else the card must hold (``predicted_reserved``); and
        ``measured_allocated``, None before the run.
    """
    peaks = [int(max(column) * GIB) for column in zip(*measured, strict=True)] or [None] * len(predicted)
    return [
        {
            "device": str(device),
            "moment": one.moment,
            "predicted": one.parts(),
            "predicted_allocated": one.total,
            "predicted_reserved": one.reserved,
            "measured_allocated": peak,
        }
        for (device, one), peak in zip(predicted.items(), peaks, strict=True)
    ]


def write_memory_record(folder: Path, record: list[dict[str, Any]]) -> None:
    """Write ``memory.json`` into the output folder of a run; a disk that is full does not end it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        say_once(f"{NAME} is not written to {folder}: {first_line(error)}.")
