"""Sizes among DeepSpeed's settings: chosen by what is trained where nobody says them, and what memory follows."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantheraml.devices.zero import LIVE, PREFETCH, Zero, bucket_of
from pantheraml.models.zero_weights import zero_weights

# DeepSpeed's own default.
_BUCKET = 500_000_000


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
    stage, hidden = zero.get("stage", 0), model.config.get_text_config().hidden_size

    def numbers(name: str, default: int) -> int:
        return hidden**2 if zero.get(name) == "auto" else int(float(zero.get(name, default)))

    is_half = any((settings.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16"))
    return Zero(
        stage,
        ranks,
        bucket=numbers("reduce_bucket_size", _BUCKET),
        live=numbers("stage3_max_live_parameters", LIVE),
        prefetch=numbers("stage3_prefetch_bucket_size", PREFETCH),
        size=2 if is_half else 4,
        buffers=2 if zero.get("overlap_comm") is True and stage < 3 else 1,
        offload=(zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme"),
    )
