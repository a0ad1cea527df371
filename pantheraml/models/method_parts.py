"""The parts of a model as one of the usual methods trains it: what plans are made of. Loads torch when it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pantheraml.devices.model_parts import ModelParts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Flags of from_pretrained for each method.
METHODS: dict[str, dict[str, bool]] = {
    "lora": {"load_in_16bit": True},
    "qlora": {"load_in_4bit": True},
    "fp8": {"load_in_fp8": True},
    "full": {"full_finetuning": True},
}
# What is advised where a method does not fit.
_SMALLER = {"lora": ("fp8", "qlora"), "fp8": ("qlora",), "full": ("lora", "qlora"), "qlora": ()}


def parts_of(config: PretrainedConfig, method: str, rank: int = 16) -> ModelParts | None:
    """The sizes of the model that ``config`` describes, trained by ``method``.

    Args:
        config: from ``load_config``; only read.
        method: one of ``METHODS``.
        rank: of the adapter.

    Returns:
        The parts, or None for an architecture that no family describes.
    """
    import torch

    from pantheraml.models.precision import PrecisionFlags, choose_precision
    from pantheraml.models.weight_sizes import measure_parts

    flags = PrecisionFlags(**METHODS[method])
    stored = getattr(config, "quantization_config", None)
    dtype = None if flags.full_finetuning else "bfloat16"
    precision = choose_precision(flags, dtype, torch.device("cpu"), stored)
    return measure_parts(config, precision, full_finetuning=flags.full_finetuning, rank=rank)


def smaller_parts(
    config: PretrainedConfig, method: str, rank: int = 16
) -> dict[str, Callable[[], ModelParts | None]]:
    """The parts by methods that take less than ``method``, by their names."""
    return {one: partial(parts_of, config, one, rank) for one in _SMALLER[method]}
