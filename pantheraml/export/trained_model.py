"""Which model a saving method is of: the one with the adapter, also where a script calls it on the one within."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from peft import PeftModel
from torch import nn

from pantheraml.models.adapters import has_adapter
from pantheraml.models.state import get_state

P = ParamSpec("P")
R = TypeVar("R")


def of_what_is_trained(
    method: Callable[Concatenate[nn.Module, P], R],
) -> Callable[Concatenate[nn.Module, P], R]:
    """``method`` of the model with the adapter, where it is called on the one that the adapter was put into.

    A trainer attaches one by itself, and the script goes on with the model that it loaded: its layers are the adapter's
    then, and written by its own method they would be neither an adapter nor a model that anything loads.
    """

    @functools.wraps(method)
    def save(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        state = get_state(model)
        around = None if state is None or isinstance(model, PeftModel) else state.with_adapter
        return method(around if around is not None and has_adapter(model) else model, *args, **kwargs)

    return save
