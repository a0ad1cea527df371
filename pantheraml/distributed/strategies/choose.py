"""The strategy of a run, from its settings."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.errors import ConfigError
from pantheraml.models.state import get_state

# Where each is; imported when it is chosen, since some need libraries that others do not.
_CLASSES = {
    "ddp": ("ddp", "DDP"),
    "fsdp": ("fsdp", "FSDP"),
    "pipeline": ("pipeline", "PipelineRanks"),
}


def strategy_of(config: MultiGPUConfig, ranks: int, model: nn.Module) -> Strategy:
    """The strategy that ``config`` asks for, and that ``model`` was loaded for.

    Args:
        config: of the run.
        ranks: of the process group; a single one has nobody to share with.
        model: that is trained.

    Raises:
        ConfigError: the model was loaded for another one.
    """
    way, state = config.way, get_state(model)
    if state is not None and state.sharding is not None and way not in ("auto", "fsdp"):
        raise ConfigError(
            got=f"The trainer was given strategy={way!r}, and from_pretrained shared out the weights between ranks.",
            need="A run has one strategy.",
            fix="Pass the same MultiGPUConfig to both, or leave it out of the trainer.",
        )
    if way == "auto":
        way = "ddp" if state is None or state.sharding is None else "fsdp"
    if ranks == 1 or way == "none":
        return Strategy(config)
    module, name = _CLASSES[way]
    found: type[Strategy] = getattr(import_module(f"{__package__}.{module}"), name)
    return found(config)
