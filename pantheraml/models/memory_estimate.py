"""What a training step takes of one device, by its parts: predicted before the run, compared with the peak after it.

    weights       parameters and buffers as they lie there, packed ones with their scales
    gradients     of everything trained; DDP's buckets are the same memory
    optimizer     its moments
    activations   what layers keep for the backward by the recompute plan, and what comes and goes around one of them

It counts what is allocated, without gaps of the allocator and the driver's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pantheraml.devices.memory import describe_bytes
from pantheraml.models.recompute_plan import RecomputePlan, kept_bytes, passing_bytes, unpacked_bytes
from pantheraml.models.sharding import local

# Moments that an optimizer keeps for each trained number, by a part of its name; two where none is here.
_MOMENTS = {"sgd": 0, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """``15.0 GiB weights + 160 MiB gradients + ...``."""
        parts = ("weights", "gradients", "optimizer", "activations")
        return " + ".join(f"{describe_bytes(getattr(self, part))} {part}" for part in parts)


@dataclass(frozen=True)
class Share:
    """What one of several devices has of a model.

    Attributes:
        device: which.
        layers: its layers.
        in_flight: micro-batches whose activations they hold at a time.
        has_head: whether the head is there.
    """

    device: torch.device
    layers: int
    in_flight: float
    has_head: bool


def predicted_bytes(
    model: Any, tokens: int, plan: RecomputePlan, optim: str = "adamw_torch", share: Share | None = None
) -> MemoryEstimate:
    """What a step takes of the device that holds ``model``, or its ``share``.

    Args:
        model: a causal language model, LoRA included.
        tokens: of the largest micro-batch, padding included.
        plan: what recomputes there.
        optim: the optimizer by transformers' name.
        share: what the device has of it; None for all.
    """
    device = None if share is None else share.device
    trained = [p for p in model.parameters() if p.requires_grad and device in (None, p.device)]
    moments = next((count for part, count in _MOMENTS.items() if part in optim), 2)
    sizes = (1 if "8bit" in optim else p.element_size() for p in trained)
    kept = passing = 0
    if share is None:
        kept, passing = kept_bytes(model, plan, tokens), passing_bytes(model, tokens)
    elif share.layers:
        kept = kept_bytes(model, plan, tokens, layers=share.layers, in_flight=share.in_flight)
        passing = passing_bytes(model, tokens, head=share.has_head)
    return MemoryEstimate(
        weights=weight_bytes(model, device) + _unpacked(model, plan, device),
        gradients=sum(p.nbytes for p in trained),
        optimizer=sum(moments * p.numel() * size for p, size in zip(trained, sizes, strict=True)),
        activations=kept + passing,
    )


def weight_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of all parameters and buffers (on ``device``), the scales of packed ones included; what two modules share
    counts once.
    """
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(model)
        if device in (None, tensor.device)
    }
    return sum(found.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in map(local, (*model.parameters(), *model.buffers())):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:  # the scales of 4-bit weights, which are packed themselves
            yield from (one for one in vars(state).values() if isinstance(one, torch.Tensor))
            state = state.state2


def _unpacked(model: Any, plan: RecomputePlan, device: torch.device | None) -> int:
    """16-bit copies of the first layers' 4-bit weights, where the plan keeps some."""
    from pantheraml.models.fused import FusedDecoderLayer

    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    here = [layer for layer in layers if device in (None, next(layer.parameters()).device)]
    return sum(unpacked_bytes(layer) for layer in here[: plan.unpacked])
