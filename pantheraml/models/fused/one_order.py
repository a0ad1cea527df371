"""Gradients of a layer that come in one order, whichever way the layer was computed.

A layer as one function gives all of its gradients at once; in parts, around an attention with a mask, those behind the
attention come first. Who reduces gradients over ranks as they come (DeepSpeed at stage 2 sums its buckets place by
place) takes for granted that they come in one order everywhere: with padding in the batch of one rank, and none in that
of another, gradients of different weights were added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor | None, ...]


class _Together(torch.autograd.Function):
    """What it is given; gradients wait for one another."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor | None) -> Factors:
        """The same tensors."""
        ctx.set_materialize_grads(False)
        return factors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Factors:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same gradients."""
        return gradients


def in_one_order(factors: Factors) -> Factors:
    """``factors``, of a whole layer, for its functions; beside others where somebody waits for their gradients.

    Costs the host a node of autograd, which without a hook nobody needs.
    """
    hooked = any(one is not None and one._post_accumulate_grad_hooks for one in factors)
    return _Together.apply(*factors) if hooked and torch.is_grad_enabled() else factors
