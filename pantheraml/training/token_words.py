"""A generation says that it goes on, with every token: nobody can tell from outside how many are still to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from pantheraml.models.patching import changed_within


class TokenWord(StoppingCriteria):
    """Is asked after every token whether to stop, which it never wants.

    Args:
        say: called each time.
    """

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row of ``input_ids`` (B, S) is done: (B,) bool, False."""
        self._say()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def said_by_token(model: PreTrainedModel, say: Callable[[], None]) -> Iterator[None]:
    """Let ``model.generate`` call ``say`` after every token within, also where steps are recorded.

    Args:
        model: the base model.
        say: takes some microseconds.
    """
    criteria = partial(_criteria, cast(Any, model)._get_stopping_criteria, say)
    with changed_within() as patches:
        patches.bind(model, "_get_stopping_criteria", criteria, "a watchdog hears tokens")
        yield


def _criteria(
    before: Callable[..., StoppingCriteriaList],
    say: Callable[[], None],
    model: PreTrainedModel,
    *args: Any,
    **kwargs: Any,
) -> StoppingCriteriaList:
    """transformers' criteria, and the word behind them."""
    found = before(*args, **kwargs)
    found.append(TokenWord(say))
    return found
