"""What all ranks have to know before a step goes on, said between their hosts: nobody waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pantheraml.distributed.process_group import is_distributed_available


class BetweenHosts:
    """A way between the hosts of all ranks; every rank makes it at the same place."""

    def __init__(self) -> None:
        # A group that was made by others may know GPUs only.
        needs_own = is_distributed_available() and "gloo" not in dist.get_backend_config()
        self._group = dist.new_group(backend="gloo") if needs_own else None

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of all ranks, for each of ``numbers``."""
        if not is_distributed_available():
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return found.tolist()

    def most(self, number: int) -> int:
        """The largest of all ranks."""
        return -self.least([-number])[0]
