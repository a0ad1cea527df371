"""The last step of a run is logged, where ``logging_steps`` would leave it out: a short run has a record, too."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class LastStepLogged(TrainerCallback):
    """Asks for a log line after the last step, unless nothing is to be logged."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A step is done."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
