"""Weights that are quantised while a checkpoint is loaded, and shared out at once: no device ever holds them all.

The model comes to the CPU, where plain weights stay in the mapped file. A weight that is to be quantised goes to the
rank's device, is quantised there as transformers does it, and of what came of it the rank keeps its share;
``shard_model`` takes that up.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pantheraml.models.fp8 import Fp8Config, Fp8Quantizer
from pantheraml.models.sharding import Sharding, layers_of
from pantheraml.models.shares import keep_share

_4BIT, _FP8 = "pantheraml_4bit_shares", "pantheraml_fp8_shares"


class Cut(NamedTuple):
    """What a rank keeps of each weight.

    Attributes:
        device: where it is quantised, as text.
        kept_on: where the share is kept, as text.
        ranks: how many have one each.
        rank: the place of this one among them.
    """

    device: str
    kept_on: str
    ranks: int
    rank: int


def cut_of(sharding: Sharding) -> Cut:
    """What this rank keeps under ``sharding``."""
    rank = sharding.mesh.get_local_rank(sharding.mesh.ndim - 1)
    device = str(sharding.device)
    return Cut(device, "cpu" if sharding.offload else device, sharding.ranks, rank)


def cutting(config: QuantizationConfigMixin, cut: Cut) -> QuantizationConfigMixin:
    """``config``, for transformers' loading, of which only shares are left; ``settle`` is called after that."""
    found: Any = copy.copy(config)
    found.quant_method, found.cut = _FP8 if isinstance(config, Fp8Config) else _4BIT, cut
    return found


def settle(model: Any, config: QuantizationConfigMixin) -> None:
    """Let a loaded model know ``config`` as if it had been loaded by it."""
    quantizer = model.hf_quantizer
    quantizer.__class__ = quantizer.kind
    quantizer.quantization_config = model.config.quantization_config = config
    model.quantization_method = config.quant_method


class _CuttingQuantizer(HfQuantizer):
    """Quantises as ``kind`` does, and keeps shares of what is inside decoder layers."""

    kind: type[HfQuantizer]

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with a weight."""
        return _KeepShare(super().get_quantize_ops(), self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers = {id(layer) for layer in layers_of(model)}
        self.inside = tuple(f"{path}." for path, module in model.named_modules() if id(module) in layers)
        return super()._process_model_before_weight_loading(model, **kwargs)


@register_quantizer(_4BIT)
class _Cutting4bit(_CuttingQuantizer, Bnb4BitHfQuantizer):
    kind = Bnb4BitHfQuantizer


@register_quantizer(_FP8)
class _CuttingFp8(_CuttingQuantizer, Fp8Quantizer):
    kind = Fp8Quantizer


class _KeepShare(ConversionOps):
    """One weight on its way from the file to its layer, by way of the device."""

    def __init__(self, quantise: ConversionOps, quantizer: _CuttingQuantizer) -> None:
        self._quantise, self._quantizer = quantise, quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``quantise`` makes of it, the rank's share of the weight itself."""
        config: Any = self._quantizer.quantization_config
        cut: Cut = config.cut
        there = {name: _to(value, cut.device) for name, value in input_dict.items()}
        found: dict[str, Any] = self._quantise.convert(there, *args, **kwargs)
        for name, value in found.items():
            if isinstance(value, nn.Parameter) and name.startswith(self._quantizer.inside):
                keep_share(value, torch.device(cut.kept_on), cut.ranks, cut.rank)
        return found


def _to(value: Any, device: str) -> Any:
    """A tensor, or the only one of a list, on ``device``."""
    return (value[0] if isinstance(value, list) else value).to(device)
