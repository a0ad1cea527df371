"""Every rank has the whole model and rows of its own; gradients are averaged once an optimizer step.

torch's DistributedDataParallel does it, wrapped by accelerate. Its defaults are for models trained in full: buckets of
25 MB that are reduced while the backward goes on, a search for unused parameters, buffers sent around in every forward.
The gradients of an adapter are one small bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.peak_memory import ONE_BUCKET_BYTES
from pantheraml.distributed.data_parallel import average_buckets, buffers_stay
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.distributed.strategies.held_reduction import count_launches
from pantheraml.errors import ConfigError
from pantheraml.models.sharding import is_sharded
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state


@dataclass
class _Settings(DistributedDataParallelKwargs):
    """Accelerate's, with the name that torch 2.13 gave to one of them, and the dtype of the reduction."""

    forward_sync_buffers: bool = True
    reduce_dtype: torch.dtype | None = None

    def to_dict(self, ignore_keys: tuple[str, ...] = ()) -> dict[str, Any]:
        """What torch's constructor takes."""
        found = super().to_dict()
        return {name: value for name, value in found.items() if name not in ("reduce_dtype", *ignore_keys)}

    def register_comm_hook(self, model: Any) -> None:
        """How the wrapped model reduces its gradients."""
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        if self.reduce_dtype is None and self.comm_hook != DDPCommunicationHookType.NO:
            super().register_comm_hook(model)
        elif trained > model.bucket_bytes_cap and not (
            # Beside weights that are gathered all of it is reduced at once, when every rank has done its passes.
            model.find_unused_parameters or model.static_graph or is_sharded(model)
        ):
            count_launches(model, self.reduce_dtype)
        else:
            average_buckets(model, self.reduce_dtype)


def configure(
    accelerator: Any, args: TrainingArguments, model: nn.Module, config: MultiGPUConfig | None = None
) -> None:
    """Say how DDP will wrap ``model``; what the user wrote in ``args`` counts.

    Args:
        accelerator: of the trainer; its model is not wrapped yet.
        args: the ``ddp_*`` arguments.
        model: the model that will be wrapped.
        config: its ``find_unused_parameters`` and ``reduce_dtype`` count.
    """
    given = accelerator.ddp_handler or DistributedDataParallelKwargs()
    # Gradients are views of their bucket: nothing is copied in or out.
    found: dict[str, Any] = {field.name: getattr(given, field.name) for field in fields(given)}
    found["gradient_as_bucket_view"] = True
    if args.ddp_find_unused_parameters is None:
        found["find_unused_parameters"] = config is not None and config.find_unused_parameters
    if args.ddp_broadcast_buffers is None:  # they are the same on all ranks: tables of angles
        found.update(buffers_stay())
    if config is not None and config.reduce_dtype is not None:
        found["reduce_dtype"] = getattr(torch, config.reduce_dtype)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    if args.ddp_bucket_cap_mb is None and trained <= ONE_BUCKET_BYTES:
        found["bucket_cap_mb"] = 1 + trained // 2**20
    accelerator.ddp_handler = _Settings(**found)


class DDP(Strategy):
    """Every rank has the whole model and rows of its own."""

    name = "ddp"

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """One bucket for an adapter, no search for what is unused, gradients as views.

        Raises:
            ConfigError: the model was loaded as a pipeline.
        """
        if self.name == DDP.name and is_split(model):
            raise ConfigError(
                got="The trainer's settings are those of ranks with a GPU each, and its model is on several GPUs.",
                need="A model that is a pipeline of its rank is trained as one.",
                fix="Pass the MultiGPUConfig of from_pretrained to the trainer, or none.",
            )
        if _is_read_in_place(accelerator, model):
            # accelerate would move the model from "cpu" to "cpu:1", which for torch is a copy.
            accelerator.device_placement = False
        configure(accelerator, args, model, self.config)

    def wrap(self, accelerator: Any, model: nn.Module) -> nn.Module:
        """``model``, of which DDP leaves alone what all ranks of the machine read from the pages of one file.

        A rank that writes to such a page gets a copy of its own, and DDP would write the first rank's weights to all.
        """
        if _is_read_in_place(accelerator, model):
            module = model.module if isinstance(model, DistributedDataParallel) else model
            # For this wrapping alone: torch's own setter leaves a mark on the weights that outlasts it.
            vars(module)["_ddp_params_and_buffers_to_ignore"] = [
                name for name, weight in module.named_parameters() if not weight.requires_grad
            ]
        return model

    def describe(self) -> str:
        """As the banner says it."""
        why = (
            'as strategy="ddp" says'
            if self.config.strategy == "ddp"
            else "since the model fits on each device"
        )
        return f"DDP, {why}: each has the whole model and rows of its own"


def _is_read_in_place(accelerator: Any, model: nn.Module) -> bool:
    """Whether ranks on the CPU train a model of ``from_pretrained``: what is frozen is the file's, the same on all."""
    if accelerator.device.type != "cpu" or get_state(model) is None:
        return False
    return all(weight.device.type == "cpu" for weight in model.parameters())
