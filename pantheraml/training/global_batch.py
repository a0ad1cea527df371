"""How many rows a step has, whoever takes it: the same on any number of ranks.

A step of G rows goes to W ranks in micro-batches of at most B rows each, as many on every rank:

    accumulation  A = ceil(G / (B W))              micro-batches of a rank in a step
    rows of one       ceil(rows of the step / (W A))

Where G is no multiple of B W, micro-batches are smaller than B, and some may be empty. Ranks whose GPUs differ may take
different shares of a step's rows, in as many micro-batches: B is the mean of theirs then. The loss is a sum over label
tokens divided by the number of those of all ranks, so it weighs rows alike however they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from transformers import TrainingArguments

from pantheraml.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of a step, and how ranks take them.

    Attributes:
        rows: G, of a whole step.
        per_device: B, the most rows of a micro-batch.
        ranks: W.
        shares: of each rank, 1 together; None where all take alike.
    """

    rows: int
    per_device: int
    ranks: int
    shares: tuple[float, ...] | None = None

    @property
    def accumulation(self) -> int:
        """A, the micro-batches of each rank in a whole step."""
        return self.turns(self.rows)

    @property
    def is_even(self) -> bool:
        """Whether all micro-batches of a whole step have B rows."""
        return self.shares is None and self.rows == self.per_device * self.ranks * self.accumulation

    def turns(self, rows: int) -> int:
        """Micro-batches of each rank in a step of so many rows."""
        return -(-rows // (self.per_device * self.ranks))

    def cut(self, rows: Sequence[T], rank: int) -> list[list[T]]:
        """The micro-batches of ``rank`` in a step of these rows; empty lists where there are none left for it.

        The ranks take turns: the first micro-batch is that of rank 0, the next that of rank 1. With shares, each has
        rows that follow one another.
        """
        if self.shares is not None:
            return self._cut_share(rows, self.shares, rank)
        slots = self.turns(len(rows)) * self.ranks
        size = -(-len(rows) // slots) if slots else 0
        return [list(rows[slot * size : (slot + 1) * size]) for slot in range(rank, slots, self.ranks)]

    def most(self, rank: int) -> int:
        """Rows of the largest micro-batch of ``rank``, in whole steps and others."""
        if self.shares is None:
            return self.per_device
        return max(self._share(rows, self.shares, rank)[2] for rows in range(1, self.rows + 1))

    def _cut_share(self, rows: Sequence[T], shares: tuple[float, ...], rank: int) -> list[list[T]]:
        start, end, size = self._share(len(rows), shares, rank)
        mine = rows[start:end]
        return [list(mine[turn * size : (turn + 1) * size]) for turn in range(self.turns(len(rows)))]

    def _share(self, rows: int, shares: tuple[float, ...], rank: int) -> tuple[int, int, int]:
        """Where the part of ``rank`` begins and ends in a step of so many rows, and rows of its micro-batches."""
        ends = [0, *(int(rows * part + 0.5) for part in accumulate(shares[:-1])), rows]
        start, end, turns = ends[rank], ends[rank + 1], self.turns(rows)
        return start, end, -(-(end - start) // turns) if turns else 0


def resolve_global_batch(
    config: TrainingArguments, ranks: int, shares: tuple[float, ...] | None = None
) -> GlobalBatch:
    """The global batch that ``config`` says; its ``gradient_accumulation_steps`` is set to what follows.

    Args:
        config: changed in place. ``global_batch_size``, if it has one, or else what its other numbers come to on these
            ranks.
        ranks: of the run.
        shares: of each of them; None where all take alike.

    Raises:
        ConfigError: numbers that are not positive, or an accumulation beside a ``global_batch_size`` that it does not
            come to.
    """
    per_device, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    written: Any = getattr(config, "global_batch_size", None)
    product = per_device * accumulation * ranks
    if written is None:
        return GlobalBatch(product, per_device, ranks, shares)
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ConfigError(
            got=f"global_batch_size={written!r} was given.",
            need="It is the number of rows of an optimizer step on all ranks together, 1 or more.",
            fix="Leave it out for per_device_train_batch_size x gradient_accumulation_steps x ranks.",
        )
    if accumulation != 1 and product != written:
        raise ConfigError(
            got=f"global_batch_size={written} and gradient_accumulation_steps={accumulation} were given.",
            need=f"{per_device} rows per device x {accumulation} x {ranks} ranks are {product}; with a global batch, "
            "the accumulation follows from the number of ranks.",
            fix="Leave gradient_accumulation_steps out.",
        )
    found = GlobalBatch(written, per_device, ranks, shares)
    config.gradient_accumulation_steps = found.accumulation
    return found
