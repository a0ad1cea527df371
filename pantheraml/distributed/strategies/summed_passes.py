"""What ranks that compute each layer together exchange in a pass, such that one that fails within it can take part.

Others wait for its part of every sum that follows. It therefore goes through the model once more with a few tokens,
which asks for the same sums in the same order: those that it had taken part in before are left out, and to the others
it gives zeros of the size that they have there. What comes of them nobody uses: the step is repeated on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from pantheraml.distributed.strategies.exchange_count import ExchangeCount
from pantheraml.models.tensor_group import TensorGroup


class StandIn(NamedTuple):
    """A pass of a few tokens in the place of one that did not fit on this rank.

    Attributes:
        given: its tokens.
        tokens: of the pass that the other ranks go through, padding included.
    """

    given: int
    tokens: int


class PassSums:
    """The sums of a pass in the order in which layers ask for them, counted.

    Args:
        group: the ranks; what they sum goes through this object from now on.
    """

    def __init__(self, group: TensorGroup) -> None:
        self._group = group
        self._count = ExchangeCount()
        self._stand_in: StandIn | None = None
        group.exchange = self._pass_on

    @contextmanager
    def counted(self, stand_in: StandIn | None) -> Iterator[None]:
        """A block for a pass, or, as a ``stand_in``, for what the others go through without this rank's numbers."""
        self._group.forget()
        self._count.begin()
        self._stand_in = stand_in
        try:
            yield
        finally:  # whatever computes next, after an error too, sums its own numbers
            self._group.forget()
            self._stand_in = None
        self._count.end()

    def failed(self) -> None:
        """The pass failed on this rank: what it has summed is remembered."""
        self._count.failed()

    def _pass_on(self, values: Tensor) -> None:
        """Sum ``values`` over the ranks, in place; a stand-in's are left as they are."""
        if self._stand_in is None:
            self._group.sum_up(values)
        elif self._count.is_new:
            given, tokens = self._stand_in
            self._group.sum_up(values.new_zeros(values.numel() // given * tokens))
        self._count.add()
