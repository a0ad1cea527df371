"""No loss or gradient that is not finite ever reaches the weights; what becomes of the run is a choice.

    stop      the run ends with an error that names step and rows
    skip      the step is left out: weights and optimizer stay, the schedule and the rows go on
    restore   weights and optimizer are those of the last checkpoint again, the schedule and the rows go on: all steps
              since that checkpoint are left out

A loss that is not finite makes the whole gradient so (``_taint``), on all ranks by its reduction. The norm of the
gradient says it on the device, where fused optimizers of torch read it (``found_inf``, as of a GradScaler) and leave
the step out: no host waits. Others take their step after the host has asked. What was left out is told when the trainer
logs, saves, evaluates or ends, where it waits for the device anyway; until then, unless steps are skipped, nothing is
updated any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pantheraml.distributed.process_group import broadcast_object
from pantheraml.errors import NonFiniteError
from pantheraml.log import warn
from pantheraml.models.shares import whole
from pantheraml.training.going_back import go_back, last_whole_of
from pantheraml.training.non_finite import SKIP, STOP, Finding, findings
from pantheraml.training.pipelining import PipelinedSteps
from pantheraml.training.sample_keys import NUMBERS
from pantheraml.training.step_record import Step, StepRecord

# Steps that are not finite one after the other, and returns to one checkpoint, after which nothing is trained any more.
MOST_IN_A_ROW, MOST_RETURNS = 10, 3


class FiniteSteps(PipelinedSteps):
    """The part of the trainer that lets no loss or gradient reach the weights unless it is finite."""

    # One when the step at hand is to be left out, (), float32 on the device; None before the first step.
    _held: Tensor | None = None
    # Not finite after a loss that was not, () on the device; where a scaler would take the next steps.
    _tainted: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._record = StepRecord()
        self._begin_record()
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as SFTTrainer does; every step is looked at."""
        self._begin_record()
        self._resumed = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; the run's strategy sees what accelerate has made."""
        found = super()._prepare_for_training(*args, **kwargs)
        self._strategy.prepared(self.accelerator)
        return found

    def _begin_record(self) -> None:
        self._record.forget()
        self._held = self._tainted = None
        self._means = _Means()
        self._saved: set[str] = set()  # checkpoints of this run
        self._resumed: str | None = None  # what it goes on with
        self._returns: list[str] = []
        self._rows: list[int] = []  # of the pass at hand
        self._left_out = self._in_a_row = 0
        self._must_look = self._schedule_is_due = False

    @property
    def _policy(self) -> str:
        return getattr(self.args, "on_non_finite", STOP)

    # --- on the device --------------------------------------------------------------------------------------

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; where it is not finite, its gradient is not, either."""
        loss = super().compute_loss(*args, **kwargs)
        return self.tainting(loss) if isinstance(loss, Tensor) else loss

    def tainting(self, loss: Tensor) -> Tensor:
        """``loss``, whose gradient is made NaN where it is not finite itself."""
        value = loss.detach()
        if self.accelerator.scaler is not None and self._policy != SKIP:
            value = self._tainted = value if self._tainted is None else _taint(self._tainted, value)
        if loss.requires_grad:
            loss.register_hook(partial(_taint, value))
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's; the loss and the numbers of its rows are noted."""
        self._rows += inputs[NUMBERS].tolist() if NUMBERS in inputs else []
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._waiting:  # in a pipeline the last batch of a step brings the loss of all of them
            self._record.note(self.state.global_step + 1, "loss", loss, self._rows)
            self._rows = []
        return loss

    def remember_figures(self) -> Callable[[], None]:
        """As ``StepLoss``; losses that are noted from now on are forgotten, too."""
        forget_figures, count, rows, tainted = (
            super().remember_figures(), self._record.count, list(self._rows), self._tainted
        )  # fmt: skip

        def forget() -> None:
            forget_figures()
            self._record.forget(count)
            self._rows, self._tainted = list(rows), tainted

        return forget

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """transformers', called between the last backward of a step and the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            norm = whole(torch.as_tensor(norm))
            self._hold_back(norm)
        return norm

    def _hold_back(self, norm: Tensor) -> None:
        """Let the optimizer leave out the step at hand unless ``norm`` is finite."""
        step, scale = self.state.global_step + 1, self._strategy.loss_scale(self.accelerator)
        self._record.note(step, "norm", norm)
        if scale is not None:
            self._record.note(step, "scale", scale)
        if self._strategy.takes_steps_itself:
            self._must_look = self._must_look or not norm.isfinite()
            is_left_out = self._must_look and self.accelerator.optimizer_step_was_skipped
            self._schedule_is_due = is_left_out and scale is None
            return
        if scale is not None:  # a scaler leaves out such steps itself
            return
        bad = (norm * 0 != 0).float()
        if self._held is not None and self._policy != SKIP:
            bad = torch.maximum(bad, self._held)
        self._held = bad
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if _reads_found_inf(optimizer):
            _leave_out_where(bad, optimizer)
        elif bad.item():
            # accelerate's optimizers take no step while gradients are not those of all ranks.
            self.accelerator.sync_gradients = False
            self._must_look = True

    # --- on the host ----------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """transformers', after a look at the steps so far wherever it waits for the device, or the run ends."""
        control = self.control
        if self._schedule_is_due:  # transformers leaves out its step where the optimizer's was
            self._schedule_is_due = False
            cast(Any, self.lr_scheduler).step()
        if (
            self._must_look
            or control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_epoch_stop
            or control.should_training_stop
        ):
            self._look()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, after a look: a run may be asked to save at any step."""
        self._look()
        super()._save_checkpoint(model, trial)
        self._saved.add(f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}")

    def _look(self) -> None:
        """See whether the steps since the last look were finite, and do what the policy says; the same on all ranks.

        Raises:
            NonFiniteError: the run ends.
        """
        self._must_look = False
        steps = self._record.take()
        found = findings(steps)
        if found and self._policy == STOP:
            raise _stopped(found[0])
        bad = {finding.number for finding in found}
        if self._policy == SKIP:
            self._skip(steps, found)
        elif found:
            bad = {step.number for step in steps if step.number >= found[0].number}
            self._restore(found[0])
        self._means.add(steps, bad)
        self._means.correct(self._tr_loss)

    def _skip(self, steps: list[Step], found: list[Finding]) -> None:
        told = {finding.number: finding for finding in found}
        for step in steps:
            finding = told.get(step.number)
            self._in_a_row = 0 if finding is None else self._in_a_row + 1
            if finding is None:
                continue
            if self._in_a_row == MOST_IN_A_ROW:
                raise _hopeless(finding, f"{MOST_IN_A_ROW} steps in a row were not finite.")
            warn(f"{finding} The step is left out.")
            self._left_out += 1

    def _restore(self, finding: Finding) -> None:
        first = self.is_world_process_zero()
        run = self._get_output_dir(trial=None)
        folder = broadcast_object(last_whole_of(run, self._saved, self._resumed) if first else None)
        if folder is None:
            raise NonFiniteError(
                got=str(finding),
                need='on_non_finite="restore" goes back to the last checkpoint, and this run has saved none yet. '
                "The weights are as they were before that step.",
                fix='Save earlier (save_steps), or pass on_non_finite="skip" to leave such steps out.',
            )
        self._returns.append(folder)
        if self._returns.count(folder) == MOST_RETURNS:
            raise _hopeless(finding, f"That would be the return number {MOST_RETURNS} to {folder}.")
        since = go_back(cast(Any, self), folder)
        self._held = self._tainted = None
        self._left_out += since
        warn(
            f"{finding} Weights and optimizer are those of {folder} again: {since} step{'s' * (since > 1)} left out, "
            "this one among them. The run goes on with the next rows."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does; a loss is the mean over the steps that were not left out, whose number is told."""
        if "loss" in logs:
            if self._means.is_nothing:
                logs["loss"] = math.nan
            if self._left_out:
                logs["skipped_steps"] = self._left_out
            self._means = _Means()
        super().log(logs, start_time)


