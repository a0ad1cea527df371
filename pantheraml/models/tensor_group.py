"""The ranks that compute each layer together, and what they exchange in its forward and backward.

    entered   the same values on every rank; of their gradient each rank has a part, and all get the sum
    summed    of the values each rank has a part, and all get the sum; the same gradient for every rank's part
    part_of   a slice of a weight that every rank has whole, with a gradient of which the ranks' mean is the whole one

So a layer that is cut in two needs two sums a pass: one of what it gives, in the forward, and one of the gradient of
what it was given, in the backward (Shoeybi et al. 2019, Megatron-LM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TensorGroup:
    """This rank's place among those that compute each layer together; there is one such object for a group.

    Args:
        process_group: of these ranks, neighbours in the run.

    Attributes:
        exchange: sums, in place, what a layer asks for; ``sum_up``, unless somebody counts what is asked for.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.size, self.index = process_group.size(), process_group.rank()
        self.exchange: Callable[[Tensor], None] = self.sum_up
        self._entered: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorGroup:
        # A copy of a model is computed by the same ranks.
        return self

    @property
    def first(self) -> int:
        """The group's first rank, by its number in the run."""
        return dist.get_global_rank(self.process_group, 0)

    def sum_up(self, values: Tensor) -> None:
        """Put the sum over all ranks into ``values``, contiguous, on each of them."""
        dist.all_reduce(values, group=self.process_group)

    def forget(self) -> None:
        """Let go of what has entered last."""
        self._entered = None

    def entered(self, x: Tensor) -> Tensor:
        """``x``, which all ranks have; its gradient is summed once for all layers that are given this very tensor."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        # Queries, keys and values read one tensor, as do the two halves of an MLP.
        if self._entered is None or self._entered[0] is not x:
            self._entered = x, self.sums_gradient(x)
        return self._entered[1]

    def sums_gradient(self, x: Tensor) -> Tensor:
        """``x``, which all ranks have; its gradient is the sum over them."""
        found: Tensor = _GradientSum.apply(x, self)
        return found

    def summed(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``, which is overwritten; what has entered before is let go."""
        self.forget()
        found: Tensor = _Sum.apply(part, self)
        return found

    def part_of(self, weight: Tensor, dim: int) -> Tensor:
        """This rank's slice of ``weight``; see ``_Part`` for its gradient."""
        length = weight.shape[dim] // self.size
        found: Tensor = _Part.apply(weight, dim, self.index * length, length, self.size)
        return found

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Every rank's ``part``, behind one another along ``dim``; without a gradient."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.process_group)
        return torch.cat(parts, dim)

    def least(self, number: int) -> int:
        """The smallest ``number`` of these ranks, so that they decide alike; every one of them calls this."""
        found = torch.tensor(number, dtype=torch.int64)
        if "gloo" not in dist.get_backend_config(self.process_group):  # pragma: no cover - needs GPUs
            found = found.to("cuda")
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.process_group)
        return int(found)

    def tell(self, value: Any) -> Any:
        """What the first of these ranks passed, on all of them."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self.first, group=self.process_group)
        return box[0]


class _Sum(torch.autograd.Function):
    """The sum over ranks, in place; each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: TensorGroup) -> Tensor:
        """Any shape, contiguous."""
        ctx.mark_dirty(part)
        group.exchange(part)
        return part

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The same on every rank, and no sum."""
        return gradients[0], None


class _GradientSum(torch.autograd.Function):
    """The input as it is; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        """Any shape."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The sum of every rank's part."""
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.group.exchange(total)
        return total, None


class _Part(torch.autograd.Function):
    """A slice of a weight that every rank has whole.

    Its gradient is that of the slice times the number of ranks, and zero elsewhere: the mean over these ranks, which is
    what DDP takes of all ranks, is the gradient of the whole weight.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dim: int, start: int, length: int, times: int) -> Tensor:
        """A copy of ``weight[start : start + length]`` along ``dim``."""
        ctx.part = weight.shape, dim, start, length, times
        return weight.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """In the shape of the weight."""
        shape, dim, start, length, times = ctx.part
        whole = gradients[0].new_zeros(shape)
        torch.mul(gradients[0], times, out=whole.narrow(dim, start, length))
        return whole, None, None, None, None
