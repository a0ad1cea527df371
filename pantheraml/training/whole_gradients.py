"""Gradients of what ranks train and share out: reduced in every pass of a step, or added up and reduced once.

Until they are reduced they are whole on every rank, a number of float32 for each weight of the model. So they wait for
the last pass where there is room for that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pantheraml.devices.memory import GIB, gpu_memory
from pantheraml.devices.plan import USABLE
from pantheraml.training.banner import Predicted


def whole_gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all weights of ``model`` that are trained and shared out; 0 where none is."""
    shared_out = (p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor))
    return sum(p.numel() * torch.float32.itemsize for p in shared_out)


def spare_bytes(predicted: Predicted) -> int:
    """Of the GPU that a run is predicted for, what may be planned and is not; 0 without one."""
    spare = [
        int(USABLE * gpu_memory(device.index or 0)["total"] * GIB) - one.reserved
        for device, one in predicted.items()
        if device.type == "cuda"
    ]
    return max(0, min(spare, default=0))


def with_gradients(predicted: Predicted, size: int) -> Predicted:
    """The prediction for a run that keeps ``size`` bytes of gradients until the last pass of a step."""
    return {device: replace(one, gathered=one.gathered + size) for device, one in predicted.items()}
