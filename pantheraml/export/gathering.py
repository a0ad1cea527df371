"""Saving a model whose layers are cut between ranks: the first rank writes, and asks the others for their parts.

first rank    says the name of a weight; has the whole of it
its group     waits for names, and gives its parts, until the first rank is done or has failed
other groups  have the same parts, and nothing to do
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from pantheraml.distributed.process_group import is_first_of_group
from pantheraml.models.sharded_linear import ShardedLinear, tensor_group_of
from pantheraml.models.tensor_group import TensorGroup

Result = TypeVar("Result")


def saved_together(model: nn.Module, save: Callable[[], Result]) -> Result | None:
    """What ``save`` returns on rank 0, which alone calls it; every rank calls this.

    Args:
        model: what is saved; its layers may be cut between ranks.
        save: reads weights by ``whole`` of layers that are cut.
    """
    group = tensor_group_of(model)
    if group is None or group.first != 0:
        return save() if is_first_of_group() else None
    if not is_first_of_group():
        _serve(model, group)
        return None
    try:
        return save()
    finally:
        group.tell(None)


def whole(layer: ShardedLinear, name: str) -> torch.Tensor:
    """The parameter ``name`` of the whole layer, on rank 0 while the others of its group wait in ``saved_together``."""
    if layer.is_cut(name):
        layer.group.tell((layer.number, name))
    return layer.gathered(name)


def _serve(model: nn.Module, group: TensorGroup) -> None:
    layers = {module.number: module for module in model.modules() if isinstance(module, ShardedLinear)}
    while (asked := group.tell(None)) is not None:
        number, name = asked
        layers[number].gathered(name)
