"""``enable_multi_gpu(debug=True)``: ranks compare what they train, at every logging step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pantheraml.distributed.process_group import gather_objects
from pantheraml.errors import HardwareError

# Integers of the size of a number, as which its bits are added up.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SameWeights(TrainerCallback):
    """Ends a run whose ranks no longer train one model: gradients that were not reduced, memory that fails.

    Each rank adds up the bits of every weight that is trained and that all ranks have whole; the sums are compared.
    """

    STRATEGIES: ClassVar = ("ddp", "fsdp")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A step is done, and may be one that is logged.

        Raises:
            HardwareError: a weight differs between ranks; raised on all of them.
        """
        if not control.should_log:
            return
        by_rank = gather_objects(bit_sums(given["model"]))
        for name, first in by_rank[0].items():
            other = [rank for rank, sums in enumerate(by_rank) if sums.get(name) != first]
            if other:
                raise HardwareError(
                    got=f"After step {state.global_step}, {name} of rank 0 differs from that of "
                    f"rank{'s' * (len(other) > 1)} {', '.join(map(str, other))}.",
                    need="Ranks add the same averaged gradient to the same weights, which stay equal bit by bit.",
                    fix="Look for code that changes weights on one rank alone, in a callback, say. If the model skips "
                    "parts of itself, pass find_unused_parameters=True. Else type pantheraml doctor, which compares "
                    "what GPUs compute and send.",
                )


@torch.no_grad()
def bit_sums(model: nn.Module) -> dict[str, int]:
    """The sum of the bits, as integers, of each weight that is trained; what ranks share out is left out."""
    trained = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and not isinstance(weight, DTensor)
    }
    if not trained:
        return {}
    # One transfer from each device, not one for each weight.
    sums: dict[torch.device, list[Tensor]] = {}
    for weight in trained.values():
        bits = weight.contiguous().view(_BITS[weight.element_size()])
        sums.setdefault(weight.device, []).append(bits.sum(dtype=torch.int64))
    told = {device: iter(torch.stack(found).tolist()) for device, found in sums.items()}
    return {name: next(told[weight.device]) for name, weight in trained.items()}
