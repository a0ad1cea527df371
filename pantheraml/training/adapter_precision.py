"""Adapters are trained in float32, also beside quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_trained_weights(model: Any) -> Iterator[None]:
    """Undo TRL's rounding of a quantised model's adapter to bf16.

    TRL casts trained weights of quantised models to bf16 when its trainer is built within; float32 ones lose updates
    that are smaller than 1/256 of a weight. Autocast computes in 16 bit either way.
    """
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name]
