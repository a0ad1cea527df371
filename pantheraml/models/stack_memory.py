"""What fused layers take beside their weights once they have computed: counted before it is there."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantheraml.devices.activations import ActivationSizes
from pantheraml.devices.model_parts import Storage
from pantheraml.models.fp8 import Fp8Linear


def storage_of(layer: nn.Module) -> Storage:
    """How the weights of a fused layer are held."""
    for module in layer.modules():
        if isinstance(module, Fp8Linear):
            return "fp8"
        weight = module._parameters.get("weight")
        if getattr(weight, "quant_state", None) is not None:
            return "4bit"
    return "plain"


def margin_bytes(layers: list[Any], sizes: ActivationSizes) -> int:
    """Bytes by which the stacks of fused layers are larger than the weights: those that have not moved in yet, with the
    twins that FP8 layers will keep. Weights that ranks share out never do.
    """
    if sizes.is_trained:
        return 0
    total = 0
    for layer in layers:
        if layer.reader.is_passing or _has_moved(layer):
            continue
        total += sizes.margin_bytes(storage_of(layer))
        total += sum(
            one.weight.numel() for one in layer.modules() if isinstance(one, Fp8Linear) and one.keeps_turned
        )
    return total


def shared_bytes(layers: list[Any], sizes: ActivationSizes) -> int:
    """Bytes of the buffers that fused layers share, for 4-bit weights and those that ranks share out."""
    passing = {storage_of(layer) for layer in layers if layer.reader.is_passing}
    if "fp8" in passing:  # F with its margins, and the largest stack, which is turned anew
        stacks = [one.rows * one.cols for one in sizes.stacks]
        return sum(stacks) + max(stacks) + sizes.margin_bytes("fp8")
    return sizes.unpacked_bytes() if passing or any(storage_of(layer) == "4bit" for layer in layers) else 0


def _has_moved(layer: nn.Module) -> bool:
    """Whether the weights of a layer lie in stacks: they are views of more than themselves."""
    weights = (
        p
        for name, p in layer.named_parameters()
        if name.endswith(("o_proj.weight", "o_proj.base_layer.weight"))
    )
    return any(weight.untyped_storage().nbytes() > weight.nbytes for weight in weights)
