"""A rank's part of every batch of any data loader: rows are cut evenly, and each is on one rank.

    a DataLoader with a sampler    the first rank draws indices and tells the others; each loads its own rows alone
    anything else                  every rank reads all batches, which have to be the same, and keeps its rows of each

A part of n rows of W ranks is ceil(n / W) rows or one less; at the end of the data some ranks may have none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from pantheraml.distributed.process_group import broadcast_object
from pantheraml.errors import DataError, first_line

# Batches of indices that the first rank says at a time.
_AT_ONCE = 256
# Batches of a loader that every rank reads, by which they see whether they read the same.
_COMPARED = 16


class Part(NamedTuple):
    """A rank's part of a batch.

    Attributes:
        batch: of the part; None where there are no rows.
        rows: of the part.
        checksum: the same on all ranks that cut the same batch; 0 where there is nothing to compare.
    """

    batch: Any
    rows: int
    checksum: int = 0


def parts_of(loader: Iterable[Any], rank: int, ranks: int) -> Iterable[Part]:
    """The parts of rank ``rank`` of ``ranks``; each iteration is an epoch, which every rank begins.

    Raises:
        DataError: batches that cannot be cut, or that were shared out already.
    """
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise DataError(
            got="The data loader has a DistributedSampler.",
            need="Rows are shared out between ranks here, and would be so twice.",
            fix="Leave it out: write DataLoader(rows, batch_size=8, shuffle=True).",
        )
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if type(loader) is DataLoader and loader.batch_sampler is not None and not is_stream:
        return _loader_of_parts(loader, rank, ranks)
    return _CutBatches(loader, rank, ranks)


def rows_of_rank(rows: int, rank: int, ranks: int) -> slice:
    """Which of ``rows`` are those of ``rank``."""
    return slice(-(-rows * rank // ranks), -(-rows * (rank + 1) // ranks))


def _loader_of_parts(loader: DataLoader[Any], rank: int, ranks: int) -> DataLoader[Any]:
    """``loader``, which loads one rank's rows alone."""
    indices = _RankIndices(cast("Iterable[list[Any]]", loader.batch_sampler), rank, ranks)
    return DataLoader(
        loader.dataset,
        batch_sampler=cast(Any, indices),
        collate_fn=_CollatedPart(cast(Any, loader.collate_fn)),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _RankIndices:
    """Indices of one rank's part of each batch, which the first rank draws for all."""

    def __init__(self, batches: Iterable[list[Any]], rank: int, ranks: int) -> None:
        self._batches, self._rank, self._ranks = batches, rank, ranks

    def __iter__(self) -> Iterator[list[Any]]:
        drawn = iter(self._batches) if self._rank == 0 else None
        while found := self._told(drawn):
            for batch in found:
                yield batch[rows_of_rank(len(batch), self._rank, self._ranks)]

    def _told(self, drawn: Iterator[list[Any]] | None) -> list[list[Any]]:
        found, failure = [], None
        if drawn is not None:
            try:
                found = [list(batch) for batch in islice(drawn, _AT_ONCE)]
            except Exception as error:  # whatever it is, the other ranks are waiting
                failure = error
        found, said = broadcast_object((found, failure and first_line(failure)))
        if failure is not None:
            raise failure
        if said is not None:
            raise DataError(
                got=f"The sampler failed on the first rank: {said}.",
                need="It draws the rows of all ranks.",
                fix="Try list(loader.batch_sampler) in one process.",
            )
        return found


class _CollatedPart:
    """A collator that makes a part of the rows of one; none of no rows."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Part:
        """The part, on the CPU."""
        return Part(self._collate(rows) if rows else None, len(rows))


class _CutBatches:
    """Parts that are cut out of batches which every rank reads."""

    def __init__(self, batches: Iterable[Any], rank: int, ranks: int) -> None:
        self._batches, self._rank, self._ranks = batches, rank, ranks

    def __iter__(self) -> Iterator[Part]:
        for number, batch in enumerate(self._batches):
            rows = num_rows(batch)
            place = rows_of_rank(rows, self._rank, self._ranks)
            compared = number < _COMPARED and self._ranks > 1
            part = cut(batch, place, rows) if self._ranks > 1 else batch
            count = place.stop - place.start
            yield Part(part if count else None, count, _checksum(batch) if compared else rows)


def num_rows(batch: Any) -> int:
    """Rows of a batch: what its first tensor has of them.

    Raises:
        DataError: there is no tensor with rows.
    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise DataError(
        got=f"A batch is a {type(batch).__name__} without a tensor that has rows.",
        need="The rows of a batch are shared out between ranks.",
        fix="Give a torch DataLoader of a data set with indices, whose batches may be anything.",
    )


def cut(batch: Any, place: slice, rows: int) -> Any:
    """The same structure with some of the rows of each tensor and list in it.

    Args:
        batch: tensors (rows, ...), tensors without axes, lists of ``rows`` values, in mappings, lists and tuples.
        place: of the rows that are kept.
        rows: of the batch.

    Raises:
        DataError: a tensor that has another number of rows.
    """
    if isinstance(batch, Tensor):
        if batch.ndim and batch.shape[0] != rows:
            raise DataError(
                got=f"A batch has tensors of {rows} and of {batch.shape[0]} rows.",
                need="The first axis of all tensors of a batch is that of its rows, where ranks share these.",
                fix="Give a torch DataLoader of a data set with indices: each rank then makes batches of its own.",
            )
        return batch[place] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: cut(value, place, rows) for name, value in cast("Mapping[Any, Any]", batch).items()}
    if isinstance(batch, list | tuple):
        values = cast("Sequence[Any]", batch)
        if len(values) == rows and not any(True for _ in _tensors(values)):
            return values[place]
        found = [cut(value, place, rows) for value in values]
        return type(batch)(*found) if hasattr(batch, "_fields") else type(batch)(found)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
        return
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = cast("Mapping[Any, Any]", batch).values()
    elif isinstance(batch, list | tuple):
        values = cast("Sequence[Any]", batch)
    for value in values:
        yield from _tensors(value)


def _checksum(batch: Any) -> int:
    """A checksum of what the tensors hold."""
    found = 1
    for tensor in _tensors(batch):
        found = zlib.crc32(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), found
        )
    return found
