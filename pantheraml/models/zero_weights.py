"""The weights of a model that lies there, as DeepSpeed's ZeRO will gather and reduce them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantheraml.devices.zero import ZeroWeights
from pantheraml.models.decoder_layers import layers_of


def zero_weights(model: Any) -> ZeroWeights:
    """Numbers and bytes of ``model``, a causal language model, also where the engine has cut its weights."""
    layers = [list(layer.parameters()) for layer in layers_of(model)]
    largest = max(layers, key=_bytes, default=[])
    head = model.get_output_embeddings()
    ends = [] if head is None else list(head.parameters())
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    return ZeroWeights(
        trained=sum(map(_numel, trained_of(model))),
        head=_numel(head.weight) if head is not None and head.weight.requires_grad else 0,
        is_tied=is_tied,
        layer=_bytes(largest),
        layer_numbers=sum(map(_numel, largest)),
        ends=_bytes(ends),
    )


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of ``model``."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(_numel(parameter) * parameter.element_size() for parameter in parameters)


def _numel(parameter: Any) -> int:
    """Of the whole weight, which is empty here where DeepSpeed has cut it."""
    return getattr(parameter, "ds_numel", parameter.numel())
