"""Losses and gradient norms of steps, kept on the device until somebody looks whether they are finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

_CHUNK = 512
Kind = Literal["loss", "norm", "scale"]


@dataclass
class Step:
    """What one rank knows of a step.

    Attributes:
        number: as in the log, from 1.
        passes: of each forward and backward, the numbers of its rows and its loss.
        norm: of the gradient of all ranks.
        scale: what losses were multiplied by, in fp16.
    """

    number: int
    passes: list[tuple[list[int], float]] = field(default_factory=list)
    norm: float = 0.0
    scale: float | None = None

    @property
    def loss(self) -> float:
        """The step's loss on this rank."""
        return sum(loss for _, loss in self.passes)

    @property
    def rows(self) -> list[int]:
        """The numbers of its rows on this rank."""
        return [number for rows, _ in self.passes for number in rows]

    @property
    def bad_passes(self) -> list[tuple[list[int], float]]:
        """Those whose loss is not finite."""
        return [(rows, loss) for rows, loss in self.passes if not math.isfinite(loss)]


class StepRecord:
    """The steps since somebody looked; noting a number costs one copy on the device, and nobody waits for it."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._noted: list[tuple[int, Kind, list[int]]] = []

    def note(self, step: int, kind: Kind, value: Tensor, rows: list[int] | None = None) -> None:
        """Note one number of a step; a norm is its last but for the scale.

        Args:
            step: its number in the log.
            kind: what ``value`` is.
            value: one number, on any device.
            rows: numbers of the rows whose loss it is.
        """
        place = len(self._noted) % _CHUNK
        if place == 0:
            self._chunks.append(torch.zeros(_CHUNK, dtype=torch.float32, device=value.device))
        self._chunks[-1][place].copy_(value.detach(), non_blocking=True)
        self._noted.append((step, kind, rows or []))

    @property
    def count(self) -> int:
        """Numbers noted since somebody looked."""
        return len(self._noted)

    def forget(self, count: int = 0) -> None:
        """Forget all but the first ``count`` numbers."""
        del self._noted[count:]
        del self._chunks[-(-count // _CHUNK) :]

    def take(self) -> list[Step]:
        """The steps since the last time; waits for the device."""
        values = [number for chunk in self._chunks for number in chunk.tolist()]
        found: dict[int, Step] = {}
        for (number, kind, rows), value in zip(self._noted, values, strict=False):
            step = found.setdefault(number, Step(number))
            if kind == "loss":
                step.passes.append((rows, value))
            elif kind == "norm":
                step.norm = value
            else:
                step.scale = value
        self.forget()
        return list(found.values())
