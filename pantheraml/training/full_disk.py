"""A disk that takes no checkpoint costs the run that one: the last good one stays, the next save is tried anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.disk_errors import size_text
from pantheraml.checkpoint.folder_files import bytes_below
from pantheraml.checkpoint.names import checkpoints, step_of
from pantheraml.log import warn
from pantheraml.training.agreeing import DiskRefused
from pantheraml.training.checkpoints import WholeCheckpoints

_BEST = ("best_metric", "best_model_checkpoint", "best_global_step")


class LastingRun(WholeCheckpoints):
    """The part of the trainer that goes on without a checkpoint; a run that ends without its last one fails."""

    _best_before: dict[str, Any] | None = None

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """transformers'; what was the best before is kept until the new one is saved."""
        before = {name: getattr(self.state, name) for name in _BEST}
        is_best = super()._determine_best_metric(*args, **kwargs)
        self._best_before = before if is_best else self._best_before
        return is_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """``WholeCheckpoints``'; that the one before failed, beside the training, does not cost this one."""
        before = self._saving
        try:
            self.finish_saving()
        except DiskRefused as error:
            self._go_on_without(error, 0 if before is None else step_of(before.name))
        super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """transformers'; ``without_what_no_disk_takes``."""
        with self.without_what_no_disk_takes():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def without_what_no_disk_takes(self) -> Iterator[None]:
        """A checkpoint that no disk takes is warned of, and callbacks are not told that it was saved.

        Raises:
            DiskRefused: on every rank, where there is no step left that could be saved instead.
        """
        try:
            yield
        except DiskRefused as error:
            if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
                raise
            self.control.should_save = False
            self._go_on_without(error, self.state.global_step)

    def _go_on_without(self, error: DiskRefused, step: int | None) -> None:
        """Tell of the checkpoint of ``step``, which is not there and is not the best."""
        if self._best_before is not None and self.state.best_global_step == step:
            for name, value in self._best_before.items():
                setattr(self.state, name, value)
        if self.is_world_process_zero():
            warn(
                f"{error} Training goes on, and saves again when it is time.{_last_one(self.args.output_dir)}"
            )


def _last_one(run: str | None) -> str:
    """The last checkpoint of a run with its size, which is what the next one takes, as a sentence; or nothing."""
    with suppress(OSError):
        found = checkpoints(Path(run or "."))
        if found:
            return f" The last one is {found[-1].name}, of {size_text(bytes_below(found[-1]))}."
    return ""
