"""Activation recompute: who decides, and switching it on one model.

The model's policy rules, whatever trainer it is in: it is applied before every training forward, so that a library's
default (TRL's SFTConfig turns recompute on) cannot undo it.

    False        nothing is recomputed
    True         every layer is
    "auto"       as few layers as the free memory of the GPU asks for, planned anew when a longer batch comes
    "offload"    every layer is, and what it keeps lies in pinned host memory; "unsloth" is a synonym
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import nn

from pantheraml.devices.memory import free_gpu_bytes
from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.log import say, say_once
from pantheraml.models.activation_sizes import TILE
from pantheraml.models.decoder_layers import layers_of
from pantheraml.models.dropout_sites import checkpointed
from pantheraml.models.recompute_plan import (
    RecomputePlan,
    offload_plan,
    plan_recompute,
    plan_unpacked,
    unpacked_bytes,
)
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.sharding import device_of
from pantheraml.models.shares import local

if TYPE_CHECKING:
    from pantheraml.models.state import ModelState


def is_recompute_forced(policy: object) -> bool:
    """Whether every layer recomputes under ``policy``, however much memory is free."""
    return policy not in (False, "auto")


def set_recompute(model: Any, on: bool) -> None:
    """Switch activation recompute (non-reentrant) on all layers of a transformers or PEFT model."""
    # transformers renamed "gradient" to "activation" checkpointing after 5.17; the older names warn in newer versions.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(model, f"{prefix}_checkpointing_enable")
        enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def is_recomputing(model: Any) -> bool:
    """Whether some layer of a transformers or PEFT model recomputes activations now."""
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing"))


def watch(backbone: Any, state: ModelState) -> None:
    """Apply the policy of ``state`` before every training forward of ``backbone`` (the model without its head)."""
    backbone.register_forward_pre_hook(partial(_before_forward, state), with_kwargs=True)


class Section(NamedTuple):
    """The layers of a model that share a device.

    Attributes:
        layers: in order.
        device: where they are.
        in_flight: micro-batches whose activations they hold at a time.
    """

    layers: list[Any]
    device: torch.device
    in_flight: float = 1


def sections(model: Any, state: ModelState) -> list[Section]:
    """The layers of ``model`` by device; mostly one section with all of them."""
    found: dict[torch.device, list[Any]] = {}
    for layer in layers_of(model):
        found.setdefault(device_of(layer), []).append(layer)
    return [Section(part, device, state.in_flight.get(device, 1)) for device, part in found.items()]


def plan_ahead(model: Any, state: ModelState, tokens: int) -> None:
    """Plan now for batches of up to ``tokens``, padding included."""
    state.plans = _plan(model, state, tokens)


def prepare_recompute(model: Any, state: ModelState, tokens: int) -> None:
    """Set what the layers of ``model`` keep in a step with ``tokens`` at a time, planned anew where that is needed."""
    plans = state.plans
    if not plans or tokens > plans[0].tokens or state.planned_for != state.recompute:
        plans = _plan(model, state, tokens)
    state.plans = plans
    for section, plan in zip(sections(model, state), plans, strict=True):
        apply_plan(section, state, plan)


def _before_forward(state: ModelState, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if backbone.training and torch.is_grad_enabled():
        prepare_recompute(backbone, state, _num_tokens(args, kwargs))


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return ids.numel()
    embeddings = kwargs["inputs_embeds"]
    return embeddings.shape[0] * embeddings.shape[1]


def _plan(model: Any, state: ModelState, tokens: int) -> tuple[RecomputePlan, ...]:
    """What recomputes, and which 4-bit layers stay unpacked, from now on, for each section."""
    is_new = state.planned_for != state.recompute or not state.plans
    parts = sections(model, state)
    before = state.plans if len(state.plans) == len(parts) else (None,) * len(parts)
    found = [
        _plan_section(model, state, section, tokens, is_new, old)
        for section, old in zip(parts, before, strict=True)
    ]
    state.planned_for = state.recompute
    return tuple(found)


def _plan_section(
    model: Any, state: ModelState, section: Section, tokens: int, is_new: bool, before: RecomputePlan | None
) -> RecomputePlan:
    plan = _plan_recompute(model, state, section, tokens, is_new)
    total = len(section.layers)
    place = "" if total == model.config.get_text_config().num_hidden_layers else f" on {section.device}"
    is_told = before is None or (plan.layers, plan.stored) != (before.layers, before.stored)
    if plan.need and is_told and section.device.type == "cuda":
        say(f"recompute{place}: {plan.describe(total)}.")
    if state.keep_dequantized:
        free = _free_bytes(model, section, is_new)
        plan = plan_unpacked(model, plan, free, section.layers, section.in_flight)
        if before is None or plan.unpacked != before.unpacked:
            why = (
                ""
                if any(map(unpacked_bytes, _fused(section.layers)))
                else ": none is computed by fused functions"
            )
            say(
                f"keep_dequantized{place}: {plan.unpacked} layers keep 16-bit weights beside their 4-bit ones{why}."
            )
    return plan


def _free_bytes(model: Any, section: Section, is_new: bool) -> int:
    """What may be taken now: the optimizer's share is kept before the first step, unpacked layers may go."""
    device = section.device
    free = free_gpu_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available
    group = tensor_group_of(model)
    free = free if group is None else group.least(free)  # what is computed again is so by all of them
    held = sum(unpacked_bytes(layer) for layer in _fused(section.layers) if layer.reader.keeps_unpacked)
    return free + held - (optimizer_bytes(model, device) if is_new else 0)


