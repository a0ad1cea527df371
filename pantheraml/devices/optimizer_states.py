"""Bytes that an optimizer keeps for what it trains, by transformers' name of it."""

from __future__ import annotations

# Moments for each trained number, by a part of the name; two where none is here.
_MOMENTS = {"sgd": 0, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1}


def moment_bytes(optim: str, itemsize: int) -> int:
    """Bytes of the moments of one trained number.

    Args:
        optim: such as ``"adamw_torch_fused"`` or ``"adamw_8bit"``, whose moments take a byte (their scales, 1/256 of
            that in float32, are not counted).
        itemsize: bytes of the number.
    """
    moments = next((count for part, count in _MOMENTS.items() if part in optim), 2)
    return moments * (1 if "8bit" in optim else itemsize)
