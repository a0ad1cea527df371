"""Give a model its saving methods: whole folders or nothing, adapter, merged, GGUF, hub."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn

from pantheraml.export import model_methods
from pantheraml.models.adapters import has_adapter
from pantheraml.models.patching import PatchSet
from pantheraml.models.state import get_state

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
        method = _of_what_is_trained(getattr(model_methods, name))
        patches.bind(model, name, method, "saves whole folders or nothing")


def _of_what_is_trained(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of the model with the adapter, where a script calls it on the one that the adapter was put into.

    A trainer attaches one by itself, and the script goes on with the model that it loaded: its layers are the adapter's
    then, and written by its own method they would be neither an adapter nor a model that anything loads.
    """

    @functools.wraps(method)
    def save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = get_state(model)
        around = None if state is None or isinstance(model, PeftModel) else state.with_adapter
        return method(around if around is not None and has_adapter(model) else model, *args, **kwargs)

    return save
