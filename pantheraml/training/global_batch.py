"""How many rows a step has, whoever takes it: the same on any number of ranks.

A step of G rows goes to W ranks in micro-batches of at most B rows each, as many on every rank:

    accumulation  A = ceil(G / (B W))              micro-batches of a rank in a step
    rows of one       ceil(rows of the step / (W A))

Where G is no multiple of B W, micro-batches are smaller than B, and some may be empty. The loss is a sum over label
tokens divided by the number of those of all ranks, so it weighs rows alike however they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    rows: int
    per_device: int
    ranks: int

    @property
    def accumulation(self) -> int:
        """A, the micro-batches of each rank in a whole step."""
        return self.turns(self.rows)

    @property
    def is_even(self) -> bool:
        """Whether all micro-batches of a whole step have B rows."""
        return self.rows == self.per_device * self.ranks * self.accumulation

    def turns(self, rows: int) -> int:
        """Micro-batches of each rank in a step of so many rows."""
        return -(-rows // (self.per_device * self.ranks))

    def cut(self, rows: Sequence[T], rank: int) -> list[list[T]]:
        """The micro-batches of ``rank`` in a step of these rows; empty lists where there are none left for it.

        The ranks take turns: the first micro-batch is that of rank 0, the next that of rank 1.
        """
        slots = self.turns(len(rows)) * self.ranks
        size = -(-len(rows) // slots) if slots else 0
        return [list(rows[slot * size : (slot + 1) * size]) for slot in range(rank, slots, self.ranks)]


def resolve_global_batch(config: TrainingArguments, ranks: int) -> GlobalBatch:
    """The global batch that ``config`` says; its ``gradient_accumulation_steps`` is set to what follows.

    Args:
        config: changed in place. ``global_batch_size``, if it has one, or else what its other numbers come to on these
            ranks.
        ranks: of the run.

    Raises:
        ConfigError: numbers that are not positive, or an accumulation beside a ``global_batch_size`` that it does not
            come to.
    """
    per_device, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    written: Any = getattr(config, "global_batch_size", None)
    product = per_device * accumulation * ranks
    if written is None:
        return GlobalBatch(product, per_device, ranks)
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
    found = GlobalBatch(written, per_device, ranks)
    config.gradient_accumulation_steps = found.accumulation
    return found
