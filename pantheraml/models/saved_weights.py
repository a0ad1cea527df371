"""The weights that a run has saved in full, put back into the model that trains: all of them, or a rank's shares.

A folder has a model's weights by the names, and in the pieces, of its published checkpoints. Those of most models are
the model's own; where they are not (experts, one by one) transformers makes them so when it loads a model, and only
then: ``load_state_dict`` would leave such weights as they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pantheraml.errors import CheckpointError
from pantheraml.models.sharding import own_class
from pantheraml.models.shares import share_of


def has_other_names(model: nn.Module, folder: Path) -> bool:
    """Whether weights in the safetensors of ``folder`` are called otherwise than in ``model``; False without any."""
    return not stored_names(folder) <= model.state_dict().keys()


def stored_names(folder: Path) -> set[str]:
    """Of the tensors in a model's safetensors files; an adapter's do not count."""
    found: set[str] = set()
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill the weights of ``model`` from ``folder``, a tensor at a time.

    Args:
        model: whole, or shared out between ranks, of which each keeps its shares.
        folder: with all its weights, as they were saved.

    Raises:
        CheckpointError: weights are missing there.
    """
    here, stored = model.state_dict(), stored_names(folder)
    if not stored <= here.keys():
        plain: Any = own_class(model)
        # On the CPU, where what is not put together of pieces stays in the mapped file.
        there = plain.from_pretrained(folder, dtype="auto", device_map="cpu").state_dict()
        _check(there.keys(), here, model, folder)
        for name, value in there.items():
            _fill(here[name], value)
        return
    _check(stored, here, model, folder)
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                _fill(here[name], tensors.get_tensor(name))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _fill(weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(share_of(values.to(weight.dtype), weight))


def _check(found: Any, here: dict[str, Tensor], model: PreTrainedModel, folder: Path) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = sorted(name for name in here if name not in found and name not in tied)
    if missing:
        raise CheckpointError(
            got=f"{folder} lacks {len(missing)} weights of the model: {', '.join(missing[:3])}.",
            need="A run goes on with all weights that it has saved.",
            fix="Go on with another checkpoint, or start a new run from this folder.",
        )
