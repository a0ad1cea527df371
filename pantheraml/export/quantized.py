"""Quantised weights (of bitsandbytes, and FP8) read as ordinary tensors; the module that holds them is not touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.shares import whole


def is_4bit(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` holds packed 4-bit values with their quantisation state."""
    # Weights that ranks share out are plain tensors that know their state.
    return getattr(parameter, "quant_state", None) is not None


def is_8bit(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` holds int8 values with one scale per row."""
    return type(parameter).__name__ == "Int8Params" and parameter.dtype == torch.int8


def is_fp8(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is the FP8 weight of ``module``, whose scales lie beside it."""
    return isinstance(module, Fp8Linear) and module.is_quantised and parameter is module.weight


def is_turned(module: nn.Module, parameter: Any) -> bool:
    """Whether quantisation turned the weight around, as it does with GPT-2's (in, out) ``Conv1D``."""
    quantized = is_4bit(parameter) or is_8bit(parameter)
    return quantized and getattr(module, "source_cls", None) is Conv1D


def stored_values(module: Any, parameter: Any) -> torch.Tensor:
    """The values that ``parameter`` of ``module`` stands for.

    4-bit weights come in the dtype that the layer computes with (what training multiplied by), 8-bit and FP8
    weights in float32. Other tensors are returned as they are, sharing memory.

    Args:
        module: the layer, of bitsandbytes or an ``Fp8Linear`` if the weight is quantised.
        parameter: its tensor.
    """
    if is_4bit(parameter):
        return _dequantize_4bit(parameter)
    if is_8bit(parameter):
        import bitsandbytes.functional as bnb

        scales = module.state.SCB if module.state.SCB is not None else parameter.SCB
        return bnb.int8_vectorwise_dequant(parameter.data, scales.to(parameter.device))
    if is_fp8(module, parameter):
        return module.dequantised()
    return whole(parameter.data)


def nf4_pieces(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """``weight`` in 4-bit NF4 with double quantisation, as the tensors of a checkpoint.

    Args:
        name: key of the weight in the checkpoint.
        weight: (out_features, in_features), float16, bfloat16 or float32.

    Returns:
        The packed weight under ``name`` and its quantisation state under keys that extend it.
    """
    from bitsandbytes.nn import Params4bit

    build: Any = Params4bit  # its arguments are those of __new__
    packed = build(weight.contiguous(), requires_grad=False, quant_type="nf4").to(weight.device)
    state = packed.quant_state.as_dict(packed=True)
    return {name: packed.data, **{f"{name}.{key}": value for key, value in state.items()}}


def _dequantize_4bit(parameter: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    state = parameter.quant_state
    data = whole(parameter.data).to(state.absmax.device)  # ranks may keep their shares in host memory
    if getattr(state, "packing_format_for_cpu", False):
        # Inference on some CPUs re-packs the weight in place, with bfloat16 scales. Unpack a copy, and
        # keep those scales: bitsandbytes would quantise them a second time.
        state = copy.copy(state)
        state.original_nested = False
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    return bnb.dequantize_4bit(data, state)
