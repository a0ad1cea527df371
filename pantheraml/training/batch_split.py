"""What share of a step's rows each rank takes, where GPUs differ and that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from pantheraml.config.multi_gpu import BatchSplit
from pantheraml.devices.memory import free_gpu_bytes
from pantheraml.devices.speed import products_per_second
from pantheraml.distributed.process_group import gather_numbers
from pantheraml.errors import ConfigError
from pantheraml.log import say

# GPUs of one kind differ by a few parts in a hundred from one measurement to the next.
_ALIKE = 0.05


def shares_of_ranks(split: BatchSplit, ranks: int, device: torch.device) -> tuple[float, ...] | None:
    """The share of each rank, 1 together; None where all take alike. Every rank calls this.

    Args:
        split: as ``MultiGPUConfig.batch_split``.
        ranks: that share the rows of a step; none of them has several GPUs.
        device: of this one.

    Raises:
        ConfigError: as many shares as there are ranks were not given.
    """
    if split == "even" or ranks == 1:
        return None
    if not isinstance(split, str):
        return _written(cast("Sequence[float]", split), ranks)
    found = [row[0] for row in gather_numbers([_figure(split, device)])]
    if min(found) >= (1 - _ALIKE) * max(found):
        say(f"ranks take as many rows each: they differ by less than {_ALIKE:.0%} in {split}.")
        return None
    shares = tuple(one / sum(found) for one in found)
    parts = ", ".join(f"rank {rank} {share:.1%}" for rank, share in enumerate(shares))
    say(f"rows of a step by {split} of the ranks' devices: {parts}.")
    return shares


def _figure(split: str, device: torch.device) -> float:
    """Of this rank's device: bytes that are free, or FLOP/s. Ranks on the CPU have one memory, and share it evenly."""
    if split == "speed":
        return products_per_second(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return float(free_gpu_bytes(device)) if device.type == "cuda" else 1.0


def _written(split: Sequence[float], ranks: int) -> tuple[float, ...] | None:
    if len(split) != ranks:
        raise ConfigError(
            got=f"MultiGPUConfig(batch_split={tuple(split)}) was given to {ranks} ranks.",
            need="It has a number for each rank.",
            fix=f"Write {ranks} numbers, or batch_split='speed', which measures them.",
        )
    return None if len(set(split)) == 1 else tuple(one / sum(split) for one in split)
