"""The weights of a model that lies there, as DeepSpeed's ZeRO will gather and reduce them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pantheraml.devices.zero import ZeroWeights
from pantheraml.models.decoder_layers import layers_of


def zero_weights(model: Any) -> ZeroWeights:
    """Numbers and bytes of ``model``, a causal language model, also where the engine has cut its weights."""
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in layers_of(model)]
    whole, head = list(model.parameters()), model.get_output_embeddings()
    return ZeroWeights(
        trained=_numbers(one for one in whole if one.requires_grad),
        head=_numbers([head.weight]) if head is not None and head.weight.requires_grad else 0,
        is_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        layer=max(map(_numbers, layers), default=0),
        numbers=_numbers(whole),
        bytes=sum(_numbers([one]) * one.element_size() for one in whole),
    )


def _numbers(parameters: Iterable[Any]) -> int:
    """Of whole weights, which are empty here where DeepSpeed has cut them."""
    return sum(getattr(one, "ds_numel", one.numel()) for one in parameters)
