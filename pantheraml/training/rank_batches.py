"""The rows of each rank: one order for all, of which every step takes the next ones, however many ranks there are.

The rows of a step are cut into micro-batches (``GlobalBatch``), of which rank r of W takes those numbered r, r + W, ...
Nothing is lost or seen twice: the last step may be short, and ranks for which there is none get a row without labels,
so that every rank takes every step.

A stream is read by every rank, which keeps its own batches: nobody knows how long a stream is, so nobody could hand out
parts of it that come to the same steps. It costs each rank the reading and tokenising of all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    get_worker_info,
)
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from pantheraml.distributed.data_ranks import DataRanks
from pantheraml.distributed.process_group import gather_objects
from pantheraml.errors import DataError
from pantheraml.log import say_once
from pantheraml.models.sample_dropout import Followed, keyed
from pantheraml.models.token_keys import mixed
from pantheraml.training.collator_draws import drawing_from
from pantheraml.training.global_batch import GlobalBatch
from pantheraml.training.sample_keys import (
    EPOCH,
    KEYS,
    NUMBERS,
    SAMPLE,
    Numbered,
    OfEpoch,
    numbers_of,
    token_keys,
    without_number,
)

Batch = dict[str, Any]
# Which tokens of a flat batch are labels: numbers that stay on the host, where nobody waits to learn them.
LABEL_AT = "label_at"
# Rows of a stream by which ranks see whether they read the same one.
_COMPARED = 16


class RankBatches(Sampler[list[int]]):
    """Indices of one rank's batches; an empty list where the order has run out.

    Args:
        rows: the data set.
        sampler: its order; a shuffle is drawn anew, from ``seed`` and the epoch, so that all ranks have the same.
        batch: how many rows a step has, and how they are cut.
        rank: this one.
        seed: of the shuffle.
        drop_last: leave out, of the last step, what fills no batch on every rank.
    """

    def __init__(
        self,
        rows: Sized,
        sampler: Sampler[int],
        batch: GlobalBatch,
        *,
        rank: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self._rows, self._sampler, self._batch = rows, sampler, batch
        self.drop_last = drop_last
        # accelerate cuts what ranks gather at the end of an epoch to the number of rows modulo this: nothing is a copy.
        self.batch_size = 1
        self._rank, self._seed = rank, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self._count(), self._batch.rows)
        return steps * self._batch.accumulation + self._batch.turns(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()[: self._count()]
        for start in range(0, len(order), self._batch.rows):
            for numbers in self._batch.cut(order[start : start + self._batch.rows], self._rank):
                batch = OfEpoch(numbers)
                batch.epoch = self._epoch
                yield batch
        self._epoch += 1

    def _count(self) -> int:
        """Rows of an epoch."""
        together = self._batch.per_device * self._batch.ranks
        rest = len(self._rows) % self._batch.rows
        return len(self._rows) - (rest % together if self.drop_last else 0)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        if isinstance(
            self._sampler, RandomSampler
        ):  # as accelerate's seedable sampler orders one process's rows
            return torch.randperm(len(self._rows), generator=generator).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._epoch)
            return list(self._sampler)


class RankStream(IterableDataset[list[Any]]):
    """One rank's batches of a stream, as lists of rows; an empty list where the stream has run out.

    Args:
        rows: the stream, in the same order on all ranks.
        batch: how many rows a step has, and how they are cut.
        rank: this one.
        drop_last: leave out, of the last step, what fills no batch on every rank.
        start: where a run goes on: the first epoch, and the rows of it that are done.
        numbered: let rows know their number in the epoch.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        batch: GlobalBatch,
        *,
        rank: int,
        drop_last: bool = False,
        start: tuple[int, int] = (0, 0),
        numbered: bool = False,
    ) -> None:
        self._rows, self._batch, self._rank, self._drop_last = rows, batch, rank, drop_last
        self._start, self._epoch, self._numbered = start, 0, numbered

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next, counted from the start."""
        self._epoch = epoch
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(self._start[0] + epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def __iter__(self) -> Iterator[list[Any]]:
        first, batch = 0 if self._epoch else self._start[1], self._batch
        rows = islice(_in_one_order(self._rows), first, None)
        if self._numbered:
            epoch = self._start[0] + self._epoch
            rows = ({**row, SAMPLE: number, EPOCH: epoch} for number, row in enumerate(rows, first))
        together = batch.per_device * batch.ranks
        while found := list(islice(rows, batch.rows)):
            if self._drop_last and len(found) < batch.rows:
                found = found[: len(found) // together * together]
            yield from batch.cut(found, self._rank)


def _in_one_order(rows: Iterable[Any]) -> Iterable[Any]:
    """A stream in the order that it has without workers: in a worker, be it the only one, datasets shuffles anew."""
    if get_worker_info() is None or not isinstance(rows, datasets.IterableDataset):
        return rows
    return ({name: values[0] for name, values in batch.items()} for batch in rows.iter(batch_size=1))


class FilledCollator:
    """A collator that makes a batch of no rows: one row, none of whose tokens is a label.

    Args:
        collator: the one for batches of rows.
        row: any row of the data set.
        numbered: rows know their number; a batch tells those of its rows.
        keyed: add the keys of tokens, from the rows' numbers.
        seed: from which, and from the rows' numbers, the collator draws random numbers; None: it draws none.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Batch],
        row: Any,
        *,
        numbered: bool = False,
        keyed: bool = False,
        seed: int | None = None,
    ) -> None:
        self.collator, self._row, self._numbered, self._keyed = collator, row, numbered, keyed
        self._seed = seed

    def __call__(self, examples: list[Any]) -> Batch:
        """The batch on the CPU."""
        return self._collated(examples) if examples else without_labels(self._collated([self._row]))

    def _collated(self, examples: list[Any]) -> Batch:
        if not self._numbered:
            return self.collator(examples)
        rows, numbers, seed = [without_number(one) for one in examples], numbers_of(examples), self._seed
        place = (examples[0].get(EPOCH, 0), *numbers.tolist())
        with nullcontext() if seed is None else drawing_from(mixed(seed, *place)):
            batch = {**self.collator(rows), NUMBERS: numbers}
        keys = token_keys(batch, examples) if self._keyed else None
        return batch if keys is None else {**batch, KEYS: keys}


