"""Activation recompute: who decides, and switching it on one model.

The policy written at ``from_pretrained`` or ``get_peft_model`` rules. ``"auto"`` recomputes on a GPU, whose
memory is short, and not on a CPU; ``"unsloth"`` is accepted as a synonym of ``True``.
"""

from __future__ import annotations

from typing import Any

from pantheraml.errors import ConfigError, NotYetError

_POLICIES = (True, False, "auto", "unsloth")


def check_policy(policy: object) -> Any:
    """Return ``policy`` when it is one of True, False, "auto", "unsloth".

    Raises:
        ConfigError: any other value.
        NotYetError: ``"offload"``.
    """
    if policy == "offload":
        raise NotYetError(
            got='use_gradient_checkpointing="offload" was given.',
            need="Offloading activations to host memory is not in this version.",
            fix="Use True, which recomputes them.",
        )
    if not any(policy is known or (isinstance(policy, str) and policy == known) for known in _POLICIES):
        raise ConfigError(
            got=f"use_gradient_checkpointing={policy!r} was given.",
            need='It is True, False, "auto" or "unsloth" (a synonym of True).',
            fix='Leave it out for "auto".',
        )
    return policy


def is_recompute_on(policy: object, device_type: str) -> bool:
    """Whether activations are recomputed under ``policy`` on ``device_type`` ("cuda", "cpu", …)."""
    if policy == "auto":
        return device_type != "cpu"
    return bool(policy)


def set_recompute(model: Any, on: bool) -> None:
    """Switch activation recompute (non-reentrant) on a transformers or PEFT model."""
    # transformers renamed "gradient" to "activation" checkpointing after 5.17; the older names warn in newer versions.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(model, f"{prefix}_checkpointing_enable")
        enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def is_recomputing(model: Any) -> bool:
    """Whether a transformers or PEFT model recomputes activations now."""
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing"))
