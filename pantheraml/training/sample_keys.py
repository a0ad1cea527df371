"""Which samples a batch is of, and which of them each token, and where in it: what dropout follows
(``models/sample_dropout.py``), and what a step that went wrong is told by (``training/finite_steps.py``).

A row's number is its place in the data set, or how many rows of the stream came before it in the epoch; both are the
same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The number of a row and its epoch among its values, the keys of tokens in a batch, and the numbers of its rows, which
# stay on the host.
SAMPLE, EPOCH, KEYS, NUMBERS = "sample_number", "sample_epoch", "sample_keys", "sample_numbers"


class OfEpoch(list[int]):
    """Numbers of rows that are asked for in an epoch.

    Attributes:
        epoch: counted from 0.
    """

    epoch = 0


class Numbered:
    """A data set whose rows know their number.

    Args:
        rows: a table: rows by number, or by a list of numbers (``__getitems__``).
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self._rows[number], SAMPLE: number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        get = getattr(self._rows, "__getitems__", None)
        found = [self._rows[number] for number in numbers] if get is None else get(numbers)
        epoch = getattr(numbers, "epoch", 0)
        return [{**row, SAMPLE: number, EPOCH: epoch} for row, number in zip(found, numbers, strict=True)]


def without_number(row: dict[str, Any]) -> dict[str, Any]:
    """The row as the data set has it."""
    return {name: value for name, value in row.items() if name not in (SAMPLE, EPOCH)}


def numbers_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The numbers of those rows that have one, int64; a row that only fills up a step has none."""
    return np.array([row[SAMPLE] for row in rows if SAMPLE in row], dtype=np.int64)


def token_keys(batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Tensor | None:
    """The keys of a batch's tokens, shaped as ``input_ids``: sample << 32 | place in the sample.

    Args:
        batch: made of ``rows``: one row of the batch for each, padded on either side, or all behind one another.
        rows: with their numbers.

    Returns:
        int64, or None where the batch is made in another way.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return None
    numbers = torch.tensor([row.get(SAMPLE, 0) for row in rows])[:, None] << 32
    if mask is not None and mask.shape == ids.shape and len(ids) == len(rows):
        return numbers | (mask.long().cumsum(1) - 1).clamp(min=0)
    lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
    if len(lengths) < len(rows) or ids.shape != (1, sum(lengths)):
        return None
    parts = [number | torch.arange(length) for number, length in zip(numbers, lengths, strict=True)]
    return torch.cat(parts)[None]
