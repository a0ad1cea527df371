"""The functions of torch by which models drop, with masks that follow from the sample.

Models of transformers drop by ``nn.Dropout``, by ``torch.nn.functional.dropout`` of hidden states and of attention's
probabilities, and within ``scaled_dot_product_attention``:

    hidden states (..., N), a row for each token    mask = f(seed of the step, site, token's key, column)
    probabilities (B, H, T, T) or (B H, T, T)       mask = f(seed of the step, site, head, query's key, distance)
    attention of q, k, v (B, heads, T, D)           likewise

The site is where in the model it is called (``dropout_sites``, which catches the calls). Anything else is torch's own,
which the log says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pantheraml.kernels.attention_dropout import HeadDropout, dropped_probabilities, dropping_attention
from pantheraml.kernels.keyed_dropout import dropped
from pantheraml.log import say_once
from pantheraml.models.token_keys import TokenKeys, current_keys, mixed


class Place(NamedTuple):
    """Where a dropout is called.

    Attributes:
        number: 64 bits of the site, no two of which are alike.
        part: which part of the heads this rank has.
    """

    number: int
    part: int


def _dropout(
    place: Callable[[], Place], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """As ``torch.nn.functional.dropout``; None where it is torch's."""
    keys = current_keys()
    if not training or p == 0.0 or keys is None:
        return None
    rows, tokens = keys.rows, keys.keys.numel() // keys.rows
    shape = input.shape
    if input.dim() == 4 and (shape[0], *shape[2:]) == (rows, tokens, tokens):
        heads = shape[1]
    elif input.dim() == 3 and shape[1:] == (tokens, tokens) and shape[0] > rows and shape[0] % rows == 0:
        heads = shape[0] // rows
    elif input.dim() > 1 and input.numel() == rows * tokens * shape[-1]:
        heads = 0
    else:
        return _of_torch(shape)
    if heads:
        drop = _of_heads(keys, place(), heads, p, input.device)
        found = dropped_probabilities(input.reshape(rows, heads, tokens, tokens), drop).view(shape)
    else:
        found = masked(input, p, keys.seed_of(place().number), keys.keys)
    return input.copy_(found) if inplace else found


def _torch_dropout(place: Callable[[], Place], input: Tensor, p: float, train: bool) -> Tensor | None:
    """As ``torch.dropout``."""
    return _dropout(place, input, p, train)


def _attention(
    place: Callable[[], Place],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor | None:
    """As ``torch.nn.functional.scaled_dot_product_attention``; None where it is torch's."""
    keys = current_keys()
    if dropout_p == 0.0 or keys is None:
        return None
    rows, tokens = keys.rows, keys.keys.numel() // keys.rows
    if any(one.dim() != 4 or (one.shape[0], one.shape[2]) != (rows, tokens) for one in (query, key, value)):
        return _of_torch(query.shape)
    drop = _of_heads(keys, place(), query.shape[1], dropout_p, query.device)
    return dropping_attention(
        query, key, value, drop, bias=attn_mask, causal=is_causal, scale=how.get("scale")
    )


def _of_heads(keys: TokenKeys, place: Place, heads: int, p: float, device: torch.device) -> HeadDropout:
    first = place.part * heads
    seeds = tuple(keys.seed_of(mixed(place.number, first + head)) for head in range(heads))
    return HeadDropout(p, seeds, keys.keys.to(device, non_blocking=True).view(keys.rows, -1))


def _of_torch(shape: torch.Size) -> None:
    say_once(
        f"dropout of a tensor of {len(shape)} dimensions draws from torch's generator, with other masks on another "
        "number of ranks: its rows are not the tokens of the batch."
    )


# As the functions that they answer, behind what tells the place; None where the answer is torch's.
ANSWERS: dict[Any, Callable[..., Tensor | None]] = {
    nn.functional.dropout: _dropout,
    torch.dropout: _torch_dropout,
    nn.functional.scaled_dot_product_attention: _attention,
}


def masked(x: Tensor, p: float, seed: int, keys: Tensor, first_column: int = 0) -> Tensor:
    """x (..., N) under a mask; its gradient is under the same one.

    Args:
        x: a row for each token.
        p: the share that is dropped.
        seed: of the mask.
        keys: (T,) of the tokens, on any device.
        first_column: the number of the first column, where x is a part of something wider.
    """
    found: Tensor = _Masked.apply(x, p, seed, keys.to(x.device, non_blocking=True), first_column)
    return found


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, keys: Tensor, column: int) -> Tensor:
        """Keys (T,) for x as (T, N), whose first column is number ``column``."""
        ctx.mask = p, seed, keys, column
        return dropped(x.reshape(-1, x.shape[-1]), p, seed, keys=keys, first_column=column).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of x."""
        p, seed, keys, column = ctx.mask
        dx = dropped(dy.reshape(-1, dy.shape[-1]), p, seed, keys=keys, first_column=column)
        return dx.view(dy.shape), None, None, None, None
