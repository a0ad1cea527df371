"""Frozen linear layers in FP8: quantised one by one while a checkpoint is loaded, multiplied in FP8 both ways.

    y = x W^T + bias,   W = Wq * weight_scale[:, None]

``Wq`` is e4m3 with one scale per output. Activations and gradients are quantised per token (``kernels.fp8``). Adapters,
norms, embeddings and the head stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pantheraml.devices.model_parts import TURNED_SHARE
from pantheraml.kernels.fp8 import DTYPE, LARGEST, quantise_rows
from pantheraml.kernels.fp8_product import multiply, turn
from pantheraml.kernels.launch import launching_on
from pantheraml.kernels.workspace import borrow
from pantheraml.models.families import find_family
from pantheraml.models.shares import is_share, whole

METHOD = "pantheraml_fp8"
# Tensor cores take e4m3 matrices in steps of 16.
_STEP = 16
# Rows much smaller than the others share a floor, so that an adapter beside them fits into the range of their scale.
_FLOOR_SHARE, _LEAST_SCALE = 1 / 64, 1e-6
# Elements that are float32 at a time while a weight is quantised.
_CHUNK = 2**24


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (N, K) in e4m3, and its scales (N,) float32; a part of the rows at a time."""
    amax = weight.detach().abs().amax(1).float()
    scales = amax / LARGEST
    scales = scales.clamp(min=_LEAST_SCALE).maximum(scales.median() * _FLOOR_SHARE)
    values = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        scaled = weight[part].detach().float() / scales[part, None]
        values[part] = scaled.clamp(-LARGEST, LARGEST).to(DTYPE)
    return values, scales


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        with launching_on(x):
            return multiply(quantise_rows(x), weight, scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scales = ctx.saved_tensors
        with launching_on(dy):
            turned = turn(weight, borrow((weight.shape[1], weight.shape[0]), DTYPE, weight.device))
            return multiply(quantise_rows(dy, scales), turned, None, dy.dtype), None, None


class Fp8Linear(nn.Linear):
    """A linear layer whose frozen weight is held in FP8.

    It is built as an ordinary layer; ``quantise_`` (or loading) turns its weight into e4m3.

    Args:
        in_features: K.
        out_features: N.
        bias: whether it has one.
        device: where it is made.
        dtype: what it computes in.

    Attributes:
        weight: (N, K) e4m3, a Parameter that takes no gradient.
        weight_scale: (N,) float32, a buffer.
        compute_dtype: what products are given in, and what adapters around the layer start from.
        keeps_turned: whether fused layers may keep the weight turned as well.
    """

    weight_scale: Tensor
    compute_dtype: torch.dtype

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)
        self.compute_dtype = self.weight.dtype
        self.keeps_turned = False
        scales = torch.ones(out_features, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("weight_scale", scales)

    @property
    def is_quantised(self) -> bool:
        """Whether the weight is in e4m3 yet."""
        return self.weight.dtype == DTYPE

    @torch.no_grad()
    def quantise_(self) -> Fp8Linear:
        """Turn a plain weight into e4m3; returns the layer."""
        if not self.is_quantised:
            values, scales = quantise_weight(self.weight)
            self.weight = nn.Parameter(values, requires_grad=False)
            self.weight_scale = scales
        return self

    def dequantised(self) -> Tensor:
        """The weight it multiplies by, (N, K) float32: what merging and exporting start from."""
        return whole(self.weight).to(self.weight_scale.device).float() * self.weight_scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the dtype of the input, or of autocast."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if not self.is_quantised:
            return functional.linear(input, self.weight.to(input.dtype), self.bias)
        with torch.autocast(device, enabled=False):
            flat = input.reshape(-1, self.in_features)
            y: Any = _Linear.apply(flat, self.weight, self.weight_scale)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, e4m3"

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Fp8Linear:
        # model.to(dtype) casts whatever is floating: the e4m3 values and their scales are no such numbers.
        weight, scales = self.weight.detach(), self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != weight.dtype and weight.dtype == DTYPE:
            device = self.weight.device
            self.weight = nn.Parameter(weight.to(device), requires_grad=False)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scales.to(self.weight_scale.device)
        return self


class Fp8Config(QuantizationConfigMixin):
    """What transformers is told: quantise to FP8 while loading."""

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = METHOD


register_quantization_config(METHOD)(Fp8Config)


class _Quantise(ConversionOps):
    """One weight on its way from the file to its layer."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Tensor]:
        """The e4m3 weight and its scales, by the names of their places."""
        result: dict[str, Tensor] = {}
        for name, tensors in input_dict.items():
            value = tensors[0] if isinstance(tensors, list) else tensors
            values, scales = quantise_weight(value)
            result[name] = nn.Parameter(values, requires_grad=False)
            result[f"{name}_scale"] = scales
        return result


class Fp8Quantizer(HfQuantizer):
    """Puts ``Fp8Linear`` in the place of the linears inside the decoder before the weights come, and fills them."""

    requires_calibration = False

    def param_needs_quantization(self, model: Any, param_name: str, **__: Any) -> bool:
        """Whether the tensor is the weight of such a layer."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), Fp8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with such a tensor."""
        return _Quantise(self)

    def _process_model_before_weight_loading(self, model: Any, **__: Any) -> Any:
        for path in fp8_linears(model):
            layer = model.get_submodule(path)
            parent, _, name = path.rpartition(".")
            bias = layer.bias is not None
            device, dtype = layer.weight.device, layer.weight.dtype
            new = Fp8Linear(layer.in_features, layer.out_features, bias, device, dtype)
            setattr(model.get_submodule(parent), name, new)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """No: nothing but this library reads the format; merged and adapter saves go their own way."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on top."""
        return True


register_quantizer(METHOD)(Fp8Quantizer)


def fp8_linears(model: Any) -> list[str]:
    """Paths of the layers of a plain transformers ``model`` that are held in FP8: all linears that fit but the head."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [
        path
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear and fits(layer) and not any(_is_below(path, name) for name in kept)
    ]


def fits(layer: nn.Linear) -> bool:
    """Whether tensor cores take the layer's weight in FP8."""
    return layer.in_features % _STEP == 0 and layer.out_features % _STEP == 0


def _is_below(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def choose_turned(model: nn.Module) -> int:
    """Let fused layers keep their weights turned as well if that takes little of the free memory; none of shares.

    Returns:
        How many linear layers there are in FP8.
    """
    layers = _linears_of(model)
    if layers and layers[0].weight.is_cuda and not any(is_share(layer.weight) for layer in layers):
        free = torch.cuda.mem_get_info(layers[0].weight.device)[0]
        if sum(layer.weight.numel() for layer in layers) <= TURNED_SHARE * free:
            keep_turned(model)
    return len(layers)


def keep_turned(model: Any) -> None:
    """Let fused layers of a base model keep FP8 weights turned; never those that read the embedding, for whose backward
    nobody asks, unless embeddings are trained.
    """
    for layer in _linears_of(model):
        layer.keeps_turned = True
    family = find_family(model.config)
    if family is not None:
        attention = model.get_submodule(f"{family.layers}.0.{family.attention}")
        for name in family.attention_projections[:-1]:
            for layer in _linears_of(getattr(attention, name)):
                layer.keeps_turned = False


def _linears_of(model: nn.Module) -> list[Fp8Linear]:
    return [module for module in model.modules() if isinstance(module, Fp8Linear)]
