"""Give a model its saving methods: whole folders or nothing, adapter, merged, hub."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantheraml.errors import NotYetError
from pantheraml.export import model_methods
from pantheraml.models.patching import PatchSet

_METHODS = ("save_pretrained", "save_pretrained_merged", "push_to_hub", "push_to_hub_merged")


def bind_saving(model: nn.Module, patches: PatchSet) -> None:
    """Bind the functions of ``model_methods`` to ``model`` as methods.

    Args:
        model: a transformers or PEFT model; only this instance is changed.
        patches: the ledger that undoes it.
    """
    for name in _METHODS:
        patches.bind(model, name, getattr(model_methods, name), "saves whole folders or nothing")
    for name in ("save_pretrained_gguf", "push_to_hub_gguf"):
        patches.bind(model, name, _refuse_gguf, "says what to use instead")


def _refuse_gguf(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    raise NotYetError(
        got="A GGUF file was asked for.",
        need="This version does not write GGUF.",
        fix='Use save_pretrained_merged(FOLDER, tokenizer, save_method="merged_16bit") and convert that folder with '
        "llama.cpp's convert_hf_to_gguf.py.",
    )
