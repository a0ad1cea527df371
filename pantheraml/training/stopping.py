"""A run that is asked to stop saves a checkpoint, on all ranks at the same step, and ends."""

from __future__ import annotations

import signal
from itertools import count
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pantheraml.distributed.agreement import Agreement
from pantheraml.distributed.process_group import barrier, connect_store, get_rank, group_size
from pantheraml.errors import RunStopped
from pantheraml.launch.stopping import note_stop
from pantheraml.log import say
from pantheraml.training.full_disk import LastingRun
from pantheraml.training.stop_requests import SAVE, STOP, StopRequests
from pantheraml.training.stop_signals import leave_signals_to_rank

# "Try again later": what a STOP file ends a program with, so that what comes after it in a script is not done.
EXIT_LATER = 75


class _Stop(BaseException):
    """Leaves the training loop, through all that catches errors."""

    def __init__(self, wish: str) -> None:
        self.wish = wish


class StoppableRuns(LastingRun):
    """The part of the trainer that saves and ends when a signal or a file asks it to.

    Before the first step is done there is nothing to save, and signals do what they always do.
    """

    _requests: StopRequests | None = None
    # What all ranks agreed to do: end as soon as this step is logged; save when it is done.
    _stop: str | None = None
    _save_too = False
    _saved_at: int | None = None
    _run = 0

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, unless the run is asked to stop.

        Raises:
            RunStopped: it was, by SIGTERM, SIGUSR1 or a file STOP, and is saved.
            KeyboardInterrupt: it was, by Ctrl-C, and is saved.
        """
        self._stop, self._saved_at, self._run = None, None, next(_runs)
        heard = None
        try:
            result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
        except _Stop as stop:
            self.is_in_train = False
            self._save_now(trial)
            self.finish_saving()
            raise self._ended_by(stop.wish) from None
        finally:
            if self._requests is not None:
                self._requests.close()
                heard, self._requests = self._requests.heard, None
        if heard == "SIGINT":
            raise KeyboardInterrupt("The training was done.")
        if heard is not None:
            say(f"{heard}: the training was done already, so the program goes on.")
        return result

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save what is due at the end of a step or an epoch, and what was asked for."""
        if self._requests is None:
            self._requests = _listen(f"stop_{self._run}", Path(self.args.output_dir or "."))
        self._heed(self._requests.passed())
        if self._stop is not None:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._save_too:
            self._save_too = False
            with self.without_what_no_disk_takes():
                self._save_now(None)
        if self._stop is not None and not self.control.should_training_stop:  # else the training is done
            raise _Stop(self._stop)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, whose workers are not ended by what asks the run to stop."""
        loader = super()._get_dataloader(*args, **kwargs)
        leave_signals_to_rank(loader)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; a run that goes on after its last step is done, where transformers takes one more."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; an evaluation within a run that is asked to stop ends with this batch."""
        result = super().prediction_step(*args, **kwargs)
        if self._requests is not None:
            self._heed(self._requests.passed())
            if self._stop is not None:
                raise _Stop(self._stop)
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step

    def _heed(self, wish: str | None) -> None:
        if wish == SAVE:
            self._save_too = True
        elif wish is not None:
            self._stop = wish

    def _save_now(self, trial: Any) -> None:
        """A checkpoint of the step that is done, unless it was just saved."""
        if self._saved_at != self.state.global_step:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _ended_by(self, wish: str) -> BaseException:
        """What ends this rank, after rank 0 has said where the run is."""
        state = self.state
        folder = Path(self.args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        said = (
            f"{wish}: stopped after step {state.global_step} of {state.max_steps}, saved in {folder}; "
            "trainer.train(resume_from_checkpoint=True) goes on."
        )
        if self.is_world_process_zero():
            say(said)
        note_stop(said)
        barrier()  # who ends first may end the others
        if wish == "SIGINT":
            return KeyboardInterrupt(said)
        return RunStopped(EXIT_LATER if wish == STOP else 128 + signal.Signals[wish], said)


def _listen(name: str, folder: Path) -> StopRequests:
    rank, ranks = (get_rank(), group_size()) if group_size() > 1 else (0, 1)
    agreement = Agreement(name, connect_store if ranks > 1 else None, rank, ranks)
    return StopRequests(agreement, folder if rank == 0 else None)


# Trainers train in the same order on all ranks.
_runs = count()
