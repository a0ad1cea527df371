"""Which columns of a stack's margin belong to whose factors.

An adapter of rank R takes R columns for A and B. One with a bias takes one more, where t is 1 and not a product:

    t = [ x A_1^T | 1 | x A_2^T | … | 0 ]          b = [ s B_1 | s bias_1 |        | … | 0 ]
                                                       [                  | s B_2 ]

So the bias is part of the same wide product, and its gradient, the sum of dy, a column of the one of B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.place_factors import Placement
from pantheraml.models.fused.projection import Projection


class Slot(NamedTuple):
    """The place of one adapter.

    Attributes:
        index: of the projection among those of the stack.
        projection: with an adapter.
        a: its A, (R, K).
        b: its B, (N, R).
        rows: of y, those of the projection.
        ranks: the columns of A and B.
        columns: those and the bias's.
    """

    index: int
    projection: Projection
    a: Tensor
    b: Tensor
    rows: slice
    ranks: slice
    columns: slice


def slots(projections: tuple[Projection, ...]) -> list[Slot]:
    """The places of the adapters, one beside the other; projections without one take none."""
    found: list[Slot] = []
    row = column = 0
    for index, projection in enumerate(projections):
        a, b = projection.a, projection.b
        if a is not None and b is not None:
            rows = slice(row, row + projection.features)
            ranks = slice(column, column + projection.rank)
            column += projection.columns
            found.append(Slot(index, projection, a, b, rows, ranks, slice(ranks.start, column)))
        row += projection.features
    return found


def layout(projections: tuple[Projection, ...]) -> tuple[tuple[int, int], ...]:
    """What a margin has to be cleared for when it changes."""
    return tuple((projection.rank, projection.columns) for projection in projections)


def margin_of(projections: tuple[Projection, ...], step: int) -> int:
    """E: the columns of all adapters, rounded up to ``step``."""
    return -(-sum(projection.columns for projection in projections) // step) * step


@torch.inference_mode(False)  # made in an evaluation, it serves training too
def ones_of(projections: tuple[Projection, ...], a: Tensor) -> Tensor | None:
    """(E,) with a 1 in the column of each bias, to be added to every row of t; None without a bias. a is (E, K)."""
    if all(projection.lora_bias is None for projection in projections):
        return None
    ones = torch.zeros(a.shape[0], dtype=a.dtype, device=a.device)
    for slot in slots(projections):
        ones[slot.ranks.stop : slot.columns.stop] = 1
    return ones


def placements(projections: tuple[Projection, ...], a: Tensor, b: Tensor) -> list[Placement]:
    """Where the factors go: A below one another in ``a`` (E, K), s B beside one another in its rows of ``b`` (N, E)."""
    found: list[Placement] = []
    for slot in slots(projections):
        scale, bias = slot.projection.scale, slot.projection.lora_bias
        found.append(Placement(slot.a.detach(), a[slot.ranks], 1.0))
        found.append(Placement(slot.b.detach(), b[slot.rows, slot.ranks], scale))
        if bias is not None:
            target = b[slot.rows, slot.ranks.stop : slot.columns.stop]
            found.append(Placement(bias.detach()[:, None], target, scale))
    return found


def factors(*projections: Projection) -> list[Tensor | None]:
    """A, B and bias of each adapter, in order: the trainable inputs of the functions that use a stack."""
    return [factor for projection in projections for factor in projection.factors]
