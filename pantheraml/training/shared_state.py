"""Checkpoints of weights and optimizers that ranks share out: as one process would write them, so that any may go on.

Every rank takes part in gathering; rank 0 keeps what is gathered in host memory, and writes it. Who loads reads the
whole files and keeps its share. What is trained beside frozen weights is whole on every rank, and saved as ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pantheraml.models.sharding import bring_whole, is_sharded
from pantheraml.models.shares import gathered_weights, share_of, whole
from pantheraml.models.state import get_state


def gathered_state(value: Any, *, keep: bool) -> Any:
    """An optimizer's state dict as one process would have it, in host memory; as ``gathered_weights``."""
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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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


def load_shares(model: nn.Module, folder: Path) -> None:
    """Fill the weights of ``model`` from the safetensors of ``folder``, a tensor at a time."""
    here = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                with torch.no_grad():
                    here[name].copy_(share_of(tensors.get_tensor(name).to(here[name].dtype), here[name]))


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
        weights = gathered_weights(cast(nn.Module, self.model), keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers; every rank takes part."""
        if not self._shares_trained:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = cast(Any, self.optimizer)
        state = gathered_state(optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As transformers; each rank keeps its share."""
        if not self._shares_trained:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_shares(cast(nn.Module, self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers; each rank keeps its share."""
        if checkpoint is None or not self._shares_trained or not Path(checkpoint, OPTIMIZER_NAME).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(Any, self.optimizer)
        plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(shared_out_state(state, plain))
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)
