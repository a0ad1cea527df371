"""Sizes among DeepSpeed's settings: chosen by what is trained where nobody says them, and what memory follows."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantheraml.devices.zero import BUCKET, Zero, live_numbers
from pantheraml.models.zero_weights import zero_weights

# DeepSpeed's own defaults.
_BUCKET, _LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 50_000_000


def sizes_for(model: nn.Module, stage: int) -> dict[str, int]:
    """Settings of ZeRO in numbers, for the weights of ``model``.

    DeepSpeed allocates a bucket whole: its default takes 2 GB beside an adapter of 20 MB. At stage 3 it lets go of a
    gathered weight only where a billion numbers are gathered: of a smaller model of none.
    """
    weights = zero_weights(model)
    found = {"reduce_bucket_size": max(1, min(BUCKET, weights.trained))}
    if stage == 3:
        live = live_numbers(weights.layer_numbers)
        found["stage3_max_live_parameters"] = found["stage3_max_reuse_distance"] = live
        found["stage3_prefetch_bucket_size"] = min(BUCKET, weights.layer_numbers)
    return found


def zero_of(settings: dict[str, Any], model: Any, ranks: int) -> Zero:
    """What memory follows from.

    Args:
        settings: of DeepSpeed, whole; "auto" is what accelerate will fill in.
        model: that is trained.
        ranks: of the run.
    """
    zero = settings["zero_optimization"]
    stage, hidden = zero.get("stage", 0), model.config.get_text_config().hidden_size

    def numbers(name: str, default: int) -> int:
        return hidden**2 if zero.get(name) == "auto" else int(zero.get(name, default))

    is_half = any((settings.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16"))
    return Zero(
        stage,
        ranks,
        bucket=numbers("reduce_bucket_size", _BUCKET),
        live=numbers("stage3_max_live_parameters", _LIVE),
        prefetch=numbers("stage3_prefetch_bucket_size", _PREFETCH),
        size=2 if is_half else 4,
        buffers=2 if zero.get("overlap_comm") is True and stage < 3 else 1,
        offload=(zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme"),
    )
