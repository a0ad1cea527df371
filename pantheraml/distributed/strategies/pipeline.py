"""Every rank is a whole pipeline over several GPUs of its machine, with rows of its own (PP x DP).

The stages of a rank belong to one process, which launches them (``distributed/pipeline``). Between ranks it is DDP,
over a model whose trained weights are on several devices: its buckets are of one device each, and are reduced when all
micro-batches of a step are through the stages (``HeldReduction``), since each stage has backwards of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from pantheraml.config.combinations import refusal
from pantheraml.distributed.data_parallel import average_buckets
from pantheraml.distributed.process_group import rank_devices
from pantheraml.distributed.strategies.ddp import DDP
from pantheraml.errors import ConfigError
from pantheraml.models.split import without_device_map
from pantheraml.models.state import get_state


class PipelineRanks(DDP):
    """Every rank is a whole pipeline, with rows of its own."""

    name = "pipeline"

    def prepare(self, args: TrainingArguments) -> None:
        """Tell accelerate which GPU is a rank's, where it takes its number for that: in barriers.

        Raises:
            ConfigError: arguments that a pipeline cannot be combined with.
        """
        if args.torch_compile:
            raise refusal("pipeline", "torch_compile", "A pipeline and torch_compile=True were asked for.")
        device = rank_devices()[0]
        if device.type == "cuda" and args.distributed_state is not None:
            args.distributed_state.local_process_index = device.index

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """As DDP; what accelerate does to a model beside wrapping it is done here, since it moves none that is split.

        Raises:
            ConfigError: the model is whole on one device.
        """
        check_is_split(model)
        super().configure(accelerator, args, model)
        with without_device_map(model):
            accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def wrap(self, accelerator: Any, model: nn.Module) -> nn.Module:
        """``model`` in torch's DDP, which is told of no device, since there are several."""
        if isinstance(model, DistributedDataParallel):  # of an earlier run of the same trainer
            return model
        wrapped = DistributedDataParallel(model, **accelerator.ddp_handler.to_kwargs())
        average_buckets(wrapped, accelerator.ddp_handler.reduce_dtype)
        return wrapped

    def describe(self) -> str:
        """As the banner says it."""
        count, kind = len(rank_devices()), "GPUs" if rank_devices()[0].type == "cuda" else "stages"
        return f"PP x DP: each is a pipeline of {count} {kind}, with the whole model and rows of its own"


def check_is_split(model: nn.Module) -> None:
    """Refuse a model that is whole on one device, where a pipeline was asked for.

    Raises:
        ConfigError: it is.
    """
    state = get_state(model)
    if state is None or state.split is None:
        raise ConfigError(
            got="The trainer's settings ask for pipelines, and its model is whole on one device.",
            need="A model is split over the GPUs of its rank when it is loaded.",
            fix="Pass the same MultiGPUConfig to from_pretrained, as use_multi_gpu.",
        )
