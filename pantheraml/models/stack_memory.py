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


def beside_bytes(layers: list[Any], sizes: ActivationSizes) -> int:
    """Bytes that fused layers hold beside the memory of their weights once they have computed, forward and backward:
    margins, and the turned twins of FP8 weights. Of weights that ranks share out both are in ``shared_bytes``.

    The margins of 16-bit weights that lie in stacks are part of their memory.
    """
    moved = [layer.reader for layer in _resting(layers) if _has_moved(layer)]
    return sum(reader.beside_bytes for reader in moved) + missing_bytes(layers, sizes)


def missing_bytes(layers: list[Any], sizes: ActivationSizes) -> int:
    """Of ``beside_bytes``, what is not there yet."""
    if sizes.is_trained:
        return 0
    return sum(
        layer.reader.missing_bytes
        if _has_moved(layer)
        else sizes.margin_bytes(storage_of(layer)) + _twins(layer, sizes)
        for layer in _resting(layers)
    )


def _resting(layers: list[Any]) -> list[Any]:
    """Those whose weights are always in their places."""
    return [layer for layer in layers if not layer.reader.is_passing]


def _twins(layer: Any, sizes: ActivationSizes) -> int:
    """Bytes of the turned FP8 weights that the stacks of a layer keep."""
    groups = layer.reader.groups(layer).values()
    pairs = zip(sizes.turned_bytes(), groups, strict=False)  # a mixture's experts are not in FP8
    return sum(size for size, linears in pairs if any(map(_keeps_turned, linears[0].modules())))


def _keeps_turned(module: nn.Module) -> bool:
    return isinstance(module, Fp8Linear) and module.keeps_turned


def shared_bytes(layers: list[Any], sizes: ActivationSizes) -> int:
    """Bytes of the buffers that fused layers share: the stacks of one layer, for 4-bit weights and frozen ones that
    ranks share out; of FP8, the largest stack, where it is turned anew.
    """
    if sizes.is_trained:
        return 0
    storages = {storage_of(layer) for layer in layers}
    is_passing = any(layer.reader.is_passing for layer in layers)
    if "fp8" in storages:
        stacks = sum(one.rows * one.cols for one in sizes.stacks) + sizes.margin_bytes("fp8")
        turned = 0 if any(_twins(layer, sizes) for layer in layers) else max(sizes.turned_bytes())
        return stacks * is_passing + turned
    return sizes.unpacked_bytes() if is_passing or "4bit" in storages else 0


def _has_moved(layer: nn.Module) -> bool:
    """Whether the weights of a layer lie in stacks: they are views of more than themselves."""
    weights = (
        p
        for name, p in layer.named_parameters()
        if name.endswith(("o_proj.weight", "o_proj.base_layer.weight"))
    )
    return any(weight.untyped_storage().nbytes() > weight.nbytes for weight in weights)
