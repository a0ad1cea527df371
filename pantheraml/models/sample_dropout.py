"""Dropout in front of adapters whose masks follow from the sample: the same on any number of ranks.

    mask = f(seed of the step, number of the adapter, sample << 32 | place of the token in it, column)

A trainer says which tokens a forward is of (``keyed``), and fused layers and ``SampleDropout`` compute masks from that.
Where nobody says it, dropout draws from torch's generators as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pantheraml.kernels.keyed_dropout import dropped
from pantheraml.models.patching import PatchSet

_WORD = 2**64 - 1


class TokenKeys(NamedTuple):
    """The tokens of a forward.

    Attributes:
        keys: (T,) int64, contiguous: of each token, in the order of the flattened batch.
        seed: of the step.
    """

    keys: Tensor
    seed: int

    def seed_of(self, number: int) -> int:
        """The seed of adapter ``number``; odd and above 2^62, see ``draw_seeds``."""
        return 2**62 | mixed(self.seed, number) >> 2 | 1


# Of the forward that runs now; autograd's threads, which compute layers again, see it too.
_current: TokenKeys | None = None


def current_keys(tokens: int | None = None) -> TokenKeys | None:
    """The keys of the forward that runs now, if there are any, and as many as ``tokens`` where that is given."""
    return None if _current is None or tokens not in (None, _current.keys.numel()) else _current


@contextmanager
def keyed(keys: TokenKeys | None) -> Iterator[None]:
    """Let dropout in front of adapters follow ``keys`` within; None changes nothing."""
    global _current  # noqa: PLW0603
    before, _current = _current, keys
    try:
        yield
    finally:
        _current = before


def mixed(*numbers: int) -> int:
    """64 bits that differ for different numbers (splitmix64's finish, Steele et al. 2014, of each in turn)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


class SampleDropout(nn.Dropout):
    """``nn.Dropout`` whose mask follows from the tokens where they are known.

    Args:
        p: the share that is dropped.
        number: of the adapter in the model.
        first_column: of the input, where that is a part of a longer one.
    """

    def __init__(self, p: float, number: int, first_column: int = 0) -> None:
        super().__init__(p)
        self.number, self.first_column = number, first_column

    def forward(self, input: Tensor) -> Tensor:
        """x (..., K), a row for each token."""
        if not self.training or self.p == 0.0:
            return input
        keys = current_keys(input.numel() // input.shape[-1])
        if keys is None:
            return super().forward(input)
        on_device = keys.keys.to(input.device, non_blocking=True)
        found: Tensor = _Masked.apply(input, self.p, keys.seed_of(self.number), on_device, self.first_column)
        return found


class _Masked(torch.autograd.Function):
    """x (..., K) under a mask; its gradient is under the same one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, keys: Tensor, column: int) -> Tensor:
        """Keys (T,) for x as (T, K), whose first column is number ``column``."""
        ctx.mask = p, seed, keys, column
        return dropped(x.reshape(-1, x.shape[-1]), p, seed, keys=keys, first_column=column).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of x."""
        p, seed, keys, column = ctx.mask
        dx = dropped(dy.reshape(-1, dy.shape[-1]), p, seed, keys=keys, first_column=column)
        return dx.view(dy.shape), None, None, None, None


def follow_samples(model: nn.Module, patches: PatchSet) -> bool:
    """Let the dropout of every adapter follow samples where a trainer says which they are.

    Args:
        model: with adapters.
        patches: the ledger.

    Returns:
        Whether there is any that drops.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = False
    for number, (path, layer) in enumerate(layers):
        for name, dropout in list(layer.lora_dropout.items()):
            found = found or getattr(dropout, "p", 0.0) > 0
            if type(dropout) is nn.Dropout:
                first = getattr(layer.get_base_layer(), "first_input", 0)
                new = SampleDropout(dropout.p, number, first)
                patches.replace(model, f"{path}.lora_dropout.{name}", new, "masks follow from the sample")
    return found