class _Means:
    """The losses since the last log line of those steps that count."""

    def __init__(self) -> None:
        self._sum, self._good, self._bad = 0.0, 0, 0

    def add(self, steps: list[Step], bad: set[int]) -> None:
        """Count ``steps``, of which those numbered ``bad`` were left out."""
        for step in steps:
            if step.number in bad:
                self._bad += 1
            else:
                self._sum, self._good = self._sum + step.loss, self._good + 1

    def correct(self, total: Tensor) -> None:
        """Let a step that was left out count as the mean of the others in ``total``, a sum over all steps."""
        if self._bad:
            total.fill_(self._sum * (1 + self._bad / self._good) if self._good else 0.0)

    @property
    def is_nothing(self) -> bool:
        """Whether all steps were left out."""
        return self._bad > 0 and not self._good


def _taint(loss: Tensor, gradient: Tensor) -> Tensor:
    """``gradient``; NaN where ``loss`` is not finite."""
    return torch.add(gradient, loss, alpha=0)


def _reads_found_inf(optimizer: Any) -> bool:
    """Whether the optimizer leaves a step out where its ``found_inf`` is one: torch's fused ones do."""
    groups = cast(Optimizer, optimizer).param_groups
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in groups
    )


def _leave_out_where(bad: Tensor, optimizer: Any) -> None:
    """Let the next step of ``optimizer`` do nothing where ``bad`` is one, on the device."""
    optimizer.found_inf = bad

    def forget(*_: Any) -> None:
        handle.remove()
        vars(optimizer).pop("found_inf", None)

    handle = optimizer.register_step_post_hook(forget)


def _stopped(finding: Finding) -> NonFiniteError:
    return NonFiniteError(
        got=str(finding),
        need="The weights are as they were before that step. Rows are numbered as in trainer.train_dataset.",
        fix='Look at the rows, or lower the learning rate; on_non_finite="skip" leaves such steps out, "restore" goes '
        "back to the last checkpoint. resume_from_checkpoint=True goes on from there.",
    )


def _hopeless(finding: Finding, why: str) -> NonFiniteError:
    return NonFiniteError(
        got=f"{finding} {why}",
        need="A run whose steps are left out trains nothing.",
        fix="Lower the learning rate, or train in bf16 or float32; go on from a checkpoint before it began.",
    )
