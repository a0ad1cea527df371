"""Sizes among DeepSpeed's settings: chosen by what is trained where nobody says them, and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pantheraml.devices.zero import LIVE, PREFETCH, Zero, bucket_of, waits_whole
from pantheraml.models.zero_weights import zero_weights

# DeepSpeed's own default.
_BUCKET = 500_000_000
# Of its settings, those by which the engine alone says when gradients are reduced or what they are added up in, and one
# that measures passes.
_OF_ITS_OWN = ("zenflow", "compile", "data_types", "flops_profiler")
# Those by which the engine exchanges otherwise than one weight or bucket at a time over all ranks.
_OTHERWISE = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "enable_sanity_checks",
)


def sizes_for(model: nn.Module) -> dict[str, int]:
    """Settings of ZeRO in numbers, for what is trained of ``model``: DeepSpeed's default bucket takes 2 GB beside an
    adapter of 20 MB.
    """
    return {"reduce_bucket_size": bucket_of(zero_weights(model).trained)}


def zero_of(settings: dict[str, Any], model: Any, ranks: int) -> Zero:
    """What memory follows from.

    Args:
        settings: of DeepSpeed, whole; "auto" is what accelerate will fill in.
        model: that is trained.
        ranks: of the run.
    """
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)
    return Zero(
        stage,
        ranks,
        bucket=_numbers(zero, "reduce_bucket_size", _BUCKET, model),
        live=_numbers(zero, "stage3_max_live_parameters", LIVE, model),
        prefetch=_numbers(zero, "stage3_prefetch_bucket_size", PREFETCH, model),
        size=2 if _is_half(settings) else 4,
        buffers=2 if zero.get("overlap_comm") is True and stage < 3 else 1,
        offload=(zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme"),
        waits=holds_gradients(settings, model),
    )


def holds_gradients(settings: dict[str, Any], model: nn.Module) -> bool:
    """Whether gradients are added up on each rank until all passes of a step are done, see ``held_engine``.

    Args:
        settings: of DeepSpeed, whole.
        model: that is trained.
    """
    zero = settings["zero_optimization"]
    stage, is_half = zero.get("stage", 0), _is_half(settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    # DeepSpeed adds up in the dtype that its settings say, and at stage 0 has another optimizer for half ones.
    is_plain = stage > 0 if is_half else all(p.dtype == torch.float32 for p in trained)
    if not is_plain or any(settings.get(name) or zero.get(name) for name in _OF_ITS_OWN):
        return False
    numbers, bucket = sum(p.numel() for p in trained), _numbers(zero, "reduce_bucket_size", _BUCKET, model)
    return waits_whole(stage, numbers, bucket, overlaps=zero.get("overlap_comm") is True)


def cuts_plainly(settings: dict[str, Any]) -> bool:
    """Whether passes that cut gradients, or gather weights, can be gone through again, see ``zero_passes``.

    Args:
        settings: of DeepSpeed, whole.
    """
    zero = settings["zero_optimization"]
    offloaded = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    is_other = any(settings.get(name) or zero.get(name) for name in (*_OF_ITS_OWN, *_OTHERWISE))
    is_grouped = zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("mics_shard_size", -1) > 0
    is_on_disk = any(part.get("device") == "nvme" for part in offloaded)
    is_scattered = zero.get("reduce_scatter", True) is True
    return zero.get("stage", 0) > 0 and is_scattered and not (is_other or is_grouped or is_on_disk)


def _numbers(zero: dict[str, Any], name: str, default: int, model: Any) -> int:
    if zero.get(name) == "auto":  # as accelerate fills it in
        return model.config.get_text_config().hidden_size ** 2
    return int(float(zero.get(name, default)))


def _is_half(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed makes trained weights 16-bit ones."""
    return any((settings.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16"))
