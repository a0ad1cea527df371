"""The rows of each rank: one order for all, of which rank r of W takes batches r, r + W, r + 2 W, ...

So a step of W ranks with A micro-batches of B rows each is made of the same W * A * B rows as a step of one rank with
W * A micro-batches. Nothing is lost or seen twice: the last batch may be short, and ranks for which there is none get a
row without labels, so that every rank takes every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from trl import SFTTrainer

Batch = dict[str, Any]


class RankBatches(Sampler[list[int]]):
    """Indices of one rank's batches; an empty list where the order has run out.

    Args:
        rows: the data set.
        sampler: its order; a shuffle is drawn anew, from ``seed`` and the epoch, so that all ranks have the same.
        batch_size: rows of a batch.
        world_size: number of ranks.
        rank: this one.
        seed: of the shuffle.
        drop_last: leave out what fills no batch on every rank.
    """

    def __init__(
        self,
        rows: Sized,
        sampler: Sampler[int],
        batch_size: int,
        *,
        world_size: int,
        rank: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self._rows, self._sampler, self._size = rows, sampler, batch_size
        self.drop_last = drop_last
        # accelerate cuts what ranks gather at the end of an epoch to the number of rows modulo this: nothing is a copy.
        self.batch_size = 1
        self._world_size, self._rank, self._seed = world_size, rank, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._rows), self._size * self._world_size)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for turn in range(len(self)):
            start = (turn * self._world_size + self._rank) * self._size
            yield order[start : start + self._size]
        self._epoch += 1

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        if isinstance(
            self._sampler, RandomSampler
        ):  # as accelerate's seedable sampler orders one process's rows
            return torch.randperm(len(self._rows), generator=generator).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._epoch)
            return list(self._sampler)


class FilledCollator:
    """A collator that makes a batch of no rows: one row, none of whose tokens is a label.

    Args:
        collator: the one for batches of rows.
        row: any row of the data set.
    """

    def __init__(self, collator: Callable[[list[Any]], Batch], row: Any) -> None:
        self.collator, self._row = collator, row

    def __call__(self, examples: list[Any]) -> Batch:
        """The batch on the CPU."""
        if examples:
            return self.collator(examples)
        batch = self.collator([self._row])
        batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class RankedRows(SFTTrainer):
    """The part of the trainer that gives each rank its rows; with one process it changes nothing."""

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """TRL's; with several ranks over rows that can be counted, this rank's share of them."""
        if self.args.world_size == 1 or isinstance(dataset, IterableDataset):
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        sampler = sampler_fn(dataset) if sampler_fn is not None else None
        batches = RankBatches(
            dataset,
            SequentialSampler(dataset) if sampler is None else sampler,
            batch_size,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=is_training and self.args.dataloader_drop_last,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=FilledCollator(collator, dataset[0]),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # The rows are shared out already: accelerate moves batches to the device and knows where the epoch ends.
        return prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            dispatch_batches=False, non_blocking=bool(self.accelerator.non_blocking),
        )  # fmt: skip
