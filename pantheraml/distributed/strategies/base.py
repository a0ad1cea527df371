"""What a way of spreading a run over ranks decides; one class for each, in a file of its own.

A strategy is asked in this order: before arguments become a trainer, after the trainer has its accelerator, when the
model is wrapped, when something is saved or loaded. What it does not decide, transformers and accelerate do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig


class Strategy:
    """One process, or ranks that somebody else has spread the work over.

    Attributes:
        name: as in ``MultiGPUConfig.strategy``.

    Args:
        config: of the run.
    """

    name: ClassVar[str] = "none"

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

    def describe(self) -> str:
        """How the work is spread, as a clause of the line that says who takes part."""
        return "one process"
