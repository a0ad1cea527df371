"""The strategy of a run, from its settings."""

from __future__ import annotations

from importlib import import_module

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.strategies.base import Strategy

# Where each is; imported when it is chosen, since some need libraries that others do not.
_CLASSES = {
    "ddp": ("ddp", "DDP"),
    "tensor": ("tensor", "Tensor"),
}


def strategy_of(config: MultiGPUConfig, ranks: int) -> Strategy:
    """The strategy that ``config`` asks for.

    Args:
        config: of the run.
        ranks: of the process group; a single one has nobody to share with.
    """
    way = "ddp" if config.way == "auto" else config.way
    if ranks == 1 or way == "none":
        return Strategy(config)
    module, name = _CLASSES[way]
    found: type[Strategy] = getattr(import_module(f"{__package__}.{module}"), name)
    return found(config)
