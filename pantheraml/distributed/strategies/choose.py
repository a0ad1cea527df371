"""The strategy of a run, from its settings, its arguments, and what its model was loaded for."""

from __future__ import annotations

from importlib import import_module

import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

from pantheraml.config.combinations import refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.errors import ConfigError
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state

# Where each is; imported when it is chosen, since some need libraries that others do not.
_CLASSES = {
    "ddp": ("ddp", "DDP"),
    "fsdp": ("fsdp", "FSDP"),
    "deepspeed": ("deepspeed", "DeepSpeed"),
    "pipeline": ("pipeline", "PipelineRanks"),
    "tensor": ("tensor", "Tensor"),
}


def strategy_of(
    config: MultiGPUConfig, ranks: int, model: nn.Module, args: TrainingArguments | None = None
) -> Strategy:
    """The strategy that ``config`` asks for, and that ``model`` was loaded for.

    Args:
        config: of the run.
        ranks: of the process group; a single one has nobody to share with.
        model: that is trained.
        args: of the trainer; where they, or what started the ranks, say that DeepSpeed trains, it does.

    Raises:
        ConfigError: ``config`` asks for another strategy than the model was loaded for, than the arguments, or for what
            one process does not do.
    """
    way = _way(config, model, args)
    if ranks == 1 and way == "deepspeed" and getattr(args, "deepspeed_plugin", None) is None:
        if config.cpu_offload:
            raise refusal("deepspeed, one process", "cpu_offload", "cpu_offload was given to one process.")
        return Strategy(config)
    if ranks == 1 and way != "deepspeed":
        # accelerate refuses a model on several devices to a process group, to one of a single rank, too.
        way = "pipeline" if dist.is_initialized() and _is_split(model) else "none"
    if way == "none":
        return Strategy(config)
    module, name = _CLASSES[way]
    found: type[Strategy] = getattr(import_module(f"{__package__}.{module}"), name)
    return found(config)


def _is_split(model: nn.Module) -> bool:
    """Whether ``model`` is computed in stages, or is on several devices."""
    state = get_state(model)
    return is_split(model) or (state is not None and state.split is not None)


def _way(config: MultiGPUConfig, model: nn.Module, args: TrainingArguments | None) -> str:
    """The strategy by its name, which all who have a say agree on."""
    state = get_state(model)
    is_shared_out = state is not None and state.sharding is not None
    is_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
    if is_deepspeed and config.way not in ("auto", "deepspeed"):
        raise ConfigError(
            got=f"MultiGPUConfig(strategy={config.strategy!r}) was given to ranks of DeepSpeed.",
            need="accelerate launch, or args.deepspeed, say that DeepSpeed trains.",
            fix="Leave strategy out, or start the script by torchrun or python.",
        )
    if is_shared_out and (is_deepspeed or config.way not in ("auto", "fsdp")):
        asked = "deepspeed" if is_deepspeed else config.way
        raise ConfigError(
            got=f"The trainer was given strategy={asked!r}, and from_pretrained shared out the weights between ranks.",
            need="A run has one strategy.",
            fix="Pass the same MultiGPUConfig to both, or leave it out of the trainer.",
        )
    if is_deepspeed:
        return "deepspeed"
    if config.way == "auto":
        return "fsdp" if is_shared_out else "ddp"
    return config.way
