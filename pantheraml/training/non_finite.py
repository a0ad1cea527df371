"""Steps whose loss or gradient is not finite: which rows they are of, and how that is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pantheraml.distributed.process_group import gather_objects
from pantheraml.training.step_record import Step

STOP, SKIP, RESTORE = POLICIES = ("stop", "skip", "restore")
_MOST_NAMED = 64


@dataclass(frozen=True)
class Finding:
    """A step that is not finite.

    Attributes:
        number: of the step, as in the log.
        losses: that are not finite: the rank, the numbers of the rows that went through the model together, the loss.
        rows: of the whole step, on all ranks.
        ranks: how many there are.
    """

    number: int
    losses: list[tuple[int, list[int], float]]
    rows: list[int]
    ranks: int

    def __str__(self) -> str:
        if not self.losses:
            return f"The gradient of step {self.number} is not finite, and its loss is. Its rows: {named(self.rows)}."
        told = [
            f"{loss} for rows {named(rows)}" + (f" (rank {rank})" if self.ranks > 1 else "")
            for rank, rows, loss in self.losses
        ]
        return f"The loss of step {self.number} is {', and '.join(told)}."


def named(rows: Sequence[int]) -> str:
    """Numbers of rows, not more than somebody would look at."""
    shown = ", ".join(map(str, sorted(rows)[:_MOST_NAMED])) or "without a number"
    return shown + (f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else "")


def findings(steps: list[Step]) -> list[Finding]:
    """Those of ``steps`` that are not finite; every rank calls this, with the same steps.

    All ranks have the same gradients, so they know alike whether there is anything to tell one another. In fp16 a
    gradient may overflow for the scale that losses are multiplied by; that is the scaler's business as long as the
    losses are finite and the scale is above 1.
    """
    suspect = [step for step in steps if not math.isfinite(step.norm)]
    if not suspect:
        return []
    found = []
    for by_rank in zip(*gather_objects(suspect), strict=True):
        losses = [(rank, rows, loss) for rank, step in enumerate(by_rank) for rows, loss in step.bad_passes]
        if losses or by_rank[0].scale is None or by_rank[0].scale <= 1:
            rows = [number for step in by_rank for number in step.rows]
            found.append(Finding(by_rank[0].number, losses, rows, len(by_rank)))
    return found
