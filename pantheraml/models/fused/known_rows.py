"""Forwards of rows whose documents are known, so that nobody asks the device.

transformers looks at positions, on the device, to see whether a mask is needed, and our attention does to find
documents; the host would wait for all that the device was given so far. Where no mask is given, PantheraML's attention
needs none: the configuration names one for which transformers makes none. Rows without positions are whole, and get
ones whose documents are known; a row of several documents comes with their offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pantheraml.kernels.attention.layout import known_positions
from pantheraml.models.fused.attention import NAME

# A name that stands for no mask: none is registered for it.
_NO_MASK = f"{NAME}_without_mask"


@lru_cache(maxsize=64)  # batches come in so many shapes, and more where rows differ in length
@torch.inference_mode(False)  # what an evaluation asks for first serves training, too
def row_positions(rows: int, length: int, device: torch.device) -> Tensor:
    """Positions (1, ``length``) of ``rows`` that are one document each; the same tensor for every batch of a shape."""
    return known_positions(rows, length, device)


@contextmanager
def known_rows(backbone: Any, inputs: dict[str, Any], tokens: Tensor) -> Iterator[None]:
    """Let ``backbone`` compute ``inputs`` within, which are completed, without a question to the device.

    Nothing happens where a mask is given, or attention is not PantheraML's. Positions without offsets are looked at.

    Args:
        backbone: the model without its head, or a view of it.
        inputs: what it will be called with.
        tokens: (B, S), one number for each of its tokens; only shape and device count.
    """
    config = backbone.config
    if inputs.get("attention_mask") is not None or config._attn_implementation != NAME:
        yield
        return
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = row_positions(tokens.shape[0], tokens.shape[1], tokens.device)
    backbone.config = copy.copy(config)
    # The attribute behind the property, whose setter would go on to configurations inside this one.
    vars(backbone.config)["_attn_implementation_internal"] = _NO_MASK
    try:
        yield
    finally:
        backbone.config = config
