"""What ``accelerate launch`` was told beside the ranks, by the variables that it sets. Loads no torch."""

from __future__ import annotations

import os

# Ways to wrap a model that accelerate knows and this package does not use.
_WRAPPERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def launched_precision() -> str | None:
    """``"bf16"``, ``"fp16"`` or ``"fp8"``, as ``--mixed_precision`` says; None where it says none."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if said == "no" else said


def is_deepspeed_launched() -> bool:
    """Whether the ranks were started for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def launched_wrapper() -> str | None:
    """The name of a way to wrap models that was asked for and that this package does not use."""
    return next(
        (name for variable, name in _WRAPPERS.items() if os.environ.get(variable, "").lower() == "true"), None
    )
