"""Groups of neighbouring ranks compute each layer together; each group has rows of its own.

The layers are cut when the model is loaded (``models/tensor_plan.py``). What is trained, an adapter, is whole on every
rank: its gradient there is such that the mean over all ranks is that of one process, which is what DDP computes. So
saving, clipping, the optimizer and resuming on any number of ranks are those of DDP.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from pantheraml.distributed.process_group import group_size
from pantheraml.distributed.strategies.ddp import DDP
from pantheraml.models.sharded_linear import ShardedLinear, tensor_group_of


class Tensor(DDP):
    """Ranks compute each layer together, by transformers' plan; groups of them share the rows of a step."""

    name = "tensor"
    _degree = 1

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """As for DDP, which leaves the parts of layers alone: they differ from rank to rank."""
        group = tensor_group_of(model)
        self._degree = 1 if group is None else group.size
        super().configure(accelerator, args, model)
        parts = [
            f"{path}.{name}"
            for path, layer in model.named_modules()
            if isinstance(layer, ShardedLinear)
            for name, _ in layer.named_parameters(recurse=False)
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)

    def describe(self) -> str:
        """As the banner says it."""
        groups = group_size() // self._degree
        rows = "all have the same rows" if groups == 1 else f"{groups} such groups have rows of their own"
        return f"tensor parallel: {self._degree} neighbours compute each layer together, {rows}"