def _plan_recompute(
    model: Any, state: ModelState, section: Section, tokens: int, is_new: bool
) -> RecomputePlan:
    policy, total = state.recompute, len(section.layers)
    group = tensor_group_of(model)
    host = psutil.virtual_memory().available
    host = host if group is None else group.least(host)
    if policy in ("offload", "unsloth"):
        if section.device.type == "cpu":
            return RecomputePlan(tokens, total)
        return offload_plan(model, tokens, host, layers=total, in_flight=section.in_flight)
    if policy != "auto":
        return RecomputePlan(tokens, total if policy else 0)
    if section.device.type != "cuda":
        return RecomputePlan(tokens, 0)
    free = _free_bytes(model, section, is_new)
    return plan_recompute(model, tokens, free, host, layers=total, in_flight=section.in_flight)


def optimizer_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Gradients and Adam's moments of everything trained (on ``device``), which the first step will allocate."""
    trained = (p for p in model.parameters() if p.requires_grad and device in (None, p.device))
    shares = ((local(p), p.element_size()) for p in trained)
    return sum(one.nbytes + one.numel() * moment_bytes("adamw", size) for one, size in shares)


def _fused(layers: list[Any]) -> list[Any]:
    from pantheraml.models.fused import FusedDecoderLayer

    return [layer for layer in layers if isinstance(layer, FusedDecoderLayer)]


def apply_plan(section: Section, state: ModelState, plan: RecomputePlan) -> None:
    """Set every layer's switch, and what it keeps and where."""
    from pantheraml.models.fused import FusedDecoderLayer, HostStore

    if plan.stored and section.device not in state.stores:
        state.stores[section.device] = HostStore(section.device)
    store = state.stores.get(section.device)
    for index, layer in enumerate(section.layers):
        layer.gradient_checkpointing = index < plan.layers
        layer._gradient_checkpointing_func = checkpointed
        if isinstance(layer, FusedDecoderLayer):
            layer.keep_when_recomputing = plan.keep
            layer.store = store if index < plan.stored else None
            layer.tile = plan.tile or TILE
            layer.reader.keep_unpacked(index < plan.unpacked)
        elif index < plan.stored:
            say_once("Layers that are not fused recompute, but keep their inputs on the GPU.")
