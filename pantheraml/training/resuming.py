"""A run goes on where its checkpoint stands: with the next row, in steps of as many rows, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pantheraml.checkpoint.cursor import Cursor, read_cursor
from pantheraml.errors import ConfigError
from pantheraml.log import say
from pantheraml.training.continuing import ContinuedRun
from pantheraml.training.global_batch import GlobalBatch
from pantheraml.training.rank_batches import RankedRows


class Standing(TrainerCallback):
    """Counts where a run stands in its data.

    Attributes:
        epoch: passes that are done.
        steps: whole steps of the next pass that are done.
    """

    def __init__(self) -> None:
        self.epoch = self.steps = 0
        self._is_stream = False

    def begin(self, cursor: Cursor | None, *, is_stream: bool = False) -> None:
        """A run begins, or goes on at ``cursor``."""
        self._is_stream = is_stream
        self.epoch = 0 if cursor is None else cursor.epoch
        self.steps = 0 if cursor is None else -(-cursor.rows // cursor.global_batch_size)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """A run begins, or goes on; one that is over says so, since its figures will be those of no step."""
        if 0 < state.max_steps <= state.global_step:
            say(f"all {state.max_steps} steps of this run were done before; nothing is left to train.")

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """A step is done."""
        self.steps += 1
        if (
            self._is_stream
        ):  # transformers counts from where the run went on; a pass has as many steps as the run
            state.epoch = self.epoch + self.steps / state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """A pass is done, unless the run was stopped within it."""
        if not control.should_training_stop:
            self.epoch, self.steps = self.epoch + 1, 0

    def cursor(self, batch: GlobalBatch) -> Cursor:
        """The place where the run stands."""
        return Cursor(batch.rows, self.epoch, self.steps * batch.rows)


def go_on(
    batch: GlobalBatch, args: TrainingArguments, checkpoint: Path | None
) -> tuple[GlobalBatch, Cursor | None]:
    """The global batch with which a run goes on, and the place.

    Args:
        batch: what the arguments say on these ranks.
        args: changed in place: the accumulation is what follows on these ranks.
        checkpoint: to go on with, or None.

    Raises:
        ConfigError: another ``global_batch_size`` was written than the checkpoint's.
    """
    cursor = None if checkpoint is None else read_cursor(checkpoint)
    if cursor is None or checkpoint is None:
        if checkpoint is not None and checkpoint.is_dir():
            say(
                f"{checkpoint.name} does not say how many rows its steps had; going on with {batch.rows}, and with the "
                "next row if that is as many."
            )
        return batch, None
    if cursor.global_batch_size == batch.rows:
        return batch, cursor
    if getattr(args, "global_batch_size", None) is not None:
        raise ConfigError(
            got=f"global_batch_size={batch.rows} was given, and a step of {checkpoint.name} has "
            f"{cursor.global_batch_size} rows.",
            need="A run that goes on takes steps of as many rows, or its schedule and its rows would not be the same.",
            fix=f"Leave it out to go on with {cursor.global_batch_size}, or start a new run.",
        )
    found = replace(batch, rows=cursor.global_batch_size)
    args.gradient_accumulation_steps = found.accumulation
    say(
        f"going on with {found.rows} rows a step, as {checkpoint.name} had them: up to {found.per_device} x "
        f"{found.accumulation} x {found.ranks} (per device x accumulation x ranks)."
    )
    return found, cursor


def in_stream(rows: Iterable[Any], cursor: Cursor) -> Cursor:
    """``cursor`` with which a stream goes on: at its end, the beginning of the next pass.

    Nobody knows the end of a stream before it is read, nor did the run that was saved there.
    """
    if hasattr(rows, "set_epoch"):
        rows.set_epoch(cursor.epoch)  # pyright: ignore[reportAttributeAccessIssue]
    if cursor.rows and not list(islice(rows, cursor.rows, cursor.rows + 1)):
        return replace(cursor, epoch=cursor.epoch + 1, rows=0)
    return cursor


class ResumedRows(ContinuedRun, RankedRows):
    """The part of the trainer that goes on where a checkpoint stands."""

    # The checkpoint whose random numbers are to be taken up once the first rows of a stream are there.
    _rng_due: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._standing = Standing()
        super().__init__(*args, **kwargs)
        self.add_callback(self._standing)

    @contextmanager
    def going_on(self, resume: str | bool | None) -> Iterator[None]:
        """A run begins, or goes on where a checkpoint stands in the data.

        Args:
            resume: its folder; without one the run is a new one.

        Raises:
            ConfigError: another ``global_batch_size`` was written than the checkpoint's.
        """
        checkpoint = Path(resume) if isinstance(resume, str) else None
        self._global_batch, cursor = go_on(self._global_batch, self.args, checkpoint)
        is_stream = isinstance(self.train_dataset, IterableDataset)
        if cursor is not None and is_stream:
            cursor = in_stream(cast(Any, self.train_dataset), cursor)
        self._standing.begin(cursor, is_stream=is_stream)
        if cursor is None or not is_stream:  # transformers skips the batches of a table without reading them
            yield
            return
        self._start, skipped = (cursor.epoch, cursor.rows), self.args.ignore_data_skip
        self._rng_due = str(checkpoint) if cursor.rows else None
        self.args.ignore_data_skip = True  # the stream begins where the run goes on
        try:
            yield
        finally:
            self._start, self._rng_due, self.args.ignore_data_skip = (0, 0), None, skipped

    def take_rows(self, rows: int) -> None:
        """As ``ContinuedRun``; these ranks cut a step of so many rows as it comes to."""
        self._global_batch = replace(self._global_batch, rows=rows)
        self.args.gradient_accumulation_steps = self._global_batch.accumulation

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step; random numbers are those of the saved run from then on."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rng_due is not None:  # to begin to read took some of them
            self._load_rng_state(self._rng_due)
            self._rng_due = None
        return found

    def cursor(self) -> Cursor:
        """Where the run stands."""
        return self._standing.cursor(self._global_batch)
