"""A trainer that is watched: it tells its watchdog how far it is, and what may take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.process_group import connect_store, get_rank, group_size
from pantheraml.distributed.watchdog import Allowance, Watchdog
from pantheraml.training.checkpoints import WholeCheckpoints

# What is done after an event, and how long it may take; after the others goes on what was done before.
_NEXT: dict[str, tuple[str, Allowance]] = {
    "on_train_begin": ("starting an epoch", "first"),
    "on_epoch_begin": ("reading the first rows", "first"),
    "on_step_begin": ("computing", "step"),
    "on_substep_end": ("computing", "step"),
    "on_optimizer_step": ("computing", "step"),
    "on_step_end": ("between steps", "step"),
    "on_epoch_end": ("between epochs", "first"),
    "on_prediction_step": ("evaluating", "patient"),
}


class WatchedRuns(WholeCheckpoints):
    """The part of the trainer that is watched while it trains."""

    _watchdog: Watchdog | None = None

    @contextmanager
    def watched(self, config: MultiGPUConfig | None) -> Iterator[None]:
        """Have a block in which this trainer trains watched; ``hang_seconds`` and ``timeout_minutes`` count."""
        name = f"watch_{next(_runs)}"
        if config is None or not config.hang_seconds:
            yield
            return
        watchdog = self._watchdog = Watchdog(
            config.hang_seconds,
            60 * config.timeout_minutes,
            Path(self.args.output_dir or "outputs"),
            rank=get_rank() if group_size() > 1 else 0,
            world_size=group_size(),
            connect=connect_store,
            name=name,
        )
        watchdog.start()
        error: BaseException | None = None
        try:
            with _told(self.callback_handler, watchdog):
                yield
        except BaseException as failure:
            error = failure
            raise
        finally:
            watchdog.stop(error)
            self._watchdog = None

    def patiently(self, phase: str) -> AbstractContextManager[None]:
        """What is done in this block may take as long as a collective may.

        Args:
            phase: what it is, for the report of a run that hangs all the same.
        """
        return nullcontext() if self._watchdog is None else self._watchdog.patient(phase)

    def progress(self, phase: str, allowance: Allowance = "step") -> None:
        """The step goes on; ``phase`` is what comes next, and ``allowance`` how long that may take."""
        if self._watchdog is not None:
            self._watchdog.progress(self.state.global_step + 1, phase, allowance)

    def checkpoint_of(self, resume: str | Path | bool | None) -> str | bool | None:
        """The checkpoint to go on with; to read it, and to come to its row, may take long."""
        with self.patiently("looking for a checkpoint"):
            found = super().checkpoint_of(resume)
        if self._watchdog is not None:
            self._watchdog.resumed = bool(found)
        return found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step; nobody knows how long the next rows of a stream take."""
        is_stream = isinstance(self.train_dataset, IterableDataset)
        with self.patiently("reading a stream") if is_stream else nullcontext():
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._watchdog is not None:
            self._watchdog.begins(sum(_work(batch) for batch in batches))
        return batches, num_items

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; for each batch the time begins anew."""
        with self.patiently("evaluating"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self.patiently("saving"):
            return super()._save_checkpoint(*args, **kwargs)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is under way."""
        with self.patiently("saving"):
            super().finish_saving()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Last uploads, the best model, and callbacks at the end of a run."""
        with self.patiently("ending"):
            return super()._finalize_training(*args, **kwargs)


def _work(batch: Any) -> int:
    """How much there is to compute of a batch: by the square of its rows' length, padding included, at most."""
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    return ids.numel() * ids.shape[-1] if isinstance(ids, Tensor) else 0


@contextmanager
def _told(handler: Any, watchdog: Watchdog) -> Iterator[None]:
    """Every event of this handler goes by the watchdog; its callbacks may take their time."""
    call = handler.call_event

    def call_event(
        event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> Any:
        with watchdog.patient("callbacks"):
            result = call(event, args, state, control, **more)
        if event in _NEXT:
            watchdog.progress(state.global_step + 1, *_NEXT[event])
        return result

    handler.call_event = call_event
    try:
        yield
    finally:
        del handler.call_event


# Trainers train in the same order on all ranks.
_runs = count()