def without_labels(batch: Batch) -> Batch:
    """A batch of the same rows that trains nothing."""
    none = {"labels": torch.full_like(batch["labels"], -100)}
    if LABEL_AT in batch:
        none[LABEL_AT] = batch[LABEL_AT][:0]
    if NUMBERS in batch:
        none[NUMBERS] = batch[NUMBERS][:0]
    return batch | none


def first_row(rows: Iterable[Any]) -> Any:
    """The first row of a stream; every rank calls this.

    Raises:
        DataError: there is none, or ranks read different streams.
    """
    found = list(islice(rows, _COMPARED))
    prints = gather_objects(hashlib.sha256(repr(found).encode()).hexdigest())
    if len(set(prints)) > 1:
        raise DataError(
            got="The ranks read streams whose first rows differ.",
            need="Every rank reads the whole stream, in the same order, and takes its own share of the rows.",
            fix="Write .shuffle(seed=3407), with a seed, and leave split_dataset_by_node out.",
        )
    if not found:
        raise DataError(
            got="The stream has no rows.",
            need="At least one row is needed.",
            fix="Check what was filtered out of it.",
        )
    return found[0]


class RankedRows(SFTTrainer):
    """The part of the trainer that gives each rank its rows, in an order that does not depend on how many there are."""

    _global_batch: GlobalBatch
    # Who has rows of its own; ranks that compute layers together have the same.
    _data_ranks = DataRanks()
    # What drops, and follows the samples.
    _dropout = Followed()
    # Of a stream: the epoch and the rows of it that are done where the run goes on.
    _start = (0, 0)

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        # TRL's draws no random numbers.
        self._has_own_collator = data_collator is not None
        super().__init__(*args, data_collator=data_collator, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step; a step in which a stream ends is filled up with ones that train nothing.

        The trainer knows the last step of an epoch by the number of batches. That of a stream is not known, and what is
        left at its end would wait, as gradients, for the first step of the next epoch.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_items is not None:
            batches += [without_labels(batches[-1])] * (num_batches - len(batches))
        return batches, num_items

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's; dropout follows the samples of the batch and the number of the step."""
        inputs.pop(NUMBERS, None)
        keys = inputs.pop(KEYS, None)
        seed = mixed(self.args.seed, self.state.global_step)
        with keyed(self._dropout.keys(keys, seed)):
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """This rank's share of the rows; TRL's where one process evaluates."""
        if self.args.world_size == 1 and not is_training:
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        share = self._share_of_stream if isinstance(dataset, IterableDataset) else self._share_of_rows
        loader = share(dataset, batch_size, collator, sampler_fn, is_training)
        # The rows are shared out already: accelerate moves batches to the device and knows where the epoch ends.
        return prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            dispatch_batches=False, non_blocking=bool(self.accelerator.non_blocking),
        )  # fmt: skip

    def _share_of_rows(
        self, dataset: Any, batch_size: int, collator: Any, sampler_fn: Any, is_training: bool
    ) -> DataLoader[Any]:
        sampler = None if sampler_fn is None else sampler_fn(dataset)
        batch = self._batch_of(batch_size, is_training)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size = batch.rows  # transformers groups for one rank
        batches = RankBatches(
            dataset,
            SequentialSampler(dataset) if sampler is None else sampler,
            batch,
            rank=self._data_ranks.index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=is_training and self.args.dataloader_drop_last,
        )
        filled = self._filled(collator, dataset[0], is_training)
        return self._loader(Numbered(dataset) if is_training else dataset, filled, batch_sampler=batches)

    def _share_of_stream(
        self, dataset: Any, batch_size: int, collator: Any, sampler_fn: Any, is_training: bool
    ) -> DataLoader[Any]:
        if self.args.dataloader_num_workers > 1:
            say_once("a stream is read by one worker of each rank, so that all ranks read it in one order.")
        stream = RankStream(
            dataset,
            self._batch_of(batch_size, is_training),
            rank=self._data_ranks.index,
            drop_last=is_training and self.args.dataloader_drop_last,
            start=self._start if is_training else (0, 0),
            numbered=is_training,
        )
        filled = self._filled(collator, first_row(dataset), is_training)
        return self._loader(stream, filled, batch_size=None)

    def _filled(self, collator: Any, row: Any, is_training: bool) -> FilledCollator:
        seed = self.args.seed if is_training and self._has_own_collator else None
        keyed = is_training and self._dropout.drops
        return FilledCollator(collator, row, numbered=is_training, keyed=keyed, seed=seed)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of a step, however they are cut and whoever shares them."""
        return self._global_batch.rows

    def _batch_of(self, batch_size: int, is_training: bool) -> GlobalBatch:
        """How rows are cut: those of a training step, or of one batch on each rank."""
        ranks = self._data_ranks.size
        return self._global_batch if is_training else GlobalBatch(batch_size * ranks, batch_size, ranks)

    def _loader(self, dataset: Any, collator: FilledCollator, **batches: Any) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            collate_fn=collator,
            num_workers=min(workers, 1) if isinstance(dataset, RankStream) else workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            **batches,
        )
