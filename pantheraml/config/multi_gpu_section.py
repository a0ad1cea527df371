"""The ``multi_gpu`` section: the fields of ``MultiGPUConfig``, with its defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pantheraml.config.multi_gpu import (
    Backend,
    BatchSplit,
    CpuOffload,
    MultiGPUConfig,
    Recompute,
    ReduceDtype,
    Strategy,
)
from pantheraml.config.section import Count, CountOrZero, NumberOrZero, PositiveNumber, Section

# Limits of GPUs: 0, "0" or "cuda:0" to bytes or "10GB". Keys of YAML are text.
MaxMemory = dict[str, CountOrZero | str]


class MultiGPUSettings(Section):
    """How the run is spread over GPUs: the fields of ``MultiGPUConfig``."""

    backend: Backend = Field(default=MultiGPUConfig.backend, description="How ranks talk.")
    timeout_minutes: PositiveNumber = Field(
        default=float(MultiGPUConfig.timeout_minutes), description="How long a collective waits for a rank."
    )
    auto_device_map: bool = Field(
        default=MultiGPUConfig.auto_device_map,
        description="Split a model that does not fit on one GPU between all of them.",
    )
    tensor_parallel: bool | int = Field(
        default=MultiGPUConfig.tensor_parallel,
        description="GPUs that compute each layer together; true is all.",
    )
    pipeline_parallel: bool | int = Field(
        default=MultiGPUConfig.pipeline_parallel,
        description="GPUs that share one model's layers; true is all.",
    )
    use_gradient_checkpointing: bool | Recompute = Field(
        default="auto", description="As in the model section; auto leaves it to that."
    )
    find_unused_parameters: bool = Field(
        default=MultiGPUConfig.find_unused_parameters, description="For models of which parts are skipped."
    )
    strategy: Strategy = Field(
        default=MultiGPUConfig.strategy,
        description="ddp copies the model to every GPU, fsdp and deepspeed share it out, tensor and pipeline compute "
        "it together, none is one process; auto is ddp where a GPU holds the model.",
    )
    num_processes: Count | None = Field(
        default=MultiGPUConfig.num_processes, description="Ranks on this machine; null is one for each GPU."
    )
    max_memory: MaxMemory | None = Field(
        default=None, description="Bytes that may be taken of each GPU, as in the model section."
    )
    micro_batches: Count | None = Field(
        default=MultiGPUConfig.micro_batches, description="Pieces of a step of a split model."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="Of deepspeed: 1 shards the optimizer, 2 gradients too, 3 weights too, 0 nothing.",
    )
    cpu_offload: CpuOffload = Field(
        default=MultiGPUConfig.cpu_offload,
        description="Keep in host memory what is sharded; optimizer: its state alone (deepspeed).",
    )
    shard_frozen: bool | None = Field(
        default=MultiGPUConfig.shard_frozen,
        description="Of fsdp: share out weights that are not trained; null: where a GPU does not hold them.",
    )
    shard_size: Count | None = Field(
        default=MultiGPUConfig.shard_size, description="Of fsdp: ranks that share one copy; null is all."
    )
    reduce_dtype: ReduceDtype | None = Field(
        default=MultiGPUConfig.reduce_dtype,
        description="In what gradients are averaged; null is the trained weights' own.",
    )
    hang_seconds: NumberOrZero | None = Field(
        default=float(MultiGPUConfig.hang_seconds or 0),
        description="How long a rank may be without progress before the run ends with a report; null or 0 is off.",
    )
    max_restarts: CountOrZero = Field(
        default=MultiGPUConfig.max_restarts,
        description="How often ranks are started again after one has died, to go on with the last whole checkpoint.",
    )
    batch_split: BatchSplit = Field(
        default=MultiGPUConfig.batch_split,
        description="How ranks share a step's rows: even, memory (free on their GPUs), speed (measured), or a number "
        "for each.",
    )

    @property
    def may_start_ranks(self) -> bool:
        """Whether these settings mean several processes, where there are several GPUs."""
        return self.strategy != "none" and self.num_processes != 1

    def to_config(self) -> MultiGPUConfig:
        """The same settings as ``from_pretrained`` and the trainer take them."""
        return MultiGPUConfig(**dict(self))


def _all_gpus(value: object) -> object:
    return {} if value is True else value


# ``true`` is short for ``{}``: all visible GPUs.
MultiGPU = Annotated[
    MultiGPUSettings | None,
    BeforeValidator(_all_gpus, json_schema_input_type=MultiGPUSettings | Literal[True] | None),
]
