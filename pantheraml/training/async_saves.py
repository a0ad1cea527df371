"""The large files of a checkpoint are written beside the training: weights and the optimizer's state are copied to host
memory at the step, and a thread writes the copies under the names that transformers gives them.

All that is small (random numbers, schedule, scaler, state of the trainer) is written at the step, by every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from pantheraml.checkpoint.background import Background
from pantheraml.checkpoint.host_copy import host_copy
from pantheraml.errors import first_line
from pantheraml.export.adapter import vocabulary_changed
from pantheraml.export.one_rank import written_here
from pantheraml.log import say_once, warn
from pantheraml.training.agreeing import agreeing
from pantheraml.training.run_record import RecordedRun
from pantheraml.training.shared_state import SharedState

Writes = list[Callable[[], Any]]


def saved_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The entries of ``model.state_dict()`` that ``save_pretrained`` writes; None where it writes others, too.

    Args:
        model: with adapters, of which only these are written, or any other.
    """
    whole = model.state_dict()
    if not isinstance(model, PeftModel):
        return whole
    wanted = {
        _place(tensor)
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(
            model, whole, name, save_embedding_layers=vocabulary_changed(model)
        ).values()
    }
    found = {name: tensor for name, tensor in whole.items() if _place(tensor) in wanted}
    return found if {_place(tensor) for tensor in found.values()} == wanted else None


def _place(tensor: Any) -> Any:
    """Where a tensor's values are; itself for what is none."""
    if not isinstance(tensor, Tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape


class AsyncSaves(SharedState, RecordedRun):
    """The part of the trainer that leaves the large files of a checkpoint to a thread; ``async_save`` says whether."""

    # What the thread will write, of the checkpoint that is being made; None: all is written at the step.
    _later: Writes | None = None
    _processing_copy: Any = None
    # The checkpoint that is being written, of whose end no rank knows yet.
    _saving: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = Background()
        super().__init__(*args, **kwargs)

    @contextmanager
    def going_on(self, resume: str | bool | None) -> Iterator[None]:
        """As ``RecordedRun``; a run that is ended by an error still ends the save that is under way."""
        with super().going_on(resume):
            try:
                yield
            finally:
                failure = self._background.failure()
                if failure is not None:
                    warn(f"A checkpoint could not be saved. {first_line(failure)}.")
                self._saving, self._later = None, None

    def saves_beside(self) -> bool:
        """Whether checkpoints are written beside the training; where that cannot be, the log says why."""
        if not getattr(self.args, "async_save", False):
            return False
        reason = self._why_not_beside()
        if reason is not None:
            say_once(f"checkpoints are not written beside the training: {reason}.")
        return reason is None

    def _why_not_beside(self) -> str | None:
        if self.args.push_to_hub:
            return "with push_to_hub they are uploaded at their step"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self._shares_trained:
            return "each rank has a part of the state"
        if not isinstance(self.model, PeftModel | PreTrainedModel):
            return f"{type(self.model).__name__} has no save_pretrained"
        return None

    @contextmanager
    def kept_for_later(self, beside: bool) -> Iterator[Writes]:
        """What writes the large files of the checkpoint that is made within, if it is to be written ``beside``."""
        later: Writes = []
        self._later = later if beside else None
        try:
            yield later
        finally:
            self._later = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model, the tokenizer and the arguments as transformers saves them, some of it later."""
        model = cast(Any, self.model)
        weights = None if self._later is None or not self.args.should_save else saved_weights(model)
        if weights is None or self._later is None or output_dir is None:
            super()._save(output_dir, state_dict)
            return
        if self._processing_copy is None:  # the trainer's own may be reading rows when the thread writes it
            self._processing_copy = copy.deepcopy(self.processing_class)
        self._later.append(partial(self._write_model, output_dir, host_copy(weights)))
        torch.save(self.args, Path(output_dir, TRAINING_ARGS_NAME))

    def _write_model(self, folder: str, weights: dict[str, Tensor]) -> None:
        """What the thread does."""
        if self.args.device.type == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.set_device(self.args.device)
        with written_here():
            cast(Any, self.model).save_pretrained(folder, state_dict=weights)
        self._processing_copy.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers; the optimizer's state is written later."""
        if self._later is None or not self.args.should_save:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = host_copy(cast(Any, self.optimizer).state_dict())
        self._later.append(partial(torch.save, state, Path(output_dir, OPTIMIZER_NAME)))
        torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir, SCHEDULER_NAME))

    def start_saving(self, finish: Callable[[], None], target: Path, *, beside: bool) -> None:
        """Let its writer finish a checkpoint whose small files are written; every rank calls this.

        Args:
            finish: what the writer has to do; nothing on the others.
            target: the checkpoint.
            beside: go on training meanwhile.

        Raises:
            DiskRefused: as ``finish_saving``, where all wait for it.
        """
        self._saving = target
        self._background.start(finish, beside=beside)
        if not beside:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is under way is there, or is known not to be; every rank calls this.

        Raises:
            DiskRefused: on every rank: the disk took it not.
            SaveError: on ranks beside the one that failed otherwise, which raises its own error.
        """
        target, self._saving = self._saving, None
        if target is None:
            return
        with agreeing(target):  # and nobody looks for it before it is there
            failure = self._background.failure()
            if failure is not None:
                raise failure

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; a run ends with its last checkpoint in place."""
        self.finish_saving()
        return super()._finalize_training(*args, **kwargs)
