"""What a way of spreading a run over ranks decides; one class for each, in a file of its own.

A strategy is asked in this order: before arguments become a trainer, after the trainer has its accelerator, when the
model is wrapped, when something is saved or loaded. What it does not decide, transformers and accelerate do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.zero import Zero
from pantheraml.distributed.strategies.held_reduction import Reduction, reduction_of
from pantheraml.errors import CheckpointError


class Strategy:
    """One process, or ranks that somebody else has spread the work over.

    Attributes:
        name: as in ``MultiGPUConfig.strategy``.
        takes_steps_itself: whether the optimizer has taken its step when the norm of its gradient is asked for; it
            then leaves out one that is not finite by itself.

    Args:
        config: of the run.
    """

    name: ClassVar[str] = "none"
    takes_steps_itself: ClassVar[bool] = False

    def __init__(self, config: MultiGPUConfig) -> None:
        self.config = config

    def prepare(self, args: TrainingArguments) -> None:
        """Complete the trainer's own copy of the arguments, before its accelerator is made of them."""

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """Say how accelerate is to wrap ``model``, before it does."""

    def wrap(self, accelerator: Any, model: nn.Module) -> nn.Module:
        """The model as it is trained; one that is marked as prepared is left as it is by accelerate."""
        del accelerator
        return model

    def zero(self, model: nn.Module) -> Zero | None:
        """What the memory of ``model`` follows from where DeepSpeed trains it; None where it does not."""
        del model
        return None

    def prepared(self, accelerator: Any) -> None:
        """accelerate has wrapped model and optimizer: training begins."""

    def reduction(self, accelerator: Any, model: nn.Module) -> Reduction | None:
        """How gradients of ``model``, as it is given for a step, are reduced; None where no step can be repeated."""
        del accelerator
        return reduction_of(model)

    @property
    def talks_in_passes(self) -> bool:
        """Whether ranks wait for one another in every pass, of which each of them then has as many."""
        return False

    @property
    def why_not_merged(self) -> str | None:
        """Why the micro-batches of a step do not go through the model together, as a clause; None where they may."""
        return None

    def loss_scale(self, accelerator: Any) -> torch.Tensor | None:
        """(): what losses are multiplied by in fp16, on the device; None where they are not."""
        scaler = accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=accelerator.device))

    @contextmanager
    def evaluating(self, trainer: Any) -> Iterator[None]:
        """A block in which ``trainer`` evaluates.

        Before training, transformers lets accelerate prepare the model for that alone; accelerate would then take it
        for prepared in training, too, and leave it without DDP: ranks would train apart.

        accelerate keeps every loader that it has prepared, and each evaluation makes one: 10 KB that nobody asks for.
        """
        is_first = not trainer.accelerator._models
        try:
            yield
        finally:
            loaders, training = trainer.accelerator._dataloaders, trainer.callback_handler.train_dataloader
            loaders[:] = [loader for loader in loaders if loader is training]
            if is_first:
                trainer.accelerator.free_memory()
                vars(trainer.model).pop("_is_accelerate_prepared", None)

    def check_begin(self) -> None:
        """Refuse, when ``train()`` is called, a training that cannot be."""

    def finished(self, trainer: Any) -> None:
        """``train()`` of ``trainer`` is over, or was ended by an error; it evaluates and saves from now on."""

    @contextmanager
    def saving(self, trainer: Any) -> Iterator[None]:
        """A block in which ``trainer`` saves its model: rank 0 has all of it."""
        del trainer
        yield

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint that a run of this strategy cannot go on with.

        Raises:
            CheckpointError: it is of another one.
        """
        if list(folder.glob("global_step*")):
            raise CheckpointError(
                got=f"{folder} was saved by DeepSpeed.",
                need="Its optimizer's state is read by DeepSpeed alone.",
                fix='Go on with MultiGPUConfig(strategy="deepspeed"), or start a new run from its weights.',
            )

    def describe(self) -> str:
        """How the work is spread, as a clause of the line that says who takes part."""
        return "one process"
