"""From tokens to rows sorted by expert, and back.

    sort:   row s of the sorted rows is choice order[s] of token tokens[s] = order[s] // k
    sum:    out[t] = sum over j of w[t, j] * y[place[t, j]]        place undoes the sort; w is 1 for gradients

Shapes: index (T, k) int, the experts each token chose; w (T, k); y (S, H) with S = T * k, sorted; out (T, H).

Both directions gather, so the sums have one order and the same bits every time; nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.expert_groups import Groups
from pantheraml.kernels.launch import jit, tl, triton

SUM_TILE = {"BLOCK_N": 1024, "num_warps": 4}


class Routes(NamedTuple):
    """Where the choices of tokens lie among the rows sorted by expert.

    Attributes:
        order: (S,) int64, the choice behind each sorted row.
        tokens: (S,) int32, the token behind each sorted row.
        place: (T, k) int64, the sorted row of each choice.
        groups: whose rows are whose.
    """

    order: Tensor
    tokens: Tensor
    place: Tensor
    groups: Groups


def sort_by_expert(index: Tensor, num_experts: int) -> Routes:
    """The routes of tokens to the experts they chose.

    Args:
        index: (T, k), numbers of experts below ``num_experts``.
        num_experts: E, at most 32,767.
    """
    choices = index.shape[1]
    keys = index.reshape(-1).to(torch.int16)  # sorted in a quarter of the passes that int64 takes
    keys, order = torch.sort(keys, stable=True)
    experts = torch.arange(num_experts, dtype=torch.int16, device=index.device)
    ends = torch.searchsorted(keys, experts, right=True, out_int32=True)
    rows = torch.arange(order.numel(), device=index.device)
    place = torch.empty_like(order).scatter_(0, order, rows).view(index.shape)
    tokens = torch.div(order, choices, rounding_mode="floor").to(torch.int32)
    return Routes(order, tokens, place, Groups(ends, order.numel()))


@jit
def _sum_kernel(
    y_ptr, place_ptr, w_ptr, out_ptr, cols, choices,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for j in range(choices):
        row = tl.load(place_ptr + token * choices + j).to(tl.int64)
        y = tl.load(y_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(w_ptr + token * choices + j).to(tl.float32)
        acc += y
    tl.store(out_ptr + token * cols + col, acc.to(out_ptr.dtype.element_ty), mask=col < cols)


def triton_sum(y: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """Our kernel; arguments as ``sum_choices``."""
    tokens, choices = place.shape
    out = torch.empty((tokens, y.shape[1]), dtype=y.dtype, device=y.device)
    _sum_kernel[(tokens, -(-y.shape[1] // SUM_TILE["BLOCK_N"]))](
        y, place, y if weights is None else weights, out, y.shape[1], choices,
        WEIGHTED=weights is not None, **SUM_TILE,
    )  # fmt: skip
    return out


def sum_choices(y: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum over j of weights[t, j] * y[place[t, j]]``, without autograd.

    Args:
        y: (S, H), contiguous.
        place: (T, k), rows of y.
        weights: (T, k), contiguous, any floating dtype; None for ones.

    Returns:
        (T, H) in the dtype of y, summed in float32 in the order of the choices.
    """
    if y.device.type == "cuda" and triton is not None:
        with torch.cuda.device(y.device):
            return triton_sum(y, place, weights)
    rows = y.index_select(0, place.reshape(-1)).view(*place.shape, -1).float()
    if weights is not None:
        rows = rows * weights.float()[..., None]
    return rows.sum(1).to(y.dtype)


@torch.library.custom_op("pantheraml::sum_choices", mutates_args=())
def _sum_choices(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return sum_choices(y, place, weights)


@_sum_choices.register_fake
def _(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return y.new_empty((place.shape[0], y.shape[1]))
