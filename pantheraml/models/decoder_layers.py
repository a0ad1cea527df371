"""Where the decoder layers of a model are."""

from __future__ import annotations

from typing import Any

from torch import nn


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers of ``model``, fused ones and others, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from pantheraml.models.fused import FusedDecoderLayer

    if isinstance(model, FusedDecoderLayer | GradientCheckpointingLayer):
        return [model]  # not walked through: that took the host longer than launching a layer
    return [layer for child in model.children() for layer in layers_of(child)]
