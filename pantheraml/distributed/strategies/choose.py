"""The strategy of a run, from its settings."""

from __future__ import annotations

from importlib import import_module

from transformers import TrainingArguments

from pantheraml.config.combinations import refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.errors import ConfigError

# Where each is; imported when it is chosen, since some need libraries that others do not.
_CLASSES = {
    "ddp": ("ddp", "DDP"),
    "deepspeed": ("deepspeed", "DeepSpeed"),
}


def strategy_of(config: MultiGPUConfig, ranks: int, args: TrainingArguments | None = None) -> Strategy:
    """The strategy that ``config`` asks for.

    Args:
        config: of the run.
        ranks: of the process group; a single one has nobody to share with.
        args: of the trainer; where they, or what started the ranks, say that DeepSpeed trains, it does.

    Raises:
        ConfigError: ``config`` asks for another strategy than them, or for what one process does not do.
    """
    way = "ddp" if config.way == "auto" else config.way
    is_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
    if is_deepspeed and config.way not in ("auto", "deepspeed"):
        raise ConfigError(
            got=f"MultiGPUConfig(strategy={config.strategy!r}) was given to ranks of DeepSpeed.",
            need="accelerate launch, or args.deepspeed, say that DeepSpeed trains.",
            fix="Leave strategy out, or start the script by torchrun or python.",
        )
    if is_deepspeed:
        way = "deepspeed"
    elif ranks == 1 and way == "deepspeed" and config.cpu_offload:
        got = "cpu_offload was given to one process."
        raise refusal("deepspeed, one process", "cpu_offload", got)
    elif ranks == 1 or way == "none":
        return Strategy(config)
    module, name = _CLASSES[way]
    found: type[Strategy] = getattr(import_module(f"{__package__}.{module}"), name)
    return found(config)
