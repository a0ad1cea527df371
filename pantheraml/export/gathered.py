"""Weights that ranks train in shares, on their way to rank 0's disk a layer at a time: no host has them all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from pantheraml.export.shards import write_shards
from pantheraml.export.skeleton import checkpoint_tensors, layer_of
from pantheraml.export.weights import plain_model
from pantheraml.models.shares import whole

# A file's weights are in host memory until it is written.
LARGEST_FILE = "5GB"


class Gathered:
    """What ``model.save_pretrained`` would write, as it is gathered: names and CPU tensors, once.

    Args:
        model: whose weights ranks share out.
        keep: whether this rank wants them; on the others nothing comes.
    """

    def __init__(self, model: PreTrainedModel, *, keep: bool) -> None:
        self._tensors = _tensors(model, keep)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._tensors


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[Gathered]:
    """A block in which weights are gathered; what it leaves is gathered at its end, for the ranks that wait for it.

    Args:
        model: as ``Gathered``; every rank enters the block.
        keep: as ``Gathered``.
    """
    tensors = Gathered(plain_model(model), keep=keep)
    try:
        yield tensors
    finally:
        for _ in tensors:
            pass


def write_gathered(
    own_method: Callable[..., Any],
    model: nn.Module,
    folder: Path,
    tensors: Gathered,
    max_shard_size: int | str | None = None,
    **settings: Any,
) -> None:
    """Save a model as its ``save_pretrained`` does, with weights as they come.

    Args:
        own_method: that of transformers, which writes everything beside the weights.
        model: for it.
        folder: an empty one.
        tensors: the weights.
        max_shard_size: of a file, in bytes or as text; None for 5GB.
        settings: for the method.
    """
    own_method(model, folder, state_dict={}, **settings)
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # an empty one, of some versions
    write_shards(folder, tensors, max_shard_size or LARGEST_FILE)


def _tensors(model: PreTrainedModel, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    state = model.state_dict()
    for name, source in model.all_tied_weights_keys.items():
        if name in state and model.get_parameter(name) is model.get_parameter(source):
            del state[name]
    names = sorted(state, key=layer_of)  # stable, layers together
    for _, layer in groupby(names, key=layer_of):
        found: dict[str, torch.Tensor] = {}
        for name in layer:
            value = whole(state[name])
            if keep:
                found[name] = value.detach().cpu()
        if keep:
            yield from checkpoint_tensors(model, found).items()
