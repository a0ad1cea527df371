"""A plan from a size or a name: the planner behind ``pantheraml plan``, asked the way the guides ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pantheraml.devices.known_gpus import GpuKind, gpu_of, read_gpus
from pantheraml.devices.plan import Plan, PlanChoice, PlanRequest, choose_plan
from pantheraml.devices.usual_models import read_size
from pantheraml.devices.visible_gpus import visible_memory, visible_states
from pantheraml.errors import ConfigError, ModelLoadError
from pantheraml.models.optimal_config import check_method, parts_of, smaller_parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose(
    model_size: str,
    available_memory: str | None,
    num_gpus: int | None,
    max_seq_length: int,
    method: str,
) -> tuple[PlanRequest, PlanChoice]:
    """What is planned, and the plan, for a model that is known by its size or its name.

    Args:
        model_size: ``"7B"``, ``"1.5B"``, ``"350M"``, or the name or folder of a model.
        available_memory: of each GPU: ``"32GB"``, ``"24GiB"``, or a kind such as ``"H200"``; None: what is free now.
        num_gpus: None: those that this process sees, or one.
        max_seq_length: tokens of the longest row.
        method: ``"lora"``, ``"qlora"``, ``"fp8"`` or ``"full"``.

    Raises:
        ConfigError: words that cannot be, no GPU to plan for, or nothing fits.
        ModelLoadError: no such model, or one of an architecture that no family describes.
    """
    check_method("method", method)
    gpus = _gpus(available_memory, num_gpus)
    config = _config_of(model_size)
    parts = parts_of(config, method)
    if parts is None:
        raise ModelLoadError(
            got=f"No family describes the architecture of {model_size!r}.",
            need="The layers of a known family are counted one by one.",
            fix="Say its size instead, such as '7B'.",
        )
    smaller = {f"method={one!r}": count for one, count in smaller_parts(config, method).items()}
    request = PlanRequest(parts, gpus, max_seq_length)
    return request, choose_plan(request, smaller)


def _gpus(available_memory: str | None, num_gpus: int | None) -> tuple[GpuKind, ...]:
    seen = visible_memory()
    count = num_gpus or len(seen) or 1
    if available_memory is not None:
        said = read_gpus(available_memory, "available_memory")
        return said if num_gpus is None and len(said) > 1 else said[:1] * count
    if len(seen) < count:
        raise ConfigError(
            got=f"{count} GPU{'s' * (count > 1)} asked for, {len(seen) or 'none'} can be seen here.",
            need="What GPUs have that are somewhere else is for you to say.",
            fix="Write available_memory='32GB', for example, which each of them has.",
        )
    states = visible_states()
    names = [one.name for one in states] if states is not None else [""] * count
    return tuple(gpu_of(names[index] or f"GPU {index}", seen[index]) for index in list(seen)[:count])


def _config_of(model_size: str) -> PretrainedConfig:
    if read_size(model_size) is not None:
        from pantheraml.models.model_size import config_of_size

        return config_of_size(model_size)
    from pantheraml.models.loading import load_config
    from pantheraml.models.source import resolve_config

    return load_config(resolve_config(model_size))


def arguments_of(request: PlanRequest, plan: Plan) -> dict[str, Any]:
    """The arguments of ``enable_multi_gpu`` that lay a run out like ``plan``."""
    layout = plan.layout
    again, layers = sum(plan.work.recomputing), len(request.parts.layers)
    told: dict[str, Any] = {
        "num_gpus": layout.gpus,
        "batch_size_per_gpu": plan.rows,
        # Of models that are not fused, which keep more than is planned, all layers recompute.
        "enable_gradient_checkpointing": True if again == layers else "auto",
    }
    if layout.strategy == "fsdp":
        told["strategy"] = "fsdp"
        if not request.parts.full_finetuning:
            told["shard_frozen"] = layout.shard_frozen
        if layout.shard < layout.data:
            told["shard_size"] = layout.shard
    elif layout.strategy in ("tensor", "pipeline"):
        told[f"{layout.strategy}_parallel"] = getattr(layout, layout.strategy)
    return told
