"""Give a model its saving methods: whole folders or nothing, adapter, merged, GGUF, hub."""

from __future__ import annotations

from torch import nn

from pantheraml.export import model_methods
from pantheraml.models.patching import PatchSet

_METHODS = (
    "save_pretrained",
    "save_pretrained_merged",
    "save_pretrained_gguf",
    "push_to_hub",
    "push_to_hub_merged",
    "push_to_hub_gguf",
)


def bind_saving(model: nn.Module, patches: PatchSet) -> None:
    """Bind the functions of ``model_methods`` to ``model`` as methods.

    Args:
        model: a transformers or PEFT model; only this instance is changed.
        patches: the ledger that undoes it.
    """
    for name in _METHODS:
        patches.bind(model, name, getattr(model_methods, name), "saves whole folders or nothing")
