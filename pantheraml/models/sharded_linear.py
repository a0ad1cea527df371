"""Linear layers of which every rank of a group has a part.

    ColumnLinear   rows of the weight (out, in): the whole input, a part of the output
    RowLinear      columns of it: the part of the input that a column layer gave, the whole output

``in_features`` and ``out_features`` are those of the whole layer, so that adapters of it are whole on every rank and
start, are saved and go on as in one process. The parts of their factors that a rank computes with:

    of a column layer   all of A, its rows of B; what A gives has a gradient that is summed over the ranks
    of a row layer      its columns of A, all of B; what A gives is summed over the ranks

Both sums are of r numbers a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from pantheraml.models.tensor_group import TensorGroup


class ShardedLinear(nn.Linear):
    """A linear layer of which this rank has a part.

    Args:
        whole: the layer, on the meta device.
        group: the ranks that have the others.
        number: of the layer among those that are cut, the same on all ranks.
    """

    dim: ClassVar[int]  # of the weight, that is cut

    def __init__(self, whole: nn.Linear, group: TensorGroup, number: int) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight, self.bias = whole.weight, whole.bias
        self.group, self.number = group, number

    def is_cut(self, name: str) -> bool:
        """Whether this rank has only a part of the parameter ``name``; the bias of a row layer is added once."""
        return name == "weight" or self.dim == 0

    @property
    def first_input(self) -> int:
        """The number of the first value of its input that this rank is given."""
        return self.group.index * (self.in_features // self.group.size) if self.dim == 1 else 0

    def whole_shape(self, name: str) -> torch.Size:
        """Of the parameter ``name`` of the whole layer."""
        shape = (self.out_features, self.in_features)
        return torch.Size(shape if name == "weight" else shape[:1])

    def count_elsewhere(self) -> int:
        """Numbers of the whole layer that other ranks have."""
        cut = sum(value.numel() for name, value in self.named_parameters(recurse=False) if self.is_cut(name))
        return (self.group.size - 1) * cut

    @torch.no_grad()
    def gathered(self, name: str) -> Tensor:
        """The parameter ``name`` of the whole layer; every rank of the group calls this."""
        part = getattr(self, name).detach()
        return self.group.gather(part, self.dim) if self.is_cut(name) else part


class ColumnLinear(ShardedLinear):
    """x (..., in) -> (..., out / ranks)."""

    dim = 0

    def forward(self, input: Tensor) -> Tensor:
        """The columns of the output that are this rank's."""
        return nn.functional.linear(self.group.entered(input), self.weight, self.bias)


class RowLinear(ShardedLinear):
    """x (..., in / ranks) -> (..., out)."""

    dim = 1

    def forward(self, input: Tensor) -> Tensor:
        """The sum of what every rank's columns of the input come to."""
        found = self.group.summed(nn.functional.linear(input, self.weight))
        return found if self.bias is None else found + self.bias


class FactorOfRow(nn.Linear):
    """LoRA's A of a row layer: (..., in / ranks) -> (..., r), summed over the ranks.

    Args:
        whole: the factor, whose weight (r, in) is shared.
        group: the ranks.
    """

    def __init__(self, whole: nn.Linear, group: TensorGroup) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight, self.group = whole.weight, group

    def forward(self, input: Tensor) -> Tensor:
        """The same on every rank."""
        return self.group.summed(nn.functional.linear(input, self.group.part_of(self.weight, 1)))


class FactorOfColumn(nn.Linear):
    """LoRA's B of a column layer: (..., r) -> (..., out / ranks).

    Args:
        whole: the factor, whose weight (out, r) is shared.
        group: the ranks.
    """

    def __init__(self, whole: nn.Linear, group: TensorGroup) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight, self.group = whole.weight, group

    def forward(self, input: Tensor) -> Tensor:
        """This rank's columns of the output."""
        return nn.functional.linear(self.group.sums_gradient(input), self.group.part_of(self.weight, 0))


def tensor_group_of(model: nn.Module) -> TensorGroup | None:
    """The ranks that compute the layers of ``model`` together; None where this one does so alone."""
    return next((module.group for module in model.modules() if isinstance(module, ShardedLinear)), None)
