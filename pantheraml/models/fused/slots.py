"""Which columns of a stack's margin belong to whose factors.

An adapter of rank R takes R columns for A and B. Where adapters have biases, all of them share one more column, where t
is 1 and not a product:

    t = [ x A_1^T | x A_2^T | 1 | 0 ]          b = [ s B_1 |       | s bias_1 | 0 ]
                                                   [       | s B_2 | s bias_2 | 0 ]

So biases are part of the same wide product.
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
    """

    index: int
    projection: Projection
    a: Tensor
    b: Tensor
    rows: slice
    ranks: slice


def slots(projections: tuple[Projection, ...]) -> list[Slot]:
    """The places of the adapters, one beside the other; projections without one take none."""
    found: list[Slot] = []
    row = rank = 0
    for index, projection in enumerate(projections):
        a, b = projection.a, projection.b
        if a is not None and b is not None:
            rows, ranks = slice(row, row + projection.features), slice(rank, rank + projection.rank)
            found.append(Slot(index, projection, a, b, rows, ranks))
            rank += projection.rank
        row += projection.features
    return found


def layout(projections: tuple[Projection, ...]) -> tuple[object, ...]:
    """What a margin has to be cleared for when it changes."""
    return *(projection.rank for projection in projections), _have_bias(projections)


def margin_of(projections: tuple[Projection, ...], step: int) -> int:
    """E: the columns of all adapters, rounded up to ``step``."""
    return -(-(_ranks(projections) + _have_bias(projections)) // step) * step


@torch.inference_mode(False)  # made in an evaluation, it serves training too
def ones_of(projections: tuple[Projection, ...], a: Tensor) -> Tensor | None:
    """(E,) with a 1 in the column of the biases, to be added to every row of t; None without one. a is (E, K)."""
    if not _have_bias(projections):
        return None
    ones = torch.zeros(a.shape[0], dtype=a.dtype, device=a.device)
    ones[_ranks(projections)] = 1
    return ones


def placements(projections: tuple[Projection, ...], a: Tensor, b: Tensor) -> list[Placement]:
    """Where the factors go: A below one another in ``a`` (E, K), s B beside one another in its rows of ``b`` (N, E)."""
    found: list[Placement] = []
    last = _ranks(projections)
    for slot in slots(projections):
        scale, bias = slot.projection.scale, slot.projection.lora_bias
        found.append(Placement(slot.a, a[slot.ranks], 1.0))
        found.append(Placement(slot.b, b[slot.rows, slot.ranks], scale))
        if bias is not None:
            found.append(Placement(bias, b[slot.rows, last : last + 1], scale))
    return found


def _ranks(projections: tuple[Projection, ...]) -> int:
    return sum(projection.rank for projection in projections)


def _have_bias(projections: tuple[Projection, ...]) -> bool:
    return any(projection.lora_bias is not None for projection in projections)


def factors(*projections: Projection) -> list[Tensor | None]:
    """What is trained of each projection, in order: the trainable inputs of the functions that use a stack."""
    return [factor for projection in projections for factor in projection.factors]
