"""A model of which no more is known than how many numbers it has: a shape of Llama's kind of that size."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pantheraml.devices.usual_models import read_size, usual_model
from pantheraml.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config_of_size(size: str) -> PretrainedConfig:
    """The configuration of a dense model of ``size`` numbers: the widths of the usual one of about that size, and as
    many layers as make it up.

    Args:
        size: such as ``"7B"`` or ``"500M"``.

    Raises:
        ConfigError: no size, or one that no usual model is near to.
    """
    numbers = read_size(size)
    if numbers is None:
        raise ConfigError(
            got=f"model_size={size!r} was given.",
            need="It is how many numbers a model has, in millions or billions.",
            fix='Write model_size="7B", or give the model itself.',
        )
    from transformers import AutoConfig

    return AutoConfig.for_model("llama", **asdict(usual_model(numbers)))
