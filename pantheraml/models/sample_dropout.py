"""Dropout whose masks follow from the sample: the same on any number of ranks.

    mask = f(seed of the step, number of the adapter, sample << 32 | place of the token in it, column)

A trainer says which tokens a forward is of (``keyed``); fused layers and ``SampleDropout`` compute masks from that, and
so does dropout of the model's own (``dropout_sites``, ``dropout_calls``). Where nobody says it, dropout draws from
torch's generators as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pantheraml.log import say_once
from pantheraml.models.dropout_calls import masked
from pantheraml.models.dropout_sites import leave_all, number_sites
from pantheraml.models.own_dropout import drops_inside
from pantheraml.models.patching import PatchSet
from pantheraml.models.token_keys import TokenKeys, current, current_keys


@contextmanager
def keyed(keys: TokenKeys | None) -> Iterator[None]:
    """Let dropout follow ``keys`` within, in forwards and their backwards; None changes nothing."""
    with current(keys):
        try:
            yield
        finally:
            leave_all()


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
        return masked(input, self.p, keys.seed_of(self.number), keys.keys, self.first_column)


class Followed(NamedTuple):
    """What drops in a model, and follows samples where a trainer says which they are.

    Attributes:
        adapters: whether adapters do.
        inside: whether the model itself does.
    """

    adapters: bool = False
    inside: bool = False

    @property
    def drops(self) -> bool:
        """Whether tokens need keys."""
        return self.adapters or self.inside

    def keys(self, keys: Tensor | None, seed: int) -> TokenKeys | None:
        """What ``keyed`` takes: ``keys`` (B, S) of a batch, None where they are not known, and the step's ``seed``."""
        return None if keys is None else TokenKeys(keys.reshape(-1), seed, len(keys), self.inside)


def follow_samples(model: nn.Module, patches: PatchSet, *, compiled: bool = False) -> Followed:
    """Let dropout follow samples where a trainer says which they are.

    Args:
        model: as it is trained, with adapters or without, before it is wrapped for several ranks.
        patches: the ledger.
        compiled: whether torch.compile makes something else of the model, whose own dropout is torch's then.

    Raises:
        ConfigError: the model's attention drops within a kernel that draws masks of its own.
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
    inside = drops_inside(model)
    if inside and compiled:
        say_once("dropout inside a compiled model draws other masks on another number of ranks.")
    elif inside:
        number_sites(model, patches)
    return Followed(found, inside and not compiled)
