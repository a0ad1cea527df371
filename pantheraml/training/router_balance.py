"""The loss that keeps the experts of a mixture equally busy (Fedus et al. 2021, "Switch Transformers", equations 4-6).

    loss = E * sum_e f_e P_e        f_e: tokens given to expert e, P_e: its mean probability, over tokens and layers

Both are means of sums over tokens and layers. So the layers of a model that lies on several devices add up their own
sums, and one pass over several micro-batches has sums for each of them: the loss of a step is the mean of the losses of
its micro-batches, as transformers and TRL define it, however they go through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor


class Groups(TypedDict):
    """Which micro-batch each token of a pass belongs to; a dict, as transformers moves the tensors of one with a batch.

    Attributes:
        index: of the micro-batch, of each token: (T,) int64.
        labelled: whether a micro-batch has labels, (M,) float32.
        count: micro-batches, M.
    """

    index: Tensor
    labelled: Tensor
    count: int


def experts_per_token(config: Any) -> int | None:
    """How many experts a token is given to, by the text part's ``config``; None where it does not say."""
    found = getattr(config, "num_experts_per_tok", None)
    return found if isinstance(found, int) else None


def router_sums(
    logits: Sequence[Tensor], top_k: int, mask: Tensor | None = None, groups: Groups | None = None
) -> Tensor:
    """What the loss is made of: (M, 2 E + 1) float32, the tokens given to each expert, its probabilities, and tokens.

    Args:
        logits: of the routers of some layers, (T, E) each, T the tokens of all rows; they may lie on several devices.
        top_k: experts of a token.
        mask: (T,), zero for padding; None without padding.
        groups: the micro-batches of a pass over several; None for one.

    Returns:
        The sums over the layers, on the device of the first one's logits. Sums of other layers may be added to them.
    """
    total: Tensor | None = None
    for of_layer in logits:
        probabilities = of_layer.float().softmax(-1)
        given = torch.zeros_like(probabilities).scatter_(1, of_layer.topk(top_k, dim=-1).indices, 1.0)
        rows = torch.cat([given, probabilities, torch.ones_like(probabilities[:, :1])], dim=1)
        if mask is not None:
            rows = rows * mask.reshape(-1, 1).to(rows.device, rows.dtype)
        if groups is None:
            sums = rows.sum(0, keepdim=True)
        else:
            sums = rows.new_zeros(groups["count"], rows.shape[1])
            sums = sums.index_add(0, groups["index"].to(rows.device), rows)
        total = sums if total is None else total + sums.to(total.device)
    assert total is not None, "a model with experts has routers"
    return total


def balance_loss(sums: Tensor) -> Tensor:
    """The loss of each micro-batch, (M,), from its ``router_sums``; 0 for one without tokens."""
    experts = sums.shape[1] // 2
    given, probabilities, tokens = sums.split([experts, experts, 1], dim=1)
    return experts * (given * probabilities).sum(1) / tokens[:, 0].clamp(min=1) ** 2
