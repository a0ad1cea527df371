"""Checkpoints of weights and optimizers that ranks share out: any number of ranks goes on with them, shared out or not.

Weights are gathered and written by rank 0 as one process would, a file's worth at a time; who loads reads its share.
The optimizer's state is written and read by each rank for itself (``checkpoint/state_parts.py``). What is trained
beside frozen weights is whole on every rank, and saved as ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from pantheraml.checkpoint.state_parts import clear_parts, is_in_parts, read_parts, write_parts
from pantheraml.export.gathered import gathered
from pantheraml.export.model_methods import save_pretrained
from pantheraml.models.saved_weights import has_other_names, load_weights
from pantheraml.models.sharding import bring_whole, is_sharded
from pantheraml.models.shares import share_of, whole
from pantheraml.models.state import get_state
from pantheraml.training.agreeing import agreeing


def gathered_state(value: Any, *, keep: bool) -> Any:
    """An optimizer's state dict as one process would have it, in host memory; every rank has to ask for it."""
    if isinstance(value, Tensor):
        full = whole(value)
        return full.detach().to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: gathered_state(one, keep=keep) for name, one in value.items()}
    if isinstance(value, list):
        return [gathered_state(one, keep=keep) for one in value]
    return value


def shared_out_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict of ``optimizer``, with this rank's shares of what is as large as a parameter."""
    parameters = parameters_of(optimizer)
    found = {
        number: {
            name: share_of(one, parameters[number])
            if isinstance(one, Tensor) and one.shape == parameters[number].shape
            else one
            for name, one in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": found}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What ``optimizer`` trains, in the order by which its state dict numbers it."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_first_of_several(model: Any, folder: Path) -> None:
    """Load the adapter "default" from the top of ``folder``, beside others in folders of their own.

    transformers 5.17 passes it over where there are others, as a reference that GRPO keeps of an adapter.
    """
    is_there = (folder / SAFETENSORS_WEIGHTS_NAME).is_file()
    if (
        isinstance(model, PeftModel)
        and len(model.peft_config) > 1
        and "default" in model.peft_config
        and is_there
    ):
        active = model.active_adapters[0]
        model.load_adapter(str(folder), "default", is_trainable=active == "default", torch_device="cpu")
        model.set_adapter(active)


class SharedState(Trainer):
    """The part of the trainer that leaves what ranks share out in its place, and saves and loads it where trained."""

    @property
    def _shares_trained(self) -> bool:
        state = get_state(cast(nn.Module, self.model))
        return state is not None and state.sharding is not None and state.sharding.trained

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As transformers, but for shares: where they are kept was decided when they were made."""
        if is_sharded(model):
            bring_whole(model, device)
        else:
            super()._move_model_to_device(model, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; every rank takes part."""
        if not self._shares_trained:
            super().save_model(output_dir, _internal_call)
            return
        model, folder = cast(Any, self.model), Path(output_dir or cast(str, self.args.output_dir))
        with gathered(model, keep=self.args.should_save) as weights:
            if self.args.should_save:
                save_pretrained(model, folder, cast(Any, self.processing_class), state_dict=weights)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers; every rank writes its part, where all have one disk."""
        if not self._shares_trained:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, is_first = Path(output_dir), self.args.should_save
        state = cast(Any, self.optimizer).state_dict()
        if self.args.save_on_each_node:
            state = gathered_state(state, keep=is_first)
            if is_first:
                torch.save(state, folder / OPTIMIZER_NAME)
        else:
            with agreeing(folder, folder):
                if is_first:  # a checkpoint that is written over
                    clear_parts(folder)
                    (folder / OPTIMIZER_NAME).unlink(missing_ok=True)
            with agreeing(folder, folder):
                write_parts(state, folder, is_first=is_first)
        if is_first:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As transformers; each rank keeps its share, and pieces of experts are put together."""
        folder = Path(resume_from_checkpoint)
        if not self._load_own(folder, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_first_of_several(model or self.model, folder)

    def _load_best_model(self) -> None:
        """As ``_load_from_checkpoint``."""
        if not self._load_own(Path(self.state.best_model_checkpoint or ""), None):
            super()._load_best_model()

    def _load_own(self, folder: Path, model: nn.Module | None) -> bool:
        """Load a model's weights where transformers' trainer would not, or not all; whether that was so."""
        target = cast(Any, model or self.model)
        is_ours = self._shares_trained or (
            isinstance(target, PreTrainedModel) and has_other_names(target, folder)
        )
        if is_ours:
            load_weights(target, folder)
        return is_ours

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers; each rank keeps its share, or takes all that ranks have saved in parts."""
        folder = Path(checkpoint or "")
        is_whole = (folder / OPTIMIZER_NAME).is_file()
        is_ours = self._shares_trained if is_whole else is_in_parts(folder)
        if checkpoint is None or not is_ours:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(Any, self.optimizer)
        plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        if is_whole:
            found = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
            state = shared_out_state(found, plain)
        else:
            plain.state.clear()  # moments that a run goes back from would be there beside those that come
            state = read_parts(folder, parameters_of(plain))
        optimizer.load_state_dict(state)
        schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)
