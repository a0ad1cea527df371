"""Settings for a model and GPUs by the planner: what ``pantheraml plan`` prints, as a run takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.known_gpus import GpuKind, gpu_of, read_gpus
from pantheraml.devices.model_parts import ModelParts
from pantheraml.devices.plan import Plan, PlanChoice, PlanRequest, choose_plan
from pantheraml.devices.plan_words import describe_choice, title_of
from pantheraml.devices.visible_gpus import visible_memory
from pantheraml.errors import ConfigError, ModelLoadError, did_you_mean
from pantheraml.launch.environment import LaunchEnvironment

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Ways to train, by their names, and the flags of from_pretrained for each.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"load_in_16bit": True},
    "qlora": {"load_in_4bit": True},
    "fp8": {"load_in_fp8": True},
    "full": {"full_finetuning": True},
}
# What is advised where one does not fit.
_SMALLER = {"lora": ("fp8", "qlora"), "fp8": ("qlora",), "full": ("lora", "qlora"), "qlora": ()}


@dataclass(frozen=True)
class OptimalConfig:
    """Settings that were chosen for a run; printed, they say why.

    Attributes:
        multi_gpu_config: for ``from_pretrained(use_multi_gpu=...)`` and the trainer.
        load: flags for ``from_pretrained``.
        per_device_train_batch_size: rows of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step.
        use_gradient_checkpointing: ``"auto"``, by which a run recomputes as little as its free memory asks for.
        request: what was planned.
        choice: the plan, its memory by component, and the runner-up.
        name: of the model.
    """

    multi_gpu_config: MultiGPUConfig
    load: dict[str, Any]
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    use_gradient_checkpointing: bool | str
    request: PlanRequest
    choice: PlanChoice
    name: str

    @property
    def training_arguments(self) -> dict[str, Any]:
        """For ``PantheraMLTrainingArguments(**...)``: micro-batch, accumulation and optimizer."""
        return {
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "optim": self.request.optim,
        }

    def __str__(self) -> str:
        """The plan as lines."""
        lines = describe_choice(self.request, self.choice)
        return "\n".join(
            (title_of(self.name, self.request), *(f"  {name:<9}  {text}" for name, text in lines.items()))
        )


def get_optimal_config(
    model_name: str | None = None,
    *,
    max_seq_length: int = 2048,
    method: str = "qlora",
    gpus: str | None = None,
    model_size: str | None = None,
    available_memory: str | None = None,
    batch_size: int | None = None,
    optim: str = "adamw_torch_fused",
) -> OptimalConfig:
    """The settings by which GPUs train a model best, by the planner; nothing is loaded.

    Args:
        model_name: local folder or hub id, of which the configuration alone is read; or give ``model_size``.
        max_seq_length: longest training row in tokens.
        method: ``"lora"`` (16-bit), ``"qlora"`` (NF4), ``"fp8"`` or ``"full"``.
        gpus: such as ``"8xH200"`` or ``"4x80GB"``; None is those that are here, alike on all ranks.
        model_size: such as ``"7B"``, in the place of ``model_name``: a dense model of Llama's kind.
        available_memory: of each GPU that is here (or of one GPU), such as ``"32GB"``, in the place of ``gpus``.
        batch_size: rows of a step for each GPU; None is about 8,192 tokens.
        optim: the optimizer by transformers' name.

    Returns:
        Strategy, micro-batch and accumulation, with the plan they follow from.

    Raises:
        ConfigError: nothing fits, with the cheapest changes; or arguments that cannot be.
        ModelLoadError: no configuration, or of an architecture that no family describes.
    """
    check_method("method", method)
    parts = parts_of(_config_of(model_name, model_size), method)
    name = model_name or f"a model of {model_size}"
    if parts is None:
        raise unknown_architecture(name)
    request = PlanRequest(parts, _gpus_of(gpus, available_memory), max_seq_length, batch_size, optim)
    choice = choose_plan(request)
    plan = choice.plan
    rows, passes = plan.rows, plan.work.micro_batches
    if plan.layout.strategy == "pipeline":  # whose micro-batches are cut from what the trainer gives it
        rows, passes = rows * passes, 1
    return OptimalConfig(
        _as_config(plan, parts), METHODS[method], rows, passes, "auto", request, choice, name
    )


def parts_of(config: PretrainedConfig, method: str, rank: int = 16) -> ModelParts | None:
    """The sizes of a model trained by ``method`` of ``METHODS``; None for an architecture that no family describes."""
    import torch

    from pantheraml.models.precision import PrecisionFlags, choose_precision
    from pantheraml.models.weight_sizes import measure_parts

    flags = PrecisionFlags(**METHODS[method])
    stored = getattr(config, "quantization_config", None)
    dtype = None if flags.full_finetuning else "bfloat16"
    precision = choose_precision(flags, dtype, torch.device("cpu"), stored)
    return measure_parts(config, precision, full_finetuning=flags.full_finetuning, rank=rank)


def smaller_parts(
    config: PretrainedConfig, method: str, rank: int = 16
) -> dict[str, Callable[[], ModelParts | None]]:
    """The parts by methods that take less than ``method``, by their names."""
    return {one: partial(parts_of, config, one, rank) for one in _SMALLER[method]}


def check_method(name: str, method: str) -> None:
    """Refuse what is none of ``METHODS``.

    Raises:
        ConfigError: it is none.
    """
    if method not in METHODS:
        raise ConfigError(
            got=f"{name}={method!r} was given.",
            need=f"It is one of {', '.join(METHODS)}.",
            fix=did_you_mean(method, METHODS) or f"Leave {name} out for the default.",
        )


def unknown_architecture(name: str) -> ModelLoadError:
    """The error for a model that cannot be counted."""
    return ModelLoadError(
        got=f"No family describes the architecture of '{name}'.",
        need="The layers of a known family are counted one by one.",
        fix="It can be trained all the same; memory is told by a short run.",
    )


def _config_of(model_name: str | None, model_size: str | None) -> PretrainedConfig:
    if (model_name is None) == (model_size is None):
        raise ConfigError(
            got=f"model_name={model_name!r} and model_size={model_size!r} were given.",
            need="One of them says what is trained.",
            fix='Write get_optimal_config("org/name"), or get_optimal_config(model_size="7B").',
        )
    if model_size is not None:
        from pantheraml.models.model_size import config_of_size

        return config_of_size(model_size)
    from pantheraml.models.loading import load_config
    from pantheraml.models.source import resolve_config

    return load_config(resolve_config(str(model_name)))


def _gpus_of(gpus: str | None, available_memory: str | None) -> tuple[GpuKind, ...]:
    if gpus is not None and available_memory is not None:
        raise ConfigError(
            got=f"gpus={gpus!r} and available_memory={available_memory!r} were given.",
            need="Each of them says what GPUs there are.",
            fix='Write gpus="4x32GB", or leave gpus out for those that are here.',
        )
    if gpus is not None:
        return read_gpus(gpus)
    # What is free changes while other ranks load; all of it is the same for all of them.
    here = visible_memory("total")
    count = _count(len(here))
    if available_memory is not None:
        return read_gpus(f"{max(1, count)}x{available_memory}")
    if not here:
        raise ConfigError(
            got="There is no GPU here, and none was named.",
            need="A plan is made for GPUs.",
            fix='Write gpus="8xH200", for example.',
        )
    return (gpu_of("GPU", min(here.values())),) * count


def _count(here: int) -> int:
    """GPUs of the run: of all its machines, where it has several."""
    environment = LaunchEnvironment.detect()
    if environment.kind in ("torchrun", "accelerate", "slurm-gpu"):
        return environment.world_size
    return here * environment.num_nodes


def _as_config(plan: Plan, parts: ModelParts) -> MultiGPUConfig:
    layout = plan.layout
    if layout.strategy == "fsdp":
        size = layout.shard if layout.shard < layout.data else None
        frozen = None if parts.full_finetuning else layout.shard_frozen
        return MultiGPUConfig(strategy="fsdp", shard_frozen=frozen, shard_size=size)
    if layout.strategy == "tensor":
        return MultiGPUConfig(strategy="tensor", tensor_parallel=layout.tensor)
    if layout.strategy == "pipeline":
        micro_batches = plan.work.micro_batches
        return MultiGPUConfig(
            strategy="pipeline", pipeline_parallel=layout.pipeline, micro_batches=micro_batches
        )
    return MultiGPUConfig(strategy=layout.strategy)
