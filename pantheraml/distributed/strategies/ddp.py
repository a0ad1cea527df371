"""Every rank has the whole model and rows of its own; gradients are averaged once an optimizer step.

torch's DistributedDataParallel does it, wrapped by accelerate. Its defaults are for models trained in full: buckets of
25 MB that are reduced while the backward goes on, a search for unused parameters, buffers sent around in every forward.
The gradients of an adapter are one small bucket.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from pantheraml.config.multi_gpu import MultiGPUConfig

# Trained parameters up to so many bytes are reduced at once, at the end: less would not hide behind the backward.
_ONE_BUCKET = 2**30


@dataclass
class _Settings(DistributedDataParallelKwargs):
    """Accelerate's, with the name that torch 2.13 gave to one of them."""

    forward_sync_buffers: bool = True


def configure(
    accelerator: Any, args: TrainingArguments, model: nn.Module, config: MultiGPUConfig | None = None
) -> None:
    """Say how DDP will wrap ``model``; what the user wrote in ``args`` counts.

    Args:
        accelerator: of the trainer; its model is not wrapped yet.
        args: the ``ddp_*`` arguments.
        model: the model that will be wrapped.
        config: its ``find_unused_parameters`` counts.
    """
    given = accelerator.ddp_handler or DistributedDataParallelKwargs()
    # Gradients are views of their bucket: nothing is copied in or out.
    found: dict[str, Any] = {field.name: getattr(given, field.name) for field in fields(given)}
    found["gradient_as_bucket_view"] = True
    if args.ddp_find_unused_parameters is None:
        found["find_unused_parameters"] = config is not None and config.find_unused_parameters
    if args.ddp_broadcast_buffers is None:  # they are the same on all ranks: tables of angles
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        found["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    if args.ddp_bucket_cap_mb is None and trained <= _ONE_BUCKET:
        found["bucket_cap_mb"] = 1 + trained // 2**20
    accelerator.ddp_handler = _Settings(**found)
