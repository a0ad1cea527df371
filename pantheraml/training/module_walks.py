"""What transformers does to all modules at every step, without a walk through all of them.

``model.train()`` before a step and ``model.zero_grad()`` after it visit each of some 2,600 modules (8B, LoRA) to find
that nothing is to be done, or the same few gradients: 6 ms of Python on a CPU where launching a layer takes 0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from pantheraml.models.patching import changed_within


@contextmanager
def listed_once(model: nn.Module) -> Iterator[None]:
    """Let ``model.train()`` and ``model.zero_grad()`` know its modules and parameters while the block runs.

    They do what they did, to those that are there when the block begins.
    """
    train = partial(_train, model.train, tuple(model.modules()))
    zero_grad = partial(_zero_grad, model.zero_grad, tuple(model.parameters()))
    with changed_within() as patches:
        patches.bind(model, "train", train, "no walk through modules that train already")
        patches.bind(model, "zero_grad", zero_grad, "no search for parameters")
        yield


def _train(
    walk: Callable[[bool], Any], modules: tuple[nn.Module, ...], model: nn.Module, mode: bool = True
) -> Any:
    if mode and all(module.training for module in modules):
        return model
    return walk(mode)


def _zero_grad(
    walk: Callable[[bool], Any],
    parameters: tuple[nn.Parameter, ...],
    model: nn.Module,
    set_to_none: bool = True,
) -> None:
    if not set_to_none:
        walk(set_to_none)
        return
    for parameter in parameters:
        parameter.grad = None
