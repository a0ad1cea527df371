"""Whether a model drops anything itself, beside its adapters: by modules, or by shares that it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pantheraml.errors import ConfigError

# Attention that calls what is answered here; others drop within kernels of their own.
_ANSWERED = ("eager", "sdpa", "pantheraml")
# Shares in configurations that are those of heads which models of language do not have.
_OF_OTHER_HEADS = ("classifier", "summary")


def drops_inside(model: nn.Module) -> bool:
    """Whether anything but adapters drops in training: a module, or what a module or the configuration says.

    Raises:
        ConfigError: attention drops within a kernel that draws masks of its own.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    names = set(_shares({} if text is None else config.to_dict()))
    for _, module in inside(model):
        names.update(own_shares(module))
        if is_dropout(module) and getattr(module, "p", 0.0) > 0:
            names.add(type(module).__name__)
    how = getattr(text, "_attn_implementation", None)
    of_attention = sorted(name for name in names if "att" in name)
    if of_attention and how not in (None, *_ANSWERED):
        raise ConfigError(
            got=f"{of_attention[0]} is above 0, and attn_implementation={how!r} draws masks of its own.",
            need="Dropout follows the samples, so that any number of GPUs trains the same.",
            fix=f"Load the model with attn_implementation='sdpa', or with {of_attention[0]}=0.0.",
        )
    return bool(names)


def _shares(config: dict[Any, Any]) -> Iterator[str]:
    """The names of shares above 0 that are dropped, in a configuration and those within it."""
    for key, value in config.items():
        name = str(key)
        if isinstance(value, dict):
            yield from _shares(value)
        elif (
            "drop" in name and isinstance(value, float) and value > 0 and not name.startswith(_OF_OTHER_HEADS)
        ):
            yield name


def inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` but for those of adapters, with their paths."""
    from peft.tuners.lora.layer import LoraLayer

    adapters = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return (one for one in model.named_modules() if not one[0].startswith(adapters))


def is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's that drop."""
    return isinstance(module, _DropoutNd)


def own_shares(module: nn.Module) -> Iterator[str]:
    """The names of what ``module`` itself holds as a share that is dropped, above 0."""
    return (
        name
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float) and value > 0
    )
