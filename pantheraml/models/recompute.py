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
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pantheraml.config.multi_gpu import RECOMPUTE_POLICIES
from pantheraml.devices.memory import free_gpu_bytes
from pantheraml.errors import ConfigError
from pantheraml.log import say, say_once
from pantheraml.models.recompute_plan import (
    RecomputePlan,
    offload_plan,
    plan_recompute,
    plan_unpacked,
    unpacked_bytes,
)

if TYPE_CHECKING:
    from pantheraml.models.state import ModelState

_checkpoint = partial(checkpoint, use_reentrant=False)


def check_policy(policy: object) -> Any:
    """Return ``policy`` when it is one of True, False, "auto", "offload", "unsloth".

    Raises:
        ConfigError: any other value.
    """
    if not any(
        policy is known or (isinstance(policy, str) and policy == known) for known in RECOMPUTE_POLICIES
    ):
        raise ConfigError(
            got=f"use_gradient_checkpointing={policy!r} was given.",
            need='It is True, False, "auto", "offload" or "unsloth" (a synonym of "offload").',
            fix='Leave it out for "auto".',
        )
    return policy


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


def plan_ahead(model: Any, state: ModelState, tokens: int) -> None:
    """Plan now for batches of up to ``tokens``, padding included."""
    state.plan = _plan(model, state, tokens)


def _before_forward(state: ModelState, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not (backbone.training and torch.is_grad_enabled()):
        return
    plan = state.plan
    tokens = _num_tokens(args, kwargs)
    if plan is None or tokens > plan.tokens or state.planned_for != state.recompute:
        plan = _plan(backbone, state, tokens)
    state.plan = plan
    apply_plan(backbone, state, plan)


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        return ids.numel()
    embeddings = kwargs["inputs_embeds"]
    return embeddings.shape[0] * embeddings.shape[1]


def _plan(model: Any, state: ModelState, tokens: int) -> RecomputePlan:
    """What recomputes, and which 4-bit layers stay unpacked, from now on."""
    is_new = state.planned_for != state.recompute or state.plan is None
    before = state.plan
    plan = _plan_recompute(model, state, tokens, is_new)
    if state.keep_dequantized:
        plan = plan_unpacked(model, plan, _free_bytes(model, state, is_new))
        if before is None or plan.unpacked != before.unpacked:
            why = (
                ""
                if any(map(unpacked_bytes, _fused_layers(model)))
                else ": none is computed by fused functions"
            )
            say(f"keep_dequantized: {plan.unpacked} layers keep 16-bit weights beside their 4-bit ones{why}.")
    return plan


def _free_bytes(model: Any, state: ModelState, is_new: bool) -> int:
    """What may be taken now: the optimizer's share is kept before the first step, unpacked layers may go."""
    device = model.device
    free = free_gpu_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available
    held = sum(unpacked_bytes(layer) for layer in _fused_layers(model) if layer.reader.keeps_unpacked)
    return free + held - (optimizer_bytes(model) if is_new else 0)


def _plan_recompute(model: Any, state: ModelState, tokens: int, is_new: bool) -> RecomputePlan:
    policy, device = state.recompute, model.device
    total = model.config.get_text_config().num_hidden_layers
    state.planned_for = policy
    if policy in ("offload", "unsloth"):
        plan = offload_plan(model, tokens, psutil.virtual_memory().available)
        if device.type == "cpu":
            plan = RecomputePlan(tokens, total)
        elif is_new:
            say(f"recompute: {plan.describe(total)}.")
    elif policy != "auto":
        plan = RecomputePlan(tokens, total if policy else 0)
    elif device.type != "cuda":
        plan = RecomputePlan(tokens, 0)
    else:
        free = _free_bytes(model, state, is_new)
        plan = plan_recompute(model, tokens, free, psutil.virtual_memory().available)
        if state.plan is None or plan.layers != state.plan.layers or plan.stored != state.plan.stored:
            say(f"recompute: {plan.describe(total)}.")
    return plan


def optimizer_bytes(model: nn.Module) -> int:
    """Gradients and two float32 moments of everything trained, which the first step will allocate."""
    return sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)


def _layers(model: Any) -> list[Any]:
    """The decoder layers of ``model``, fused ones and others, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from pantheraml.models.fused import FusedDecoderLayer

    kinds = FusedDecoderLayer | GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, kinds)]


def _fused_layers(model: Any) -> list[Any]:
    from pantheraml.models.fused import FusedDecoderLayer

    return [layer for layer in _layers(model) if isinstance(layer, FusedDecoderLayer)]


def apply_plan(model: Any, state: ModelState, plan: RecomputePlan) -> None:
    """Set every layer's switch, and what it keeps and where."""
    from pantheraml.models.fused import FusedDecoderLayer, HostStore
    from pantheraml.models.fused.layer_function import TILE

    layers = _layers(model)
    if plan.stored and state.store is None:
        state.store = HostStore(model.device)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < plan.layers
        layer._gradient_checkpointing_func = _checkpoint
        if isinstance(layer, FusedDecoderLayer):
            layer.keep_when_recomputing = plan.keep
            layer.store = state.store if index < plan.stored else None
            layer.tile = plan.tile or TILE
            layer.reader.keep_unpacked(index < plan.unpacked)
        elif index < plan.stored:
            say_once("Layers that are not fused recompute, but keep their inputs on the GPU.")
