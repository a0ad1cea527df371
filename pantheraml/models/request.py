"""What ``from_pretrained`` is asked for. It knows no heavy library: a process that starts ranks needs none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantheraml.config.multi_gpu import RECOMPUTE_POLICIES
from pantheraml.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pantheraml.models.placement import PipelineDevices
    from pantheraml.models.precision import PrecisionFlags
    from pantheraml.models.sharding import Sharding
    from pantheraml.models.state import Recompute
    from pantheraml.models.tensor_group import TensorGroup


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of ``FastLanguageModel.from_pretrained``, checked; see there for what each one means.

    Attributes:
        is_alone: whether all visible GPUs are this process's; ranks have one each.
        sharding: how ranks share out the weights, if they do.
        pipeline: what the layers are split over, whatever the model's size; None leaves it to ``device_map``.
        zero_stage: of DeepSpeed, if it will train the model.
        tensor_group: the ranks that compute each layer together with this one.
    """

    model_name: str
    max_seq_length: int
    dtype: str | torch.dtype | None
    flags: PrecisionFlags
    token: str | None
    device_map: str | int | dict[str, Any] | None
    max_memory: Mapping[Any, Any] | None
    is_alone: bool
    rope_scaling: dict[str, Any] | None
    fix_tokenizer: bool
    trust_remote_code: bool
    recompute: Recompute
    keep_dequantized: bool
    resize_model_vocab: int | None
    revision: str | None
    random_state: int
    kernels: str
    attn_implementation: str | None
    num_labels: int | None
    sharding: Sharding | None = None
    pipeline: PipelineDevices | None = None
    zero_stage: int | None = None
    tensor_group: TensorGroup | None = None


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
