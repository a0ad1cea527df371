"""What a run does to its GPUs, once a logging step: tokens per second, share of the peak, memory, power.

    console     one line, from rank 0; on a terminal a small table, a row for each GPU
    report_to   ``tokens_per_second``, ``mfu`` and ``peak_allocated_gib``, beside the loss, to the trackers of the run
    file        ``telemetry.jsonl`` in the output folder: one line for each logging step, with every rank's devices, and
                the tokens and seconds of the run over all its starts

Measuring is a few reads of counters on each rank and one exchange of some hundred bytes between CPUs; a step that is
not logged costs nothing.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pantheraml.devices.memory import get_memory_stats
from pantheraml.devices.nvml import open_nvml
from pantheraml.devices.peaks import peak_tflops
from pantheraml.distributed.process_group import gather_objects, is_main_process
from pantheraml.errors import first_line
from pantheraml.log import say_once, show
from pantheraml.models.sharded_linear import ShardedLinear
from pantheraml.training.telemetry_lines import Stats, draw_lines, plain_line


def operations_per_token(model: nn.Module) -> int:
    """Floating-point operations of a training step for one token: products with weights alone, without attention's own.

    Two for each number of a weight forward, two for the gradient of its input, and two more where it is trained. What
    is cut between ranks counts whole.
    """
    total = 0
    for module in model.modules():
        weight = module._parameters.get(
            "weight"
        )  # a layer's own: PEFT's wrappers have their base layer's, too
        if isinstance(module, nn.Embedding) or weight is None or weight.dim() < 2:
            continue
        state = getattr(weight, "quant_state", None)
        numbers = weight.numel() if state is None else math.prod(state.shape)
        if isinstance(module, ShardedLinear):
            numbers *= module.group.size
        total += numbers * (6 if weight.requires_grad else 4)
    return total


def device_stats() -> Stats:
    """The devices of this process, each with what the driver tells beside; see ``get_memory_stats``."""
    stats = get_memory_stats()
    nvml = open_nvml()
    for name, row in stats.items():
        if nvml is None or not name.startswith("gpu_"):
            continue
        uuid = f"GPU-{torch.cuda.get_device_properties(int(name[4:])).uuid}"
        state = nvml.state(uuid)
        if state is not None:
            told = {"used_by_all": state.used, "power": state.power, "temperature": state.temperature}
            told["used_by_others"] = state.used_by_others(os.getpid(), row["reserved"])
            row.update({key: float(value) for key, value in told.items() if value is not None})
    return stats


class Telemetry:
    """The figures of one run.

    Args:
        folder: of the run; ``telemetry.jsonl`` is written there by rank 0, and added to when a run is resumed.
        model: what is trained.
        device: of this rank.
    """

    def __init__(self, folder: Path, model: nn.Module, device: torch.device) -> None:
        self._file = folder / "telemetry.jsonl"
        self._operations = operations_per_token(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_tflops(name)
        self.begin()

    def begin(self, tokens: float = 0.0) -> None:
        """The first step comes next, after ``tokens`` of earlier starts of the run."""
        self._began, self._tokens = time.perf_counter(), tokens

    def measure(self, step: int, tokens: float, logs: dict[str, float]) -> dict[str, float]:
        """The figures since the last call, said and written by rank 0; every rank calls this.

        Args:
            step: optimizer steps so far.
            tokens: of all ranks since the run began, without padding.
            logs: what is logged beside.

        Returns:
            What belongs beside the loss.
        """
        now = time.perf_counter()
        passed, new = now - self._began, tokens - self._tokens
        self._began, self._tokens = now, tokens
        devices = number_devices(gather_objects(device_stats()))
        figures = {"tokens_per_second": new / passed}
        if self._peak is not None:
            gpus = sum(name.startswith("gpu_") for name in devices)
            figures["mfu"] = figures["tokens_per_second"] * self._operations / (gpus * self._peak * 1e12)
        peaks = [row["peak_allocated"] for row in devices.values() if "peak_allocated" in row]
        if peaks:
            figures["peak_allocated_gib"] = max(peaks)
        if is_main_process():
            show(plain_line(step, figures, devices), lambda: draw_lines(step, figures, devices))
            self._write({"step": step, "time": time.time(), **logs, **figures, "devices": devices})
        return figures

    def _write(self, line: dict[str, Any]) -> None:
        """A disk that is full does not end a run, and leaves no half of a line."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:
                size, text = file.tell(), json.dumps(line).encode() + b"\n"
                if file.write(text) < len(text):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            say_once(f"telemetry is not written to {self._file}: {first_line(error)}.")


def number_devices(by_rank: list[Stats]) -> Stats:
    """The devices of all ranks under names of their own: the GPU of rank 3 is ``gpu_3``.

    Where ranks have several, they are numbered through: those of rank 1, of two each, are ``gpu_2`` and ``gpu_3``.
    """
    if len(by_rank) == 1:
        return by_rank[0]
    each = max(map(len, by_rank))
    found: Stats = {}
    for rank, stats in enumerate(by_rank):
        for place, (name, row) in enumerate(stats.items()):
            kind = name.split("_")[0]
            found[f"{kind}_{rank * each + place}"] = row
    return found
