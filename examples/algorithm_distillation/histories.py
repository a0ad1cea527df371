"""Learning histories as rows to train on, and the order in which steps take them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from learner import Histories

Row = dict[str, Tensor]


class HistoryRows(Dataset[Row]):
    """One history a row, its episodes one after another: what an agent knew at each step, and what it did.

    A row has ``cells``, ``last_actions`` (an action + 1; 0 where an episode begins), ``last_rewards`` and ``actions``,
    each (episodes x steps,) int64. The action is to be told from the rest up to its step.
    """

    def __init__(self, histories: Histories) -> None:
        before = [torch.zeros_like(histories.actions), torch.zeros_like(histories.rewards)]
        before[0][..., 1:] = histories.actions[..., :-1] + 1
        before[1][..., 1:] = histories.rewards[..., :-1]
        names = ("cells", "last_actions", "last_rewards", "actions")
        columns = (histories.cells, *before, histories.actions)
        self._columns = {name: one.flatten(1) for name, one in zip(names, columns, strict=True)}

    def __len__(self) -> int:
        return len(self._columns["cells"])

    def __getitem__(self, index: int | list[int]) -> Row:
        return {name: column[index].long() for name, column in self._columns.items()}

    # A loader asks for all rows of a batch at once, and gets the batch.
    __getitems__ = __getitem__


class EndlessBatches(Sampler[list[int]]):
    """Batches of rows without end: each epoch every row once, in an order that follows from seed and epoch alone.

    An epoch's last rows share a batch with the first ones of the next, so that all batches, and so all steps on any
    number of ranks, are of one size: no row is dropped, none is repeated to fill up. accelerate gives batches to ranks
    in turn, so a step takes the same rows on W ranks as on one rank that accumulates W times as many batches.

    Args:
        num_rows: of the data.
        batch_size: rows of a batch.
        seed: of the order.

    Attributes:
        start: rows that were taken before, where a run goes on.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int, start: int = 0) -> None:
        self.batch_size, self.drop_last = batch_size, False  # accelerate reads both
        self._num_rows, self._seed, self.start = num_rows, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        rows = self._rows()
        while True:
            yield list(islice(rows, self.batch_size))

    def _rows(self) -> Iterator[int]:
        first, done = divmod(self.start, self._num_rows)
        for epoch in count(first):
            generator = torch.Generator().manual_seed(self._seed + epoch)
            order = torch.randperm(self._num_rows, generator=generator).tolist()
            yield from order[done if epoch == first else 0 :]
