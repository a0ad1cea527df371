"""What a training step takes of one device, by its parts: predicted before the run, compared with the peak after it.

Numbers are read from the model that lies there; the formula is that of ``devices/peak_memory.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pantheraml.devices.activations import ActivationSizes
from pantheraml.devices.memory import describe_bytes
from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.devices.peak_memory import (
    ALLOCATED,
    CONTEXT_BYTES,
    NO_ENDS,
    NONE_OUTLIVES,
    WORKSPACE_BYTES,
    EndGradients,
    MemoryEstimate,
    Outliving,
    StepSizes,
    peak_memory,
)
from pantheraml.devices.zero import Zero, zero_gathered, zero_states
from pantheraml.models.decoder_layers import layers_of
from pantheraml.models.recompute_plan import RecomputePlan, kept_bytes, sizes_of, unpacked_bytes
from pantheraml.models.sharding import device_of, gathered_bytes, is_sharded
from pantheraml.models.shares import local
from pantheraml.models.stack_memory import beside_bytes, shared_bytes
from pantheraml.models.state import get_state
from pantheraml.models.zero_weights import zero_weights

__all__ = ["MemoryEstimate", "Share", "describe", "predicted_bytes", "weight_bytes"]


def describe(memory: MemoryEstimate) -> str:
    """What torch's allocator hands out, by its parts: ``15.0 GiB weights + 160 MiB gradients + ...``."""
    parts = memory.parts()
    return " + ".join(f"{describe_bytes(parts[name])} {name}" for name in ALLOCATED if name in parts)


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
    model: Any,
    tokens: int,
    plan: RecomputePlan,
    optim: str = "adamw_torch",
    share: Share | None = None,
    *,
    outliving: Outliving = NONE_OUTLIVES,
    zero: Zero | None = None,
) -> MemoryEstimate:
    """What a step takes of the device that holds ``model``, or its ``share``.

    Args:
        model: a causal language model, LoRA included.
        tokens: of the largest micro-batch, padding included.
        plan: what recomputes there.
        optim: the optimizer by transformers' name.
        share: what the device has of it; None for all.
        outliving: which gradients outlive a backward.
        zero: of DeepSpeed, where it trains.
    """
    device = _place_of(model) if share is None else share.device
    trained = [p for p in model.parameters() if p.requires_grad and device in (None, p.device)]
    sizes = sizes_of(model)
    fused = _fused_on(model, device)
    layers, in_flight = (None, 1.0) if share is None else (share.layers, share.in_flight)
    total = model.config.get_text_config().num_hidden_layers if layers is None else layers
    kept_first = getattr(sizes.kept, plan.keep) if plan.layers else sizes.kept.all
    passing = partial(sizes.layer_passing, tokens, attends=plan.keep == "input")
    computes, has_head = total > 0, share is None or share.has_head
    of_trained = sum(local(p).nbytes for p in trained)
    on_gpu = next(model.parameters()).device.type == "cuda"
    casts = _casts(model, trained, sizes) if computes else 0
    kept_last = getattr(sizes.kept, plan.keep) if plan.layers == total else sizes.kept.all
    frozen = weight_bytes(model, device) - of_trained
    if zero is not None and zero.stage == 3:
        frozen //= zero.ranks
    if zero is None:
        gathered = gathered_bytes(model, (kept_first * tokens, kept_last * tokens))
        trainable, gradients, optimizer = _states(trained, optim)
        late = _of_ends(model, trained) if gathered.ends else 0
    else:
        gone = kept_last * tokens if sizes.computes_fused else 0
        weights = zero_weights(model)
        gathered = zero_gathered(zero, weights, gone)
        trainable, gradients, optimizer = zero_states(zero, weights.trained, optim)
        late = zero.late(gradients)
    return peak_memory(
        StepSizes(
            weights=frozen + beside_bytes(fused, sizes),
            buffers=_unpacked(plan, fused) + shared_bytes(fused, sizes),
            trainable=trainable,
            gradients=gradients,
            optimizer=optimizer,
            outliving=outliving,
            kept=kept_bytes(model, plan, tokens, layers=layers, in_flight=in_flight) if computes else 0,
            kept_first=int(kept_first * tokens * in_flight) if computes else 0,
            passing=passing(recomputes=plan.layers == total) if computes else 0,
            passing_first=passing(recomputes=plan.layers > 0) if computes else 0,
            logits=sizes.head_passing(tokens) if computes and has_head else 0,
            forward_logits=sizes.head_forward(tokens) if computes and has_head else 0,
            casts=casts * (total - plan.layers) // max(1, total),
            forward_casts=casts,
            casts_left=casts * max(1, total - plan.layers) // max(1, total),
            gathered=gathered,
            late_gradients=late,
            ends=_end_gradients(model, device, has_head=computes and has_head) if zero is None else NO_ENDS,
            workspace=WORKSPACE_BYTES if on_gpu else 0,
            driver=CONTEXT_BYTES if on_gpu else 0,
        )
    )


def _states(trained: list[nn.Parameter], optim: str) -> tuple[int, int, int]:
    """Bytes of what is trained here, its gradients and its moments."""
    size = sum(local(p).nbytes for p in trained)
    return size, size, sum(local(p).numel() * moment_bytes(optim, p.element_size()) for p in trained)


def _place_of(model: Any) -> torch.device | None:
    """The device of a rank whose shares may lie in host memory; None of other models, all of which is on one."""
    state = get_state(model)
    return None if state is None or state.sharding is None else state.sharding.device


def _of_ends(model: Any, trained: list[nn.Parameter]) -> int:
    """Bytes of what is trained here and is in no layer."""
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    return sum(local(p).nbytes for p in trained if id(p) not in inside)


def _end_gradients(model: Any, device: torch.device | None, *, has_head: bool) -> EndGradients:
    """Those of embedding and head, as far as they are on ``device``; none where they are shared out as they come."""
    if is_sharded(model):
        return EndGradients()
    weights = [module.weight for module in (model.get_output_embeddings(), model.get_input_embeddings())]
    head, embedding = (
        one.nbytes if one.requires_grad and device in (None, one.device) else 0 for one in weights
    )
    return EndGradients(head * has_head, embedding, is_tied=weights[0] is weights[1])


def _casts(model: Any, trained: list[nn.Parameter], sizes: ActivationSizes) -> int:
    """Bytes of the copies that autocast makes of masters in layers; embedding and head are not copied for the pass."""
    if not sizes.is_trained or sizes.computed >= sizes.size:
        return 0
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(p.numel() for p in trained if id(p) not in ends) * sizes.computed


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
    for tensor in (*model.parameters(), *model.buffers()):
        yield local(tensor)
        state = getattr(tensor, "quant_state", None)
        while state is not None:  # the scales of 4-bit weights, which are packed themselves
            yield from (one for one in vars(state).values() if isinstance(one, torch.Tensor))
            state = state.state2


def _fused_on(model: Any, device: torch.device | None) -> list[Any]:
    from pantheraml.models.fused import FusedDecoderLayer

    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    return [layer for layer in layers if device in (None, device_of(layer))]


def _unpacked(plan: RecomputePlan, layers: list[Any]) -> int:
    """16-bit copies of the first layers' 4-bit weights, where the plan keeps some."""
    return sum(unpacked_bytes(layer) for layer in layers[: plan.unpacked])
